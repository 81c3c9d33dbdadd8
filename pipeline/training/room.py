"""[Ray] How many workers fit where: nodes come, go, and give notice before they go."""

import contextlib
import time
from collections.abc import Callable, Iterator

from pipeline.training.resources import Resources

_SETTLING_S = 3.0  # a group that has just ended gives its places back within


def cuda(resources: Resources, size: int) -> bool:
    """Whether workers compute on GPUs."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    return resources.device == "cuda" or (resources.device == "auto" and gpus >= size)


def draining() -> dict[str, int]:
    """{id of a node that has given notice: its deadline, unix time in ms, 0: none}."""
    from ray._private.state import state  # what Ray Train itself asks; there is no public way

    return state.get_draining_nodes()


def now(gpu: bool) -> int:
    """Workers (of one CPU or GPU each) for which there is room on nodes that stay."""
    from ray._private.state import state

    leaving, kind = draining(), "GPU" if gpu else "CPU"
    free = state.available_resources_per_node()
    return sum(int(has.get(kind, 0)) for node, has in free.items() if node not in leaving)


def choose(sizes: list[int], gpu: bool) -> int:
    """The largest of `sizes` (ascending) there is room for; the smallest if there is not even for that."""
    end, best = time.monotonic() + _SETTLING_S, 0
    while len(sizes) > 1 and best < sizes[-1] and time.monotonic() < end:
        found = now(gpu)
        end = time.monotonic() + _SETTLING_S / 3 if found > best and best else end  # more comes back: look on
        best = max(best, found)
        time.sleep(0.2)
    return max((size for size in sizes if size <= best), default=sizes[0])


@contextlib.contextmanager
def wanted(more: int, gpu: bool) -> Iterator[Callable[[], bool]]:
    """Asks the cluster for room for so many more workers while the block lasts; what is yielded says if it is there.

    A placement group asks, so that an autoscaler hears of it, and so that it ends with the driver, SIGKILLed or not.
    """
    if not more:
        yield lambda: False
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"GPU" if gpu else "CPU": 1}] * more)
    try:
        yield lambda: group.wait(0.01)
    finally:
        remove_placement_group(group)
