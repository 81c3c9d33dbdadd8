"""Each trap in a cluster file is named, and nothing is found in a file that has none."""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lint_examples import AWS, BUDGET, CRON, GONE, GOOD, POD, RAYCLUSTER, RAYJOB, TRAPS, changed

from cluster.lint import lint

ROOT = Path(__file__).parents[1]
OURS = [ROOT / "cluster/aws.yaml", ROOT / "cluster/gcp.yaml", *sorted((ROOT / "cluster/kuberay").glob("*.yaml"))]


pytestmark = pytest.mark.usefixtures("schemas_read_once")


def written(tmp_path, *documents: dict) -> list[str]:
    (tmp_path / "file.yaml").write_text(yaml.safe_dump_all(documents))
    return [str(tmp_path / "file.yaml")]


def test_the_files_we_ship_have_no_trap():
    assert len(OURS) >= 6
    assert lint(list(map(str, OURS))) == []


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_has_none(tmp_path, name):
    assert lint(written(tmp_path, GOOD[name], *([BUDGET] if name in ("cluster", "job") else []))) == []


@pytest.mark.parametrize(("name", "path", "value", "trap"), TRAPS)
def test_each_trap_is_named_and_nothing_else(tmp_path, name, path, value, trap):
    broken = changed(GOOD[name], path, value)
    found = lint(written(tmp_path, broken, *([BUDGET] if name in ("cluster", "job") else [])))
    assert {finding.trap for finding in found} == ({trap} if trap else set()), [str(finding) for finding in found]
    assert all("\n" not in str(finding) for finding in found)


ROLE = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r"}}
ADMIN = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
BARE_POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": POD | {"hostNetwork": True}}


def rules(*groups: str, resources: str = "*", verbs: str = "get") -> dict:
    return ROLE | {"rules": [{"apiGroups": list(groups), "resources": [resources], "verbs": [verbs]}]}


def service(**spec) -> dict:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"type": "LoadBalancer"} | spec}


@pytest.mark.parametrize(
    ("document", "traps"),
    [
        (rules("*", verbs="*"), ["full-access-role"]), (rules(""), ["full-access-role"]), (rules("ray.io"), []),
        (rules("", resources="pods", verbs="*"), []),
        (ROLE | {"kind": "ClusterRoleBinding", "roleRef": ADMIN}, ["full-access-role"]),
        (service(ports=[{"port": 8265}]), ["open-dashboard"]),
        (service(ports=[{"port": 80, "targetPort": "dashboard"}]), ["open-dashboard"]),
        (service(ports=[{"port": 80}], selector={"ray.io/node-type": "head"}), ["open-dashboard"]),
        (service(ports=[{"port": 80}]), []), (service(ports=[{"port": 8265}], type="ClusterIP"), []),
        (RAYCLUSTER, ["no-disruption-budget"]), (BARE_POD, ["host-network"]),
        ({"apiVersion": "v1", "kind": "List", "items": [BARE_POD, CRON]}, ["host-network"]),
        ({"apiVersion": "v1", "kind": "Pood"}, ["schema"]), ({"apiVersion": "v1", "kind": "pod"}, ["schema"]),
        ({"apiVersion": "v1", "kind": "../../x"}, ["schema"]),
        ({"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "ClusterQueue"}, ["unchecked"]),
    ],
)  # fmt: skip
def test_the_traps_of_kubernetes_own_kinds(tmp_path, document, traps):
    assert [finding.trap for finding in lint(written(tmp_path, document))] == traps


def test_secrets_are_found_wherever_they_are_and_others_are_left_alone(tmp_path):
    many = changed(AWS, "metadata", {"notes": [f"line {at}" for at in range(3000)]})
    many["metadata"]["notes"][1234] = "AKIAIOSFODNN7EXAMPLE"
    found = lint(written(tmp_path, many))
    assert [(finding.trap, finding.where) for finding in found] == [("secret", "metadata.notes.1234")]
    assert "AKIA" not in str(found[0])


def crd(**fields) -> dict:
    """A CustomResourceDefinition of RayCluster whose spec has these fields."""
    spec = {"type": "object", "properties": fields, "required": ["head"]}
    schema = {"type": "object", "properties": {"spec": spec, "metadata": {"type": "object", "properties": {}}}}
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    return {"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1",
            "spec": {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": versions}}  # fmt: skip


@pytest.fixture
def crds(tmp_path) -> str:
    size = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"a": {"type": "string"}}}
    head = {"size": size, "count": {"type": "integer", "minimum": 1}, "above": {"type": "number", "minimum": 0,
            "exclusiveMinimum": True}, "none": {"type": "string", "nullable": True}, "description": {"type": "string"},
            "each": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "string"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "string"}}}  # fmt: skip
    definition = crd(head={"type": "object", "properties": head, "description": "of the head"}, free=free)
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds/c.yaml").write_text(yaml.safe_dump(definition))
    return str(tmp_path / "crds")


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"head": {"size": 1}}, []), ({"head": {"size": "1Gi", "none": None, "above": 0.1}, "free": {"b": 1}}, []),
        ({"head": {"description": "d", "each": [{"x": "y"}], "map": {"any": "z"}}}, []),
        ({"head": {"size": 1.5}}, ["spec.head.size"]), ({"head": {"count": 0}}, ["spec.head.count"]),
        ({"head": {"above": 0}}, ["spec.head.above"]), ({"head": {"cuont": 1}}, ["spec.head"]), ({}, ["spec"]),
        ({"head": {"each": [{"y": 1}]}}, ["spec.head.each.0"]), ({"head": {"map": {"any": 1}}}, ["spec.head.map.any"]),
        ({"head": {}, "free": {"a": 1}}, ["spec.free.a"]), ({"head": None}, ["spec.head"]),
    ],
)  # fmt: skip
def test_crds_refuse_unknown_fields_and_honour_what_they_leave_open(crds, spec, where):
    from cluster.lint.crds import errors

    document = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"x": 1}, "spec": spec}
    assert [place for place, _ in errors(document, crds)] == where


def test_lint_holds_kuberays_kinds_against_the_crds_it_is_given(tmp_path, crds):
    found = lint(written(tmp_path, RAYCLUSTER, BUDGET), crds)
    assert {(finding.trap, finding.where) for finding in found} == {("schema", "RayCluster c spec")}
    with pytest.raises(ValueError, match="no CRD for RayJob"):
        lint(written(tmp_path, RAYJOB), crds)
    with pytest.raises(ValueError, match="no such folder"):
        lint(written(tmp_path, RAYJOB), crds + "/none")
    (tmp_path / "crds/d.yaml").write_text("kind: CustomResourceDefinition\n")
    with pytest.raises(ValueError, match=r"d\.yaml: no CRD that can be read"):
        lint(written(tmp_path, RAYJOB), crds + "/")


LAUGHS = b"cluster_name: a\na0: &a0 [lol, lol]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 12)
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"), (b"---\n---\n", "empty"), (b"a: [", "no YAML"), (b"- a\n- b\n", "neither"),
        (b"\x00\xff\xfe", "no text"), (b"\x00" * 9, "no YAML"), (b"hello", "neither"), (b"kind: RayJob\n", "neither"),
        (b"x" * (5 << 20), "too large"), (LAUGHS, "aliases repeat"),
        (b"cluster_name: &a {b: *a}\n", r"line 1: \*a is inside"), (b"cluster_name: *a\n", "undefined alias"),
        (b"cluster_name: " + b"[" * 900_000, "deep"), (b"cluster_name:\n " + b"- " * 500_000, "deep"),
        (b"{a: " * 200_000, "deep"),
        (b"cluster_name: a\nmax_workers: 1\nmax_workers: 2\n", "line 3: 'max_workers' is given twice"),
        (b"cluster_name: 2026-13-45\n", "month"), (b"cluster_name: !!bool x\n", "no YAML"),
        (b"cluster_name: !!int ''\n", "no YAML"), (b"cluster_name: " + b"9" * 6000, "no YAML"),
        (b"Resources: !Sub x\n", "!Sub"), (b"cluster_name: !!python/object/apply:os.getcwd []\n", "python"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)  # fmt: skip
def test_what_is_no_cluster_file_is_refused_in_a_line(tmp_path, content, said):
    (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        lint([str(tmp_path / "f.yaml")])
    assert str(refused.value).startswith(str(tmp_path / "f.yaml"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_no_file_a_folder_and_an_endless_one(tmp_path):
    with pytest.raises(IsADirectoryError):
        lint([str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        lint([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="too large"):
        lint(["/dev/zero"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content",
    [
        b"cluster_name: a\na:\n" + b"- abc\n" * 100_000,
        b"cluster_name: '" + b"a=b://:@" * 100_000 + b"'\n",
        b"cluster_name: '" + b"--dashboard-host export A= " * 30_000 + b"'\n",
        b"apiVersion: v1\nkind: Pod\nspec:\n containers:\n - env:\n" + b"   - {name: A, value: b}\n" * 10_000,
    ],
    ids=lambda value: repr(value[-20:]),
)
def test_large_files_are_judged_in_seconds(tmp_path, content):
    (tmp_path / "f.yaml").write_bytes(content)
    assert lint([str(tmp_path / "f.yaml")])


def paths(node, way: tuple = ()):
    for key, inside in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield ".".join(map(str, (*way, key)))
        yield from paths(inside, (*way, key))


@pytest.mark.parametrize("name", GOOD)
def test_any_value_anywhere_is_a_finding_or_a_refusal_and_never_a_traceback(tmp_path, name):
    values = itertools.cycle([None, 3, -1.5, "x", "²", [], [1], [None], {}, {"a": None}, {1: 2}, [[]], "a: [", True])
    places = [path for path in paths(GOOD[name]) if not path.startswith("file_mounts.")]  # its keys have dots
    for place in places[:: 1 if name in ("aws", "gcp") else 3]:
        file = written(tmp_path, changed(GOOD[name], place, next(values)))
        with contextlib.suppress(ValueError):  # as for a cluster file no more
            lint(file)


def test_the_verb_names_the_trap_and_ends_with_1(tmp_path):
    file = written(tmp_path, changed(AWS, "setup_commands", GONE))

    def millstream(*words: str):
        return subprocess.run([sys.executable, "-m", "jobs", "cluster", "lint", *words], cwd=ROOT, capture_output=True,
                              text=True, timeout=60)  # fmt: skip

    done = millstream(*file, "--json")
    assert done.returncode == 1
    assert [found["trap"] for found in json.loads(done.stdout)["findings"]] == ["nightly-wheel"]
    assert "[nightly-wheel]" in done.stderr
    assert millstream(*map(str, OURS)).returncode == 0
    missing = millstream(str(tmp_path / "none.yaml"))
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
