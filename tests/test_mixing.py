"""Class mixing: what shuffled shards measure against chance, and that sorted ones are seen."""

import numpy as np
import pytest

from pipeline.shards import index
from pipeline.shards.mixing import mixing


def labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, n).astype(np.int32)


def test_a_random_order_is_as_good_as_random():
    found = mixing(labels(200_000, 10), np.full(200, 1000))
    assert abs(found["entropy_ratio"] - 1) < 0.001
    assert abs(found["adjacent_ratio"] - 1) < 4 * found["adjacent_noise"] < 0.04
    assert found["mixed"] is True


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_data_sorted_by_class_shows_plainly(classes):
    found = mixing(np.sort(labels(20_000, classes)), np.full(20, 1000))
    assert found["adjacent"] == pytest.approx(1 - (classes - 1) / 19_999)
    assert found["adjacent_ratio"] > 1.9
    assert found["entropy_ratio"] < 0.8
    assert found["mixed"] is False


def test_shards_of_few_classes_show_even_when_no_neighbours_are_alike():
    shards = [np.tile([2 * n, 2 * n + 1], 500) for n in range(5)]
    found = mixing(np.concatenate(shards), np.full(5, 1000))
    assert found["adjacent_ratio"] < 0.1
    assert found["entropy"] == 1
    assert found["mixed"] is False


def test_runs_inside_well_mixed_shards_show():
    one = np.sort(labels(1000, 10))
    found = mixing(np.concatenate([one] * 10), np.full(10, 1000))
    assert found["entropy_ratio"] > 0.99
    assert found["adjacent_ratio"] > 9
    assert found["mixed"] is False


def test_the_numbers_are_those_of_a_hand_count():
    found = mixing(np.array([0, 0, 1, 1, 0, 2]), np.array([4, 2]))
    assert found["entropy"] == pytest.approx(1.0)  # half and half; half and half
    assert found["adjacent"] == pytest.approx(2 / 5)
    assert found["adjacent_random"] == pytest.approx((3 * 2 + 2 * 1) / (6 * 5))


def test_mean_and_noise_of_chance_are_those_of_many_permutations():
    few = np.repeat(np.arange(6), [200, 100, 50, 30, 15, 5])
    random = np.random.default_rng(1)
    ratios = []
    for _ in range(400):
        found = mixing(random.permutation(few), np.full(4, 100))
        ratios.append(found["adjacent_ratio"])
    assert np.mean(ratios) == pytest.approx(1, abs=4 * found["adjacent_noise"] / 20)
    assert np.std(ratios) == pytest.approx(found["adjacent_noise"], rel=0.15)


def test_small_mixed_splits_are_not_called_sorted():
    assert all(mixing(labels(40, 3, seed), np.full(4, 10))["mixed"] for seed in range(200))


def test_without_labels_there_is_nothing_to_mix():
    assert mixing(np.full(10, -1), np.array([5, 5])) is None
    assert mixing(np.array([], np.int32), np.array([], np.int64)) is None
    assert mixing(np.array([0, -1, 0, -1]), np.array([2, 2]))["entropy"] == 1


def test_one_class_and_one_sample_are_as_mixed_as_can_be():
    for some in ([7] * 100, [3]):
        found = mixing(np.array(some), np.array([len(some)]))
        assert (found["entropy_ratio"], found["adjacent_ratio"], found["mixed"]) == (1, 1, True)


def test_counts_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="10 labels in shards of 9 samples"):
        mixing(np.zeros(10, int), np.array([4, 5]))


def test_the_same_labels_give_the_same_numbers_and_another_seed_moves_only_chance():
    some, counts = labels(5000, 7), np.full(5, 1000)
    assert mixing(some, counts) == mixing(some, counts)
    assert mixing(some, counts, seed=1)["entropy_random"] != mixing(some, counts)["entropy_random"]
    assert mixing(some, counts, seed=1)["entropy"] == mixing(some, counts)["entropy"]


def test_what_is_sharded_is_mixed_within_one_percent_of_random_and_noise(digits):
    dataset = index.load(digits)
    for name in dataset.info["splits"]:
        split = dataset.split(name)
        found = mixing(split.label, split.counts)
        assert found["mixed"], name
        assert abs(found["entropy_ratio"] - 1) < 0.01
        assert abs(found["adjacent_ratio"] - 1) < 0.01 + 4 * found["adjacent_noise"]
