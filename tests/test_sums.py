"""Sums over the ranks: the same bits wherever the ranks are, in place, and nothing left of the memory they share."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.training import sums
from pipeline.training.world import World

RANKS = """
import os, signal, sys, tempfile, traceback
import torch, torch.distributed as dist
from pipeline.training import sums
from pipeline.training.world import World

SIZE, folder = 3, tempfile.mkdtemp()
torch.set_num_threads(1)


def of(rank, turn):
    torch.manual_seed(10 * turn + rank)
    kernel = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    return [torch.randn(5, 7), kernel, torch.randn(()), torch.randn(4, 8, 1, 1), torch.randn(3).exp()]


def added(turn):
    first, *others = (of(rank, turn) for rank in range(SIZE))
    for other in others:
        first = [a + b for a, b in zip(first, other, strict=True)]
    return first


def check(world, kind):
    for turn in range(3):
        tensors = of(world.rank, turn)
        strides = [t.stride() for t in tensors]
        world.sum_all_(tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, added(turn), strict=True)), (kind, turn)
        assert [t.stride() for t in tensors] == strides
    assert [type(block) for block in world._blocks.values()] == [kind]
    wide = [torch.full((2,), 2.0**-40 * (world.rank + 1), dtype=torch.float64), torch.ones(2)]
    world.sum_all_(wide)
    assert wide[0].tolist() == [2.0**-40 * 6] * 2 and wide[1].tolist() == [3.0, 3.0]


def rank_of(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE)
    world = World(rank, SIZE)
    check(world, sums.SharedBlock)
    maps = open("/proc/self/maps").read()
    assert "/memfd:millstream-" in maps and "/dev/shm" not in maps
    opened = sums._opened
    if rank == 1:
        sums._opened = lambda *args: None  # as if it were on another host
    check(World(rank, SIZE), sums.SentBlock)
    sums._opened = opened
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.sum_all_(of(rank, 0))
    except RuntimeError as error:
        assert "gloo" in str(error).lower(), error
    else:
        raise AssertionError("a sum without one of the ranks")


children = []
for rank in range(SIZE):
    child = os.fork()
    if not child:
        try:
            rank_of(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, -signal.SIGKILL]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory without a name is Linux's")
def test_ranks_add_up_in_their_order_with_and_without_memory_they_share_and_a_dead_one_is_noticed():
    before = os.listdir("/dev/shm")
    done = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir("/dev/shm")) <= set(before)


def test_what_is_at_the_same_place_on_another_host_is_not_opened(tmp_path):
    descriptor = os.memfd_create("millstream-of-another-run")
    try:
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        assert sums._opened(path, "millstream-of-this-run", 8) is None
        os.ftruncate(descriptor, 8)
        assert sums._opened(path, "millstream-of-another-run", 8).size() == 8
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="No such file"):
        sums._opened(str(tmp_path / "nothing"), "x", 8)


def test_one_rank_alone_has_nothing_to_add():
    tensor = torch.ones(3)
    World().sum_all_([tensor])
    assert tensor.tolist() == [1, 1, 1]


def test_the_group_has_one_block_for_a_list_of_tensors_however_often_it_is_summed():
    class Doubling(World):
        def sum_(self, tensor):
            return tensor.mul_(2)

    world, tensors = Doubling(0, 2), [torch.ones(2, 3), torch.ones(())]
    for _ in range(3):
        world.sum_all_(tensors)
    assert tensors[0].tolist() == [[8.0] * 3] * 2
    assert tensors[1].item() == 8
    assert len(world._blocks) == 1
