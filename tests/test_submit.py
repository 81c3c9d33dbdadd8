"""A verb goes to a cluster with its code and without secrets; the same run submitted twice is one run."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
from ray_head import ROOT, TOKEN, RayHead
from s3_server import wait_for

from cluster import auth, book, exposure, pack, submit
from cluster.submit import Wanted
from jobs.__main__ import main
from jobs.submit import _checked, _own
from pipeline import storage
from pipeline.training import checkpoint

CODE = pack.Pack(b"zip", 1, ())


# what travels


def test_the_same_code_is_the_same_bytes_and_runs_by_itself(tmp_path):
    first = pack.pack()
    assert first.data == pack.pack().data
    with zipfile.ZipFile(io.BytesIO(first.data)) as file:
        names = file.namelist()
        file.extractall(tmp_path)
    assert {"jobs/__main__.py", "pipeline/lease.py", "cluster/driver.py", "constraints.txt"} <= set(names)
    assert not [name for name in names if ".git" in name or "__pycache__" in name or name.startswith("tests")]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cluster.driver", "--", "train", "nosuch", "--data", "/d", "--out", "/o"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no preset 'nosuch'")


def test_secrets_and_data_stay_here_and_the_rest_of_a_folder_travels(tmp_path):
    mine = tmp_path / "mine"
    for name in ("run.py", "conf/a.yaml", ".env", "key.pem", "id_rsa", "data.tar", "checkpoints/x.py", ".git/config"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("x = 1\n")
    os.mkfifo(mine / "pipe")
    (mine / "dangling").symlink_to("nowhere")
    packed = pack.pack((str(mine),))
    with zipfile.ZipFile(io.BytesIO(packed.data)) as file:
        assert {name for name in file.namelist() if name.startswith("mine")} == {"mine/run.py", "mine/conf/a.yaml"}
    assert set(packed.left_out) == {"mine/.env", "mine/key.pem", "mine/id_rsa", "mine/data.tar"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (".env", "A=1", "mount it on the nodes"),
        ("run.py", 'key = "AKIAIOSFODNN7EXAMPLE"', "looks to hold a secret"),
        ("jobs", None, "is in the package already"),
        ("big.py", "big", "more than 0 MB"),
    ],
)
def test_what_must_not_travel_is_refused_by_name(tmp_path, name, content, said):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(os.urandom(900_000) if content == "big" else content.encode())
    with pytest.raises(ValueError, match=said):
        pack.pack((str(path),), most=700_000)
    with pytest.raises(FileNotFoundError, match="no such file"):
        pack.pack((str(tmp_path / "nothing"),))


def test_a_package_in_another_version_is_named_and_another_build_of_the_same_is_not():
    from importlib.metadata import version

    pins = f"torch=={version('torch').partition('+')[0]}+cu130\nray==2.1.0\nnosuchpackage==1.0\n"
    assert pack.unmet(pins) == [f"ray is {version('ray')}, not 2.1.0", "nosuchpackage 1.0 is not installed"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("GITHUB_TOKEN", "x"), ("DB_PASSWORD", "x"),
        ("URL", "https://user:hunter2@host/"), ("A", "AKIAIOSFODNN7EXAMPLE"), ("B", "-----BEGIN RSA PRIVATE KEY-----"),
        ("C", "hf_" + "a1B2c3D4" * 5),
    ],
)  # fmt: skip
def test_a_variable_that_looks_like_a_secret_is_refused_with_the_way_to_do_it(name, value):
    with pytest.raises(ValueError, match="Give the nodes a role"):
        exposure.refuse_variable(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_ENDPOINT_URL", "http://minio:9000"), ("AWS_REGION", "eu-west-1"), ("OMP_NUM_THREADS", "4"),
     ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token"), ("TOKENIZERS_PARALLELISM", "false")],
)  # fmt: skip
def test_other_variables_travel(name, value):
    exposure.refuse_variable(name, value)


def test_words_with_a_secret_or_a_path_of_this_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="looks like a secret"):
        exposure.refuse_command(["train", "--mlflow", "https://u:p4ssw0rd@host"])
    for words in (["train", "p", "--data", "data"], ["train", "p", "--out=runs/x"], ["shard", "folder:pics/a", "/o"]):
        with pytest.raises(ValueError, match="lies in a folder of this machine"):
            _checked(words, None)
    for words in (["nosuch"], ["submit"], ["__main__"]):
        with pytest.raises(ValueError, match="no verb to run"):
            _checked(words, None)
    with pytest.raises(ValueError, match="given twice"):
        _checked(["train", "--workers=2"], "4")
    good = ["train", "digits_cnn", "--data", "s3://a/b", "--out", "/mnt/x", "--lr", "1/2"]
    assert _checked(good, "2..8") == [*good, "--workers", "2..8"]
    assert _checked(["shard", "digits:", "s3://a/b"], None) == ["shard", "digits:", "s3://a/b"]


def test_a_file_of_ones_own_travels_by_itself_and_is_called_as_it_lies_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "code").mkdir()
    mine = tmp_path / "code/mine.py"
    mine.write_text("def my_run(): ...\n")
    rest = ["--data", "s3://a/b", "--out", "s3://a/c"]
    for given in ("code/mine.py", "./code/mine.py", str(mine), "~/code/mine.py"):
        assert _own(["train", f"{given}:my_run", *rest]) == (["train", "mine.py:my_run", *rest], [str(mine)])
    words = ["train", "code/mine.py:my_run", "--model=code/mine.py:Net", "--model", "code/mine.py:Net"]
    assert _own(words) == (["train", "mine.py:my_run", "--model=mine.py:Net", "--model", "mine.py:Net"], [str(mine)])
    for words in (["train", "s3://a/x.py:f"], ["train", "/nodes/x.py:f"], ["train", "digits_cnn", "--init", "w.pth"]):
        assert _own(words) == (words, [])
    with pytest.raises(ValueError, match=r"nosuch.py:f: there is no file"):
        _own(["train", "./nosuch.py:f"])
    sent, real = [], submit.check
    monkeypatch.setattr(submit, "check", lambda wanted: sent.append((wanted, *real(wanted))) or sent[-1][1:])
    for include in ([], ["--include", "code/mine.py"]):
        words = ["--dry-run", "--json", *include, "--", "train", "./code/mine.py:my_run", *rest]
        assert main(["submit", *words]) == 0
        assert json.loads(capsys.readouterr().out)["words"] == ["train", "mine.py:my_run", *rest]
        with zipfile.ZipFile(io.BytesIO(sent[-1][1].data)) as file:
            assert file.read("mine.py") == mine.read_bytes()
    assert sent[0][1].data == sent[1][1].data
    mine.write_text('KEY = "AKIAIOSFODNN7EXAMPLE"')
    assert main(["submit", *words]) == 2
    assert "looks to hold a secret" in capsys.readouterr().err


# tokens


def test_the_token_is_found_where_ray_looks_for_it_in_its_order(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    auth.use_token()
    assert auth.token() is None
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    assert auth.token() == "home"
    assert auth.readable_by_others() == tmp_path / ".ray/auth_token"
    (tmp_path / ".ray/auth_token").chmod(0o600)
    assert auth.readable_by_others() is None
    (tmp_path / "t").write_text("file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "t"))
    assert auth.token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert auth.token() == "variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth.token() is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # so that the next line's change is undone
    del os.environ["RAY_AUTH_MODE"]
    auth.use_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be read"):
        auth.token()


def test_a_token_goes_over_plain_http_only_within_this_machine():
    auth.listeners("http://127.0.0.1:8265", False)
    auth.listeners("https://head.example:8265", False)
    auth.listeners("http://10.0.0.5:8265", True)
    for address in ("http://10.0.0.5:8265", "http://head:8265", "http://localhost.evil.example:8265"):
        with pytest.raises(ValueError, match="Go through a tunnel"):
            auth.listeners(address, False)


# attempts


class FakeHead:
    """A head's memory: {job: status}."""

    def __init__(self, address="http://h:1"):
        self.address, self.known = address, {}

    async def version(self):
        from importlib.metadata import version

        return version("ray")

    async def job(self, job):
        return {"status": self.known[job], "metadata": {}} if job in self.known else None

    async def jobs(self):
        return [{"submission_id": job, "status": status} for job, status in self.known.items()]

    async def upload(self, name, data):
        return f"gcs://{name}"

    async def submit(self, request):
        self.known.setdefault(request["submission_id"], "RUNNING")


@pytest.fixture
def wanted(tmp_path):
    return Wanted(("train", "p"), store=str(tmp_path / "store"), name="run")


def go(head, wanted):
    return asyncio.run(submit.submit(head, wanted, CODE, {"variables": {}, "labels": {}}))


def test_a_run_under_way_is_followed_and_one_that_ended_gets_another_attempt(wanted):
    for one in (wanted, Wanted(("train", "p"), name="run")):
        head = FakeHead()
        assert go(head, one) == ("run-1", True) if one.store else go(head, one)[0] == "run-1"
        assert go(head, one) == ("run-1", False)
        head.known["run-1"] = "FAILED"
        assert go(head, one)[0] == "run-2"


def test_a_head_that_forgot_everything_gets_a_new_attempt_of_what_had_started(wanted):
    go(FakeHead(), wanted)
    book.beat(wanted.store, book.Attempt("run", 1))
    assert go(FakeHead(), wanted) == ("run-2", True)


def test_an_attempt_that_was_claimed_but_never_reached_the_head_is_submitted_by_whoever_comes(wanted):
    request = {"submission_id": "run-1", "runtime_env": {}}
    book.claim(wanted.store, book.Attempt("run", 1), {"address": "http://h:1", "request": request})
    head = FakeHead()
    assert go(head, wanted) == ("run-1", False)
    assert head.known == {"run-1": "RUNNING"}


def test_what_ended_by_its_drivers_word_is_over_whatever_the_head_says(wanted):
    head = FakeHead()
    go(head, wanted)
    book.beat(wanted.store, book.Attempt("run", 1), code=0)
    assert go(head, wanted) == ("run-2", True)


def test_a_run_on_another_cluster_is_not_started_here_unless_told(wanted):
    go(FakeHead("http://a:1"), wanted)
    with pytest.raises(ValueError, match="was submitted to http://a:1"):
        go(FakeHead("http://b:1"), wanted)
    over = Wanted(wanted.words, store=wanted.store, name="run", take_over=True)
    assert go(FakeHead("http://b:1"), over) == ("run-2", True)


def test_of_racing_claimants_one_wins_each_attempt(tmp_path):
    won, store = [], str(tmp_path)

    def race(who: int) -> None:
        for number in range(1, 21):
            try:
                book.claim(store, book.Attempt("run", number), {"who": who})
            except FileExistsError:
                continue
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == list(range(1, 21))
    assert book.newest(store, "run") == 20
    assert book.newest(store, "other") == 0


def drive(store: str, job: str, words: list[str], **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "cluster.driver", "--unpinned", "--store", store, "--job", job, "--", *words]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


def test_a_driver_says_how_it_ended_and_leaves_when_it_has_a_successor(tmp_path, digits):
    store, out = str(tmp_path / "store"), str(tmp_path / "run")
    first, second = book.Attempt("run", 1), book.Attempt("run", 2)
    book.claim(store, first, {})
    words = ["train", "digits_cnn", "--data", digits, "--out", out, "--workers", "0", "--epochs"]
    with drive(store, "run-1", [*words, "300"]) as orphan:
        wait_for(lambda: os.path.isdir(f"{out}/checkpoints"), 120, "checkpoint")
        book.claim(store, second, {})
        _, said = orphan.communicate(timeout=120)
    assert orphan.returncode == 124, said
    assert "run-1 has a successor" in said
    assert "all saved" in said  # it left in order, so that the successor need not wait for its lease
    assert book.heard(store, first)["code"] == 124
    with drive(store, "run-2", ["train", "nosuch"]) as driver:
        driver.communicate(timeout=120)
    assert driver.returncode == book.heard(store, second)["code"] == 2


def test_a_driver_that_comes_late_does_nothing(tmp_path):
    store = str(tmp_path)
    for number in (1, 2):
        book.claim(store, book.Attempt("run", number), {})
    with drive(store, "run-1", ["shard", "digits:", str(tmp_path / "out")]) as driver:
        driver.communicate(timeout=60)
    assert driver.returncode == 124
    assert not (tmp_path / "out").exists()


# a real head


@pytest.fixture(scope="module")
def head():
    with RayHead() as head:
        yield head


@pytest.fixture
def at(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return ["--address", head.address]


def ms(*words: str, seconds: float = 180) -> tuple[int, dict, str]:
    """Exit code, JSON and stderr of `millstream`."""
    done = subprocess.run([sys.executable, "-m", "jobs", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=seconds)  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {}, done.stderr


def test_a_submitted_verb_ends_with_its_own_exit_code_and_shows_its_log(at, tmp_path):
    out = str(tmp_path / "data")
    code, result, said = ms("submit", *at, "--json", "--", "shard", "digits:", out, "--workers", "0")
    assert (code, result["state"], result["started"]) == (0, "succeeded", True), said
    assert "1,797 samples added" in said
    assert storage.exists(f"{out}/dataset.json")
    code, result, said = ms("submit", *at, "--json", "--", "train", "nosuch", "--data", out, "--out", f"{out}-run")
    assert (code, result["state"]) == (2, "failed"), said
    assert "no preset 'nosuch'" in said


def test_submitted_twice_it_is_followed_and_stopping_it_saves_a_checkpoint(at, tmp_path, digits):
    out = str(tmp_path / "run")
    words = ["--", "train", "digits_cnn", "--data", digits, "--out", out, "--workers", "0", "--epochs", "400"]
    code, result, said = ms("submit", *at, "--detach", "--json", *words)
    assert (code, result["started"]) == (0, True), said
    job = result["job"]
    second = subprocess.Popen([sys.executable, "-m", "jobs", "submit", *at, "--json", *words], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: "samples" in ms("job", "logs", *at, "--json", job)[1].get("log", ""), 120, "step")
    assert ms("job", "status", *at, "--json", job)[1]["state"] == "running"
    code, result, said = ms("job", "stop", *at, "--json", job)
    assert (code, result["state"]) == (0, "stopped"), said
    out_, said = second.communicate(timeout=60)
    assert second.returncode == 121, said
    assert json.loads(out_)["started"] is False
    assert "under way already" in said
    log = ms("job", "logs", *at, "--json", job)[1]["log"]
    assert re.search(r"stopped at [\d,]+ samples, all saved", log)
    assert ms("job", "wait", *at, job)[0] == 121
    assert job in json.dumps(ms("job", "list", *at, "--json")[1])


def test_a_wrong_token_a_missing_one_and_an_unknown_job_are_named(at, monkeypatch):
    code, result, said = ms("job", "wait", *at, "--json", "nosuch-1")
    assert (code, result["state"]) == (122, "lost")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    code, _, said = ms("job", "list", *at)
    assert code == 2
    assert "refuses our token" in said
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, _, said = ms("job", "list", *at)
    assert code == 2
    assert "wants a token" in said
    code, result, said = ms("job", "wait", "--address", "http://127.0.0.1:9", "--patience", "1", "--json", "a-1")
    assert (code, result["state"]) == (123, "unreachable")


@pytest.mark.slow
def test_heads_with_a_token_and_without_are_spoken_to_in_every_mode(tmp_path, monkeypatch):
    """Ray 2.60 takes a token from the home folder by itself, or not, by how it was started; 2.61 always does."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(TOKEN)
    with RayHead(token=None) as open_head, RayHead() as closed:
        for mode in ("token", "disabled", None):
            monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
            if mode:
                monkeypatch.setenv("RAY_AUTH_MODE", mode)
            out = ["shard", "digits:", str(tmp_path / f"data-{mode}"), "--workers", "1"]
            code, result, said = ms("submit", "--address", open_head.address, "--json", "--", *out)
            assert (code, result.get("state")) == (0, "succeeded"), said
            assert "chmod 600" in said
            code, _, said = ms("job", "list", "--address", closed.address)
            assert (code, "wants a token" in said) == ((2, True) if mode == "disabled" else (0, False))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_driver_of_a_dead_head_cannot_write_over_its_successor(s3, digits, monkeypatch):
    """The head dies, its driver is paused and lives; the same command on the head that comes back starts a successor.
    When the orphan wakes up, it ends, and nothing it wrote is read."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    place = s3.fresh()
    store, out = f"{place}/store", f"{place}/run"
    epochs = ["--epochs", "12", "--checkpoint-every", "1600"]
    words = ["train", "digits_cnn", "--data", digits, "--out", out, "--workers", "0", *epochs]
    with RayHead() as head:
        at = ["--address", head.address, "--store", store, "--json"]
        assert ms("submit", *at, "--name", "run", "--detach", "--", *words)[0] == 0
        first = book.Attempt("run", 1)
        wait_for(lambda: checkpoint.lineage(out), 120, "checkpoint")
        orphan = book.heard(store, first)["pid"]
        watchers = subprocess.run(["pgrep", "-f", f"kill -9 -{os.getpgid(orphan)}$"], capture_output=True, text=True)
        for pid in watchers.stdout.split():  # Ray's, which would take the driver along; a node that dies takes it, too
            os.kill(int(pid), signal.SIGKILL)
        os.kill(orphan, signal.SIGSTOP)
        try:
            head.kill(spare=(orphan,))
            head.start()
            code, result, said = ms("submit", *at, "--name", "run", "--detach", "--", *words)
            assert (code, result) == (0, {"job": "run-2", "started": True}), said
            wait_for(lambda: book.heard(store, book.Attempt("run", 2)), 120, "successor")
            code, result, said = ms("job", "wait", *at, "run-2", seconds=400)
        finally:
            os.kill(orphan, signal.SIGCONT)
        assert (code, result["state"]) == (0, "succeeded"), said
        rows = checkpoint.read_metrics(out)
        wait_for(lambda: book.heard(store, first)["code"] == 124, 120, "end of the orphan")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert checkpoint.read_metrics(out) == rows
    assert checkpoint.lineage(out)[0].samples == rows[-1]["samples"]
