import dataclasses
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics.pairwise import polynomial_kernel

from pipeline.evaluation.kid import KidDifference, features, kid, kid_difference
from pipeline.nightly.gate import GateConfig, decide_gan


def normal(seed: int, n: int, d: int = 8, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (n, d))


# ---- one number --------------------------------------------------------------------------------------------------


def test_it_is_the_sum_over_pairs_written_out():
    real, fake = normal(0, 4, 3), normal(1, 5, 3, 0.5)

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [
        np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (real, fake)
    ]
    between = np.mean([kernel(x, y) for x in real for y in fake])
    assert kid(real, fake) == pytest.approx(sum(within) - 2 * between)


def test_it_agrees_with_scikit_learns_kernel_where_rows_go_in_parts():
    real, fake = normal(0, 2100), normal(1, 1500, mean=0.2)
    same, other = polynomial_kernel(real), polynomial_kernel(fake)
    np.fill_diagonal(same, 0)
    np.fill_diagonal(other, 0)
    expected = same.sum() / (2100 * 2099) + other.sum() / (1500 * 1499) - 2 * polynomial_kernel(real, fake).mean()
    assert kid(real, fake) == pytest.approx(expected, rel=1e-9)


def test_it_is_zero_on_average_where_both_are_alike_and_falls_below():
    values = np.array([kid(normal(2 * seed, 10), normal(2 * seed + 1, 10)) for seed in range(600)])
    assert abs(values.mean()) < 3.5 * values.std() / np.sqrt(600)
    assert (values < 0).mean() > 0.3


def test_a_small_sample_is_no_worse_on_average_than_a_large_one():
    exact = np.mean([kid(normal(seed, 400), normal(seed + 999, 400, mean=0.5)) for seed in range(10)])
    small = [kid(normal(seed, 8), normal(seed + 9999, 8, mean=0.5)) for seed in range(1500)]
    assert abs(np.mean(small) - exact) < 4 * np.std(small) / np.sqrt(1500)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 30), m=st.integers(2, 30))
def test_sides_and_orders_do_not_matter(seed, n, m):
    real, fake, random = normal(seed, n), normal(seed + 1, m), np.random.default_rng(seed)
    assert kid(real, fake) == pytest.approx(kid(fake, real), abs=1e-9)
    assert kid(random.permutation(real), fake) == pytest.approx(kid(real, fake), abs=1e-9)


@pytest.mark.parametrize(
    ("real", "fake", "says"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), r"real is float64 of shape \(1, 3\)"),
        (np.ones((5, 3)), np.ones(5), r"fake is float64 of shape \(5,\)"),
        (np.ones((5, 3)), np.ones((5, 3), int), "fake is int64"),
        (np.ones((5, 3)), np.ones((5, 4)), "'fake': 4"),
        (np.ones((5, 3)), np.full((5, 3), np.nan), r"fake\[0\] is not finite"),
        (np.ones((5, 0)), np.ones((5, 0)), r"shape \(5, 0\)"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_name(real, fake, says):
    with pytest.raises(ValueError, match=says):
        kid(real, fake)


# ---- two generators ----------------------------------------------------------------------------------------------


def test_blocks_are_disjoint_dealt_in_turn_and_paired():
    real, champion, challenger = normal(0, 43), normal(1, 61, mean=0.5), normal(2, 61, mean=0.2)
    against = kid_difference(real, champion, challenger, blocks=4)
    assert against.blocks == 4
    for block in range(4):
        rows = real[:40][block::4]
        assert against.champion_blocks[block] == pytest.approx(kid(rows, champion[:60][block::4]))
        assert against.challenger_blocks[block] == pytest.approx(kid(rows, challenger[:60][block::4]))


def test_bounds_and_p_values_are_students_on_the_blocks():
    champion, challenger = (0.5, 0.7, 0.4, 0.9), (0.4, 0.5, 0.45, 0.7)
    against = KidDifference(challenger, champion)
    test = stats.ttest_rel(challenger, champion, alternative="less")
    assert against.p_value() == pytest.approx(test.pvalue)
    assert against.difference == pytest.approx(-0.1125)
    assert against.upper(0.05) == pytest.approx(test.confidence_interval(0.95).high)
    assert against.interval == pytest.approx(stats.ttest_rel(challenger, champion).confidence_interval(0.95))
    slack = stats.ttest_rel(challenger, 1.2 * np.array(champion), alternative="less")
    assert against.p_value(0.2) == pytest.approx(slack.pvalue)
    assert against.upper(0.05, 0.2) == pytest.approx(slack.confidence_interval(0.95).high)


def test_swapped_generators_mirror_the_difference():
    real, one, other = normal(0, 80), normal(1, 80, mean=0.3), normal(2, 80, mean=0.1)
    there, back = kid_difference(real, one, other), kid_difference(real, other, one)
    assert there.difference == pytest.approx(-back.difference)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert there.p_value() == pytest.approx(1 - back.p_value())


def test_the_same_generator_twice_is_no_better():
    real, fake = normal(0, 80), normal(1, 80, mean=0.3)
    against = kid_difference(real, fake, fake)
    assert (against.difference, against.p_value(), against.upper(0.05)) == (0, 1, 0)
    assert not decide_gan(GateConfig(), 1, against).promote


def test_equal_generators_are_seldom_called_better_and_a_better_one_often():
    equal, better = [], []
    for seed in range(0, 1200, 3):
        real, champion, challenger = (normal(seed + n, 160, 4) for n in range(3))
        equal.append(kid_difference(real, champion + 0.4, challenger + 0.4, 16).p_value())
        better.append(kid_difference(real, champion + 0.9, challenger + 0.1, 16).upper(0.0025) < 0)
    assert stats.binomtest(int((np.array(equal) < 0.05).sum()), 400, 0.05).pvalue > 0.01
    assert np.mean(better) > 0.9


@pytest.mark.parametrize(
    ("sizes", "blocks", "says"),
    [
        ((40, 40, 39), 4, "40 images of the champion, 39 of the challenger"),
        ((40, 40, 40), 21, "blocks is 21 for 40 images"),
        ((7, 40, 40), 4, "blocks is 4 for 7 images"),
        ((40, 40, 40), 1, "blocks is 1"),
    ],
)
def test_numbers_of_images_that_make_no_blocks_are_refused(sizes, blocks, says):
    with pytest.raises(ValueError, match=says):
        kid_difference(*(normal(seed, n) for seed, n in enumerate(sizes)), blocks=blocks)


def test_a_difference_checks_itself():
    with pytest.raises(ValueError, match="3 blocks of the challenger, 2 of the champion"):
        KidDifference((1.0, 2.0, 3.0), (1.0, 2.0))
    with pytest.raises(ValueError, match="1 blocks"):
        KidDifference((1.0,))
    with pytest.raises(ValueError, match="not all finite"):
        KidDifference((1.0, np.nan))
    with pytest.raises(ValueError, match="no champion"):
        KidDifference((1.0, 2.0)).upper(0.05)
    with pytest.raises(ValueError, match=r"alpha is 0\.7"):
        KidDifference((1.0, 2.0), (1.0, 2.0)).upper(0.7)


# ---- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32, 28, 64, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_have_one_width_whatever_the_size_and_are_the_same_each_time(side, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, channels), dtype=np.uint8)
    rows = features(images)
    assert rows.shape == (5, 16 * 16 * channels * 3)
    assert rows.dtype == np.float32
    assert (rows == features(images)).all()
    assert rows[3:] == pytest.approx(features(images[3:]), abs=1e-6)


@pytest.mark.parametrize("side", [32, 48, 28, 21])
def test_their_first_third_is_the_image_made_small_by_area(side):
    image = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    small = cv2.resize(image.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA) / 127.5 - 1
    assert features(image[None, :, :, None])[0, :256].reshape(16, 16) == pytest.approx(small, abs=1e-4)


def test_a_flat_image_is_smooth_and_stripes_are_rough_in_one_direction():
    flat, stripes = np.full((1, 32, 32, 1), 200, np.uint8), np.zeros((1, 32, 32, 1), np.uint8)
    stripes[:, :, ::2] = 255
    assert features(flat)[0, :256] == pytest.approx(200 / 127.5 - 1, abs=1e-5)
    assert not features(flat)[0, 256:].any()
    assert features(stripes)[0, 256:512] == pytest.approx(8, abs=1e-4)  # full steps, from -1 to 1, four times
    assert not features(stripes)[0, 512:].any()


def test_blurred_images_are_farther_from_real_ones_than_real_ones_are():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 32, 32, 1), dtype=np.uint8)
    blurred = np.stack([cv2.blur(image, (3, 3))[:, :, None] for image in images[100:200]])
    rows, others = features(images), features(blurred)
    assert kid(rows[:100], others) > 10 * abs(kid(rows[:100], rows[200:]))


@pytest.mark.parametrize("shape", [(5, 8, 9, 1), (5, 8, 8), (5, 1, 1, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pass uint8 \(n, s, s, c\)"):
        features(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="images are float32"):
        features(np.zeros((5, 8, 8, 1), np.float32))


# ---- the gate ----------------------------------------------------------------------------------------------------

BASE = (0.50, 0.52, 0.48, 0.51, 0.49)


def against(shift: float, champion=BASE) -> KidDifference:
    """A challenger farther by `shift`, give or take 0.01."""
    return KidDifference(tuple(k + shift + 0.01 * (-1) ** n for n, k in enumerate(champion)), champion)


def test_a_nearer_generator_is_promoted_and_the_reason_says_by_what():
    decision = decide_gan(GateConfig(), 1, against(-0.2))
    assert (decision.promote, decision.rule) == (True, "superior")
    assert decision.reason.startswith("KID 0.302 against 0.5, 5 blocks: p = ")
    assert [check["name"] for check in decision.checks] == ["KID", "size", "latency", "better than the champion"]
    assert json.loads(json.dumps(dataclasses.asdict(decision), allow_nan=False)) == dataclasses.asdict(decision)


def test_one_no_nearer_is_held_and_a_late_look_asks_for_more():
    assert not decide_gan(GateConfig(), 1, against(0.0)).promote
    near = against(-0.025)
    assert decide_gan(GateConfig(alpha=0.02), 1, near).promote
    assert not decide_gan(GateConfig(alpha=0.02), 3650, near).promote


@pytest.mark.parametrize(
    ("config", "costs", "name"),
    [
        ({"kid_ceiling": 0.25}, {}, "KID"),
        ({"max_mb": 3}, {"size_mb": 4}, "size"),
        ({"max_latency_ms": 3}, {}, "latency"),
    ],
)
def test_each_floor_holds_a_nearer_generator_for_its_own_reason(config, costs, name):
    for comparison in (against(-0.2), KidDifference((0.3, 0.31))):
        decision = decide_gan(GateConfig(**config), 1, comparison, **costs)
        assert not decision.promote
        assert [check["name"] for check in decision.checks if not check["passed"]] == [name]
        assert decision.reason.startswith(f"short of its floors: {name} ")


def test_the_first_generator_is_promoted_on_floors_alone():
    alone = kid_difference(normal(0, 80), None, normal(1, 80))
    assert alone.champion is None
    decision = decide_gan(GateConfig(kid_ceiling=1), 1, alone)
    assert (decision.promote, decision.rule) == (True, "floors")
    assert decision.reason.startswith("the first model: no champion")


def test_the_fresh_rule_takes_a_generator_within_its_share_of_the_champions_kid():
    config = GateConfig(rule="fresh", margin=0.1)
    assert not decide_gan(GateConfig(margin=0.1), 1, against(0.02)).promote
    taken = decide_gan(config, 1, against(0.02))
    assert (taken.promote, taken.rule) == (True, "fresh")
    assert not decide_gan(config, 1, against(0.05)).promote
    assert decide_gan(config, 1, against(-0.2)).rule == "superior"


def test_a_generator_too_far_from_the_anchor_is_held():
    config = GateConfig(rule="fresh", margin=0.1)
    assert decide_gan(config, 1, against(0.02), anchor=against(0.02)).promote
    decision = decide_gan(config, 1, against(0.02), anchor=against(0.06))
    assert not decision.promote
    assert [check["passed"] for check in decision.checks[-2:]] == [True, False]
