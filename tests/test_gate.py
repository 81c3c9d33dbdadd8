import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial, norm

from jobs.bench.gate import around, limits, mcnemar, promoted
from pipeline.evaluation import paired
from pipeline.evaluation.paired import compare, critical_wins, p_above, tango
from pipeline.nightly.gate import GateConfig, Scores, alpha_at, decide

CLASSES = ["cat", "dog", "owl"]
passing = functools.cache(lambda images, share: limits(images, around(images, share), 0.0025))


def answers(n: int, wins: int, losses: int, both_wrong: int = 0):
    """Labels, champion's and challenger's answers with these counts, classes in turn."""
    labels = np.arange(n) % 3
    champion, challenger = labels.copy(), labels.copy()
    champion[:wins] += 1
    challenger[wins : wins + losses] += 1
    for answer in (champion, challenger):
        answer[n - both_wrong :] += 1
    return labels, champion % 3, challenger % 3


def scores(n=2000, wins=0, losses=0, **more) -> Scores:
    labels, champion, challenger = answers(n, wins, losses)
    return Scores(
        **{"champion": champion, "anchor": None, "classes": CLASSES} | more, labels=labels, challenger=challenger
    )


def passed(decision) -> dict:
    return {check["name"]: check["passed"] for check in decision.checks}


# ---- the comparison ----------------------------------------------------------------------------------------------


def test_the_statistic_and_its_bounds_are_those_of_tango_1998():
    # Table 1 of the paper: 44 patients, 43 with success under both disinfections, one under the standard alone.
    assert tango(44, 0, 1, -0.1) == pytest.approx(1.709, abs=5e-4)
    assert norm.sf(tango(44, 0, 1, -0.1)) == pytest.approx(0.044, abs=5e-4)
    low, high = paired._tango_bound(44, 0, 1, norm.isf(0.05)), -paired._tango_bound(44, 1, 0, norm.isf(0.05))
    assert (low, high) == pytest.approx((-0.096, 0.037), abs=5e-4)


def test_the_airway_example_gives_what_fagerland_lydersen_and_laake_print():
    # Bentur et al. 2009: 21 children, 7 discordant one way and 1 the other. Exact unconditional, two-sided: 0.035.
    assert 2 * p_above(21, 7, 1, 0.0) == pytest.approx(0.035, abs=5e-4)
    low, high = paired._tango_bound(21, 1, 7, norm.isf(0.025)), -paired._tango_bound(21, 7, 1, norm.isf(0.025))
    assert (low, high) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_at_zero_the_statistic_is_mcnemars():
    assert tango(1000, 30, 12, 0.0) == pytest.approx(18 / np.sqrt(42))
    assert tango(1000, 0, 0, 0.0) == 0


@pytest.mark.parametrize("difference", [0.0, -0.05, 0.15, -0.4])
@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_no_pair_of_models_within_the_null_is_called_better_more_often_than_alpha(n, difference):
    pairs = [(wins, losses) for wins in range(n + 1) for losses in range(n + 1 - wins)]
    values = np.array([p_above(n, *pair, difference) for pair in pairs])
    counts = np.array([(*pair, n - sum(pair)) for pair in pairs])
    for better in np.linspace(0, 1, 26):
        for gap in (difference, difference - 0.03, difference - 0.2):
            worse = better - gap
            if not 0 <= worse <= 1 - better:
                continue
            chances = multinomial.pmf(counts, n, [better, worse, 1 - better - worse])
            for alpha in (0.0025, 0.05, 0.2):
                assert chances[values <= alpha].sum() <= alpha + 1e-12


@pytest.mark.parametrize(
    ("n", "wins", "losses", "difference"), [(12, 5, 1, -0.1), (8, 5, 0, -0.1), (8, 5, 0, 0.0), (20, 11, 3, 0.1)]
)
def test_the_p_value_is_the_sum_over_all_pairs_as_extreme_at_the_worst_likely_share(n, wins, losses, difference):
    pairs = np.array([(w, l, n - w - l) for w in range(n + 1) for l in range(n + 1 - w)])
    extreme = tango(n, pairs[:, 0], pairs[:, 1], difference) >= tango(n, wins, losses, difference) - 1e-9
    interval = binomtest(wins + losses, n).proportion_ci(1 - 1e-9)  # Clopper and Pearson's
    shares = np.linspace(max(interval.low, abs(difference)), interval.high, 4001)
    chances = np.stack([(shares + difference) / 2, (shares - difference) / 2, 1 - shares], 1)
    sums = multinomial.pmf(pairs[extreme][:, None], n, np.clip(chances, 0, 1))
    assert p_above(n, wins, losses, difference) == pytest.approx(sums.sum(0).max() + 1e-9, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_champion_and_challenger_swapped_mirror_the_comparison(data):
    n = data.draw(st.integers(1, 60))
    labels, champion, challenger = (
        np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))) for _ in range(3)
    )
    one, other = compare(labels, champion, challenger), compare(labels, challenger, champion)
    assert (one.wins, one.losses, one.difference) == (other.losses, other.wins, -other.difference)
    assert (one.champion_accuracy, one.challenger_accuracy) == (other.challenger_accuracy, other.champion_accuracy)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.interval[0] <= one.difference <= one.interval[1]
    assert one.p_value + other.p_value > 0.999


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 300), classes=st.integers(1, 5))
def test_the_order_of_the_images_does_not_matter(seed, n, classes):
    random = np.random.default_rng(seed)
    three, order = random.integers(0, classes, (3, n)), random.permutation(n)
    assert compare(*three) == compare(*three[:, order])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 500), seed=st.integers(0, 2**32), alpha=st.sampled_from([0.0025, 0.05, 0.3]))
def test_the_lower_bound_is_where_the_test_turns(n, seed, alpha):
    random = np.random.default_rng(seed)
    wins, losses, _ = random.multinomial(n, random.dirichlet([1, 1, 3])).tolist()
    against = compare(*answers(n, wins, losses))
    lower = against.lower(alpha)
    assert -1 <= lower <= max(against.difference, -1 + 1e-12)
    # Within an image's width p may cross alpha more than once.
    assert lower == -1 or against.p_above(max(lower - 1.5 / n, -1)) <= alpha
    assert against.p_above(min(lower + 1.5 / n, 1)) > alpha


def test_the_lower_bound_is_close_to_tangos_where_counts_are_large():
    against = compare(*answers(10_000, 300, 200))
    assert against.lower(0.025) == pytest.approx(paired._tango_bound(10_000, 300, 200, norm.isf(0.025)), abs=5e-5)
    assert against.interval == pytest.approx((against.lower(0.025), 0.01439), abs=2e-4)
    assert against.lower(0.0025) < against.lower(0.025) < against.difference


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (1, 0, 0.5), (0, 1, 1.0)])
def test_one_image_proves_nothing(wins, losses, p):
    against = compare(*answers(1, wins, losses))
    assert against.p_value == pytest.approx(p)
    assert against.lower(0.05) < 0
    assert against.detectable(0.05) is None


def test_the_interval_is_the_bootstraps_of_the_images_one_by_one():
    kinds = np.repeat([1, -1, 0], [60, 30, 410])
    means = np.random.default_rng(7).choice(kinds, (4000, 500)).mean(1)
    assert compare(*answers(500, 60, 30)).interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.004)


def test_models_that_agree_on_every_image_are_no_better_and_have_no_interval():
    against = compare(*answers(500, 0, 0, both_wrong=100))
    assert (against.p_value, against.interval, against.difference) == (1.0, (0.0, 0.0), 0.0)
    assert against.champion_accuracy == against.challenger_accuracy == 0.8
    assert -0.03 < against.lower(0.05) < 0


def test_a_challenger_right_where_all_was_wrong_has_the_greatest_difference():
    against = compare(*answers(300, 300, 0))
    assert against.difference == 1
    assert against.p_value == pytest.approx(1e-9)
    assert 0.95 < against.lower(0.05) < 1
    assert compare(*answers(300, 0, 300)).lower(0.05) == -1


def test_the_detectable_difference_is_found_in_eighty_percent_of_nights():
    against = compare(*answers(10_000, 255, 245))
    gap = against.detectable(0.0025)
    share = (1 + gap / 0.05) / 2
    assert binom.sf(critical_wins(10_000, 500, 0.0025) - 1, 500, share) == pytest.approx(0.8)
    assert against.detectable(0.0025, power=0.95) > gap > against.detectable(0.05)


def test_the_fewest_wins_that_pass_are_the_fewest():
    cases = [(n, n // 12, alpha, gap) for n in range(30, 400, 30) for alpha, gap in ((0.0025, 0.0), (0.05, -0.02))]
    cases += [(277, 113, 1e-5, 0.0), (57, 6, 1e-5, -0.2)]  # where the normal approximation asks for too many
    for n, discordant, alpha, difference in cases:
        least = critical_wins(n, discordant, alpha, difference)
        assert least == discordant + 1 or p_above(n, least, discordant - least, difference) <= alpha
        assert p_above(n, least - 1, discordant - least + 1, difference) > alpha


@pytest.mark.parametrize(
    ("three", "says"),
    [
        (([0, 1], [0], [0, 1]), "'champion': 1"),
        (([], [], []), r"labels is float64 of shape \(0,\)"),
        (([0, 1], [0, 1], [0.0, 1.0]), "challenger is float64"),
        (([[0]], [[0]], [[0]]), r"shape \(1, 1\)"),
    ],
)
def test_answers_that_do_not_fit_are_refused_by_name(three, says):
    with pytest.raises(ValueError, match=says):
        compare(*map(np.array, three))


@pytest.mark.parametrize("alpha", [0, 0.5, -1, np.nan])
def test_a_level_that_is_no_level_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        compare(*answers(10, 1, 0)).lower(alpha)


# ---- the bars, summed over all outcomes --------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "share"), [(10_000, 0.05), (10_000, 0.02), (1000, 0.05), (1000, 0.02), (1000, 0.2)])
def test_equal_models_are_promoted_in_at_most_a_quarter_percent_of_nights(images, share):
    counts = around(images, share)
    assert 0.0022 < promoted(images, share, 0.0, counts, passing(images, share)) <= 0.0025


def test_a_model_better_by_a_point_is_promoted_in_ninety_five_percent_where_mcnemars_exact_test_misses_it():
    counts = around(10_000, 0.05)
    assert promoted(10_000, 0.05, 0.01, counts, passing(10_000, 0.05)) >= 0.9535
    exact = mcnemar(counts, 0.0025, mid=False)
    assert 0.949 < promoted(10_000, 0.05, 0.01, counts, exact) < 0.95
    for count, fewest in zip(counts[::40].tolist(), exact[::40].tolist(), strict=True):
        assert binomtest(fewest, count, 0.5, "greater").pvalue <= 0.0025
        assert binomtest(fewest - 1, count, 0.5, "greater").pvalue > 0.0025


def test_the_mid_p_variant_passes_alpha_somewhere():
    share = 0.2983858711278301
    counts = around(10_000, share)
    assert promoted(10_000, share, 0.0, counts, mcnemar(counts, 0.0025, mid=True)) > 0.0025


def test_the_fresh_rule_promotes_a_model_worse_by_the_margin_in_at_most_five_percent_of_nights():
    counts = around(2000, 0.05)
    fewest = limits(2000, counts, 0.05, -0.01)
    assert 0.045 < promoted(2000, 0.05, -0.01, counts, fewest) <= 0.05
    assert promoted(2000, 0.05, 0.01, counts, fewest) > 0.98


def test_simulated_nights_agree_with_the_sums():
    random, times = np.random.default_rng(0), 0
    counts = around(500, 0.1)
    expected = promoted(500, 0.1, 0.04, counts, limits(500, counts, 0.05))
    for _ in range(300):
        kind = random.choice(4, 500, p=[0.07, 0.03, 0.8, 0.1])  # win, loss, both right, both wrong
        labels = np.zeros(500, int)
        challenger, champion = (kind == 1) | (kind == 3), (kind == 0) | (kind == 3)
        times += compare(labels, champion.astype(int), challenger.astype(int)).p_value <= 0.05
    assert abs(times / 300 - expected) < 4 * np.sqrt(expected * (1 - expected) / 300)


# ---- the decision ------------------------------------------------------------------------------------------------


def test_a_better_challenger_is_promoted_and_the_reason_says_by_what():
    decision = decide(GateConfig(), 1, scores(wins=43, losses=5))
    assert decision.promote
    assert decision.rule == "superior"
    assert decision.reason == "0.9975 against 0.9785 on 2,000 images: 43 wins, 5 losses, p = 1e-08 below 0.0025"
    assert all(passed(decision).values())
    assert list(passed(decision)) == ["accuracy", "recall of each class", "size", "latency", "better than the champion"]


def test_one_no_better_is_held_for_that_reason_alone():
    decision = decide(GateConfig(), 1, scores(wins=20, losses=20))
    assert not decision.promote
    assert [name for name, good in passed(decision).items() if not good] == ["better than the champion"]
    assert "20 wins, 20 losses, p = 0.5" in decision.reason
    assert "not below 0.0025" in decision.reason


FLOORS = [
    ({"floor": 0.999}, {}, "accuracy", "0.9975 is below 0.999"),
    ({"class_floor": 0.998}, {}, "recall of each class", "below 0.998 for"),
    ({"max_mb": 3}, {"size_mb": 3.5}, "size", "3.5 MB above 3 MB"),
    ({"max_mb": 3}, {}, "size", "not known"),
    ({"max_mb": 3}, {"size_mb": float("nan")}, "size", "not known"),
    ({"max_latency_ms": 2}, {"latency_ms": 2.5}, "latency", "2.5 ms above 2 ms"),
    ({"max_latency_ms": 2}, {}, "latency", "not known"),
]


@pytest.mark.parametrize(("config", "night", "name", "says"), FLOORS)
def test_each_floor_holds_a_better_challenger_for_its_own_reason(config, night, name, says):
    decision = decide(GateConfig(**config), 1, scores(wins=43, losses=5, **night))
    assert not decision.promote
    assert [check for check, good in passed(decision).items() if not good] == [name]
    assert decision.reason.startswith(f"short of its floors: {name} ")
    assert says in decision.reason
    assert not decide(GateConfig(**config), 1, scores(wins=43, losses=5, champion=None, **night)).promote


def test_what_just_reaches_its_limit_passes():
    config = GateConfig(floor=0.9975, class_floor=664 / 667, max_mb=3, max_latency_ms=2)
    decision = decide(config, 1, scores(wins=43, losses=5, size_mb=3.0, latency_ms=2.0))
    assert decision.promote
    assert decision.checks[2]["value"] == decision.checks[2]["limit"] == 3


def test_the_worst_classes_are_named_first_and_not_all():
    classes = [f"c{n}" for n in range(40)]
    labels = np.repeat(np.arange(40), 50)
    challenger = labels.copy()
    for worst, wrong in ((7, 30), (3, 20), (5, 10), (1, 9), (2, 8), (4, 7), (6, 6)):
        challenger[worst * 50 : worst * 50 + wrong] = 99
    decision = decide(GateConfig(class_floor=0.9), 1, Scores(labels, challenger, None, None, classes))
    assert "c7 0.4000, c3 0.6000, c5 0.8000, c1 0.8200, c2 0.8400 and 2 more" in decision.reason
    assert decision.checks[1]["value"] == 0.4


def test_a_class_without_images_in_the_holdout_is_not_asked_about():
    decision = decide(GateConfig(class_floor=1.0), 1, Scores(np.zeros(5, int), np.zeros(5, int), None, None, CLASSES))
    assert decision.promote
    assert decision.numbers["recall"] == {"cat": 1.0}


def test_all_failures_are_told_and_every_check_is_made_after_the_first():
    config = GateConfig(floor=1, max_mb=1, max_latency_ms=1, rule="fresh")
    decision = decide(config, 1, scores(losses=50, size_mb=2, latency_ms=2))
    assert len(decision.checks) == 6
    assert not any(good for name, good in passed(decision).items() if not name.startswith("recall"))
    assert decision.reason.count(";") == 2


def test_the_first_model_is_promoted_on_floors_alone():
    decision = decide(GateConfig(floor=0.9), 1, scores(losses=5, champion=None))
    assert decision.promote
    assert decision.rule == "floors"
    assert decision.reason.startswith("the first model: no champion to compare with")
    assert "better than the champion" not in passed(decision)


def test_models_that_know_different_classes_compare():
    labels, champion, challenger = answers(900, 60, 5)
    challenger[-20:] = 17
    decision = decide(GateConfig(), 1, Scores(labels, challenger, champion, None, CLASSES))
    assert (decision.numbers["wins"], decision.numbers["losses"], decision.promote) == (60, 25, True)


@pytest.mark.parametrize("rule", ["superior", "fresh"])
def test_a_decision_is_json(rule):
    _, champion, _ = answers(2000, 9, 9)
    for champ, anchor in ((champion, champion), (champion, None), (None, None)):
        night = scores(wins=9, losses=9, champion=champ, anchor=anchor, size_mb=1.5)
        decision = dataclasses.asdict(decide(GateConfig(rule=rule), 1, night))
        assert json.loads(json.dumps(decision, allow_nan=False)) == decision


# ---- the fresh rule ----------------------------------------------------------------------------------------------


def test_the_fresh_rule_takes_what_is_no_worse_than_the_margin_and_nothing_else():
    config = GateConfig(rule="fresh", margin=0.01)
    assert not decide(GateConfig(margin=0.01), 1, scores(wins=20, losses=20)).promote
    taken = decide(config, 1, scores(wins=20, losses=20))
    assert (taken.promote, taken.rule) == (True, "fresh")
    assert not decide(config, 1, scores(wins=20, losses=35)).promote
    better = decide(config, 1, scores(wins=43, losses=5))
    assert (better.promote, better.rule) == (True, "superior")
    assert not decide(GateConfig(rule="fresh", margin=0.01, floor=1), 1, scores(wins=20, losses=20)).promote


def test_the_fresh_rule_tests_at_its_own_level():
    night = scores(wins=20, losses=24)
    p = compare(night.labels, night.champion, night.challenger).p_above(-0.01)
    for level, promote in ((p * 1.001, True), (p * 0.999, False)):
        assert decide(GateConfig(rule="fresh", margin=0.01, fresh_alpha=level), 1, night).promote is promote


def test_a_challenger_too_far_below_the_anchor_is_held_though_the_champion_is_no_better():
    labels, champion, challenger = answers(2000, 20, 20)
    night = Scores(labels, challenger, champion, labels, CLASSES)
    decision = decide(GateConfig(rule="fresh", margin=0.01), 1, night)
    assert not decision.promote
    assert passed(decision)["not worse than the champion by the margin"]
    assert not passed(decision)["not worse than the anchor by the margin"]
    assert decision.numbers["anchor"]["losses"] == 20


@pytest.mark.parametrize(("anchored", "most"), [(True, 0.02), (False, 1.0)])
def test_the_anchor_stops_creep(anchored, most):
    labels, config = np.zeros(2000, int), GateConfig(rule="fresh", margin=0.02)
    anchor = champion = labels
    promotions = 0
    for night in range(1, 16):
        challenger = champion.copy()
        challenger[np.flatnonzero(champion == 0)[:10]] = 1  # worse by half a point than the champion of the day
        decision = decide(config, night, Scores(labels, challenger, champion, anchor if anchored else None, ["cat"]))
        assert decision.rule == "fresh"
        if decision.promote:
            champion, promotions = challenger, promotions + 1
    lost = float((champion != labels).mean())
    assert 0 < lost <= most
    assert anchored or promotions == 15


# ---- looks and settings ------------------------------------------------------------------------------------------


def test_alpha_holds_for_its_looks_and_then_falls_so_that_all_looks_ever_stay_below_twice():
    config = GateConfig(alpha=0.01, looks=30)
    assert [alpha_at(config, look) for look in (1, 30, 60, 300)] == pytest.approx([0.01, 0.01, 0.0025, 0.0001])
    life = sum(alpha_at(config, look) for look in range(1, 100_000))
    assert 1.9 * 0.01 * 30 < life < 2 * 0.01 * 30


def test_a_late_look_asks_for_more():
    night = scores(wins=40, losses=17)
    early, late = decide(GateConfig(), 365, night), decide(GateConfig(), 730, night)
    assert (early.promote, late.promote) == (True, False)
    assert late.numbers["alpha"] == 0.0025 / 4
    assert late.checks[-1]["limit"] == 0.0025 / 4


@pytest.mark.parametrize("look", [0, -1, 1.5])
def test_a_look_is_a_whole_number_from_one(look):
    with pytest.raises(ValueError, match="look is"):
        alpha_at(GateConfig(), look)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"floor": 95}, "floor is 95"),
        ({"class_floor": -0.1}, "class_floor is -0.1"),
        ({"max_mb": -1}, "max_mb is -1"),
        ({"max_latency_ms": float("nan")}, "max_latency_ms is nan"),
        ({"kid_ceiling": float("inf")}, "kid_ceiling is inf"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"fresh_alpha": 1e-9}, "fresh_alpha is 1e-09"),
        ({"margin": 1}, "margin is 1"),
        ({"margin": -0.005}, "margin is -0.005"),
        ({"looks": 0}, "looks is 0"),
        ({"rule": "superor"}, "did you mean 'superior'"),
        ({"rule": "always"}, "there are superior and fresh"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(setting, says):
    with pytest.raises(ValueError, match=says):
        GateConfig(**setting)


def test_scores_that_do_not_fit_are_refused_by_name():
    labels = np.array([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels\[2\] is 2, outside the 2 classes"):
        Scores(labels, labels, None, None, ["a", "b"])
    with pytest.raises(ValueError, match="champion has 2 answers to 3 labels"):
        Scores(labels, labels, labels[:2], None, CLASSES)
    with pytest.raises(ValueError, match="anchor without a champion"):
        Scores(labels, labels, None, labels, CLASSES)
