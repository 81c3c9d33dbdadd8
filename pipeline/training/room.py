"""[Ray] How many workers fit where: nodes come, go, and give notice before they go."""

import time

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


def capacity(gpu: bool) -> int:
    """Workers that the nodes which stay could hold, were there nobody else."""
    from ray._private.state import state

    leaving, kind = draining(), "GPU" if gpu else "CPU"
    return sum(int(has.get(kind, 0)) for node, has in state.total_resources_per_node().items() if node not in leaving)


def choose(sizes: list[int], gpu: bool) -> int:
    """The largest of `sizes` (ascending) there is room for; the smallest if there is not even for that."""
    end, best = time.monotonic() + _SETTLING_S, 0
    while len(sizes) > 1 and best < sizes[-1] and time.monotonic() < end:
        found = now(gpu)
        end = time.monotonic() + _SETTLING_S / 3 if found > best and best else end  # more comes back: look on
        best = max(best, found)
        time.sleep(0.2)
    return next((size for size in sizes[:0:-1] if size <= best and _fits(size, gpu)), sizes[0])


def _fits(size: int, gpu: bool) -> bool:
    """Whether that many places can be had at once. What is read of nodes is old by up to seconds on a busy cluster,
    and a group that is asked for in vain waits for ever."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"GPU" if gpu else "CPU": 1}] * size)
    try:
        return group.wait(int(_SETTLING_S))  # Ray waits for whole seconds: less than one is none
    finally:
        remove_placement_group(group)


class Wanted:
    """Asks the cluster for room for `more` workers, from the first call of `there` until `drop`.

    A placement group asks, so that an autoscaler hears of it, and so that it ends with the driver, SIGKILLed or not.
    Asked for before the workers that are there to begin with have their places, it would take these.
    """

    def __init__(self, more: int, gpu: bool):
        self.more, self.kind, self.group = more, "GPU" if gpu else "CPU", None

    def there(self) -> bool:
        from ray.util.placement_group import placement_group

        if self.more and self.group is None:
            self.group = placement_group([{self.kind: 1}] * self.more)
        return self.group is not None and self.group.wait(0.01)

    def drop(self) -> None:
        from ray.util.placement_group import remove_placement_group

        if self.group is not None:
            remove_placement_group(self.group)
