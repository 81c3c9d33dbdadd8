"""The loader in a plain torch loop: batches that do not depend on who shares them, and one number to go on from."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loading.augment import Augment
from pipeline.loading.loader import Loader
from pipeline.loading.selection import Selection
from pipeline.shards import index

AUGMENT = Augment(32, 1, crop="resized", flip=True)


def taken(count, **options):
    """(rows, images, labels) of the next `count` batches, and the position then."""
    loader = Loader(threads=2, **{"augment": AUGMENT, "batch": 64} | options)
    batches = iter(loader)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return [
        np.concatenate([np.asarray(getattr(b, name)) for b in found]) for name in ("rows", "images", "labels")
    ], loader


def by_row(rows, images):
    return {int(row): image.tobytes() for row, image in zip(rows, images, strict=True)}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_global_batches_of_one(digits, world):
    (rows, images, labels), _ = taken(5, dataset=digits)
    shares = [taken(5, dataset=digits, rank=rank, world=world)[0] for rank in range(world)]
    assert all(len(share[0]) == 5 * 64 // world for share in shares)
    for step in range(5):
        own = [{*share[0].reshape(5, -1)[step].tolist()} for share in shares]
        assert set().union(*own) == {*rows.reshape(5, 64)[step].tolist()}
    together = {row: image for share in shares for row, image in by_row(*share[:2]).items()}
    assert together == by_row(rows, images)
    assert labels.tolist() == index.load(digits).split("train").label[rows].tolist()


def test_a_position_is_all_that_is_needed_to_go_on(digits):
    (rows, images, _), _ = taken(12, dataset=digits)
    _, first = taken(7, dataset=digits)
    assert first.position == 7 * 64
    later = [taken(5, dataset=digits, position=first.position, rank=rank, world=2)[0] for rank in range(2)]
    assert {**by_row(*later[0][:2]), **by_row(*later[1][:2])} == by_row(rows[7 * 64 :], images[7 * 64 :])


def test_iterated_again_it_goes_on_and_counts_epochs(digits):
    loader = Loader(digits, batch=400, augment=AUGMENT)
    n = len(index.load(digits).split("train"))
    seen = []
    for _ in range(4):
        for batch in loader:
            seen.append(batch.rows)
            break
    assert loader.epoch == 1600 / n
    assert len(np.unique(np.concatenate(seen))) == 1600


def test_keys_and_floats_belong_to_the_batch(digits):
    loader = Loader(digits, batch=32)
    batch = next(iter(loader))
    split = index.load(digits).split("train")
    assert loader.keys(batch) == [split.keys[int(row)].as_py() for row in batch.rows]
    floats = loader.to_float(batch.images)
    assert (floats.dtype, floats.shape) == (torch.float32, (32, 1, 32, 32))
    assert abs(float(floats.mean())) < 0.2


def test_a_share_of_the_samples_and_balanced_classes(digits):
    half = Loader(digits, selection=Selection(fraction=0.5), batch=64)
    assert 0.4 < len(half.split) / len(index.load(digits).split("train")) < 0.6
    even = Loader(digits, selection=Selection(balance=True), batch=64)
    n = even._steps.order.n
    (_, _, labels), _ = taken(-(-n // 64), dataset=digits, selection=Selection(balance=True))
    counts = np.bincount(labels[:n], minlength=10)
    assert counts.max() - counts.min() <= 1


def test_datasets_are_mixed_by_their_shares(digits, tmp_path):
    (rows, _, labels), loader = taken(10, dataset=[(digits, 3), (digits, 1)])
    n = len(index.load(digits).split("train"))
    assert len(loader.split) == 2 * n
    assert 0.65 < (rows < n).mean() < 0.85
    assert labels.tolist() == loader.split.label[rows].tolist()
    assert len(loader.keys(next(iter(loader)))) == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"world": 3, "batch": 63}, "must divide 64"),
        ({"world": 2, "batch": 63}, "batch 63 is not a multiple"),
        ({"position": 5}, "position 5"),
        ({"split": "holdout"}, "no split 'holdout'"),
    ],
)
def test_what_cannot_be_shared_is_refused(digits, options, said):
    with pytest.raises(ValueError, match=said):
        Loader(digits, **{"batch": 64} | options)


def test_datasets_of_other_classes_are_not_mixed(digits, photos):
    with pytest.raises(ValueError, match="no dataset"):
        Loader([])
    with pytest.raises(ValueError, match="balance is for one dataset"):
        Loader([(digits, 1), (digits, 1)], selection=Selection(balance=True))
    with pytest.raises(ValueError, match="other classes"):
        Loader([(digits, 1), (photos, 1)], augment=AUGMENT)


def test_the_readme_s_loop_runs_as_it_stands(digits, tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Loader(" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    script = tmp_path / "loop.py"
    script.write_text(code)
    (tmp_path / "data").symlink_to(digits)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "position").read_text()) > 0


def test_neither_ray_nor_the_trainer_comes_with_it(digits):
    code = "import sys, pipeline.loading.loader; print([m for m in ('ray', 'pipeline.training') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
