"""May the challenger take the champion's place? Arrays and numbers in, a decision with its reasons out.

    decide(config, look, scores)          -> Decision, of classifiers that answered for one frozen holdout
    decide_gan(config, look, comparison)  -> Decision, of generators, by KID

Floors first (accuracy, recall of each class, size, latency), then the comparison, by one of two rules:

superior  the challenger is better, and luck would look so in at most `alpha` of nights
fresh     or, asked for in words: it is worse by less than `margin`, and it knows newer images. One such night is
          harmless and a hundred are not, each a little worse than the last. So the same is asked against the anchor,
          the last champion that won by floors or by being better: it stands still while fresh models come and go. A
          year in which every night's model is truly worse by 0.1 point than the champion of the day then costs about
          two margins, one point, where nothing but the champion asked would cost twenty (`millstream bench gate`).
"""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.evaluation.kid import KidDifference
from pipeline.evaluation.paired import Comparison, compare, integers

RULES = ("superior", "fresh")
_NAMED = 5  # classes, in one line


@dataclass(frozen=True)
class GateConfig:
    """What a challenger must reach to become champion."""

    floor: float = 0.0
    """Accuracy on the holdout that the challenger must reach."""
    class_floor: float = 0.0
    """Recall that it must reach for each class of the holdout."""
    max_mb: float = 0
    """Size of its weights, in MB; 0: no limit."""
    max_latency_ms: float = 0
    """Time for one image, in ms; 0: no limit."""
    alpha: float = 0.0025
    """Chance a night of promoting a model that is no better."""
    looks: int = 365
    """Nights that one holdout serves at that alpha; later ones get less."""
    rule: str = "superior"
    """superior: it must be better. fresh: it may be worse by less than the margin, being newer."""
    margin: float = 0.005
    """With fresh: by how much it may be worse, as accuracy; for GANs as a share of the champion's KID."""
    fresh_alpha: float = 0.05
    """With fresh: chance a night of promoting a model that is worse by the margin."""
    kid_ceiling: float = 0
    """For GANs: KID that it must not pass; 0: no limit."""

    def __post_init__(self):
        for name in ("floor", "class_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a share from 0 to 1, such as 0.95")
        for name in ("max_mb", "max_latency_ms", "kid_ceiling"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a limit above 0, or 0 for none")
        for name in ("alpha", "fresh_alpha"):
            # Below 1e-8 the p-values, which end at 1e-9, would leave no night to be promoted on.
            if not 1e-8 <= getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: pass a chance from 1e-8 to below 0.5, such as 0.0025"
                )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}: pass a share from 0 to below 1, such as 0.005")
        if self.looks != int(self.looks) or self.looks < 1:
            raise ValueError(f"looks is {self.looks}: pass a whole number of nights, at least 1")
        if self.rule not in RULES:
            near = difflib.get_close_matches(str(self.rule), RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {' and '.join(RULES)}"
            raise ValueError(f"rule is {self.rule!r}: {hint}")


@dataclass(frozen=True)
class Scores:
    """What the gate knows of a night. labels and answers: integers (n,), those of the holdout in one order.

    labels index `classes`; answers may be any integers, as a model may know classes that the holdout does not have.
    champion: None before there is one. anchor: None where the champion is its own, having won by floors or by being
    better. size_mb, latency_ms: None where not measured, which fails a limit that is set.
    """

    labels: np.ndarray
    challenger: np.ndarray
    champion: np.ndarray | None
    anchor: np.ndarray | None
    classes: Sequence[str]
    size_mb: float | None = None
    latency_ms: float | None = None

    def __post_init__(self):
        labels = integers("labels", self.labels)
        outside = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(outside):
            at = outside[0]
            raise ValueError(f"labels[{at}] is {labels[at]}, outside the {len(self.classes)} classes of the holdout")
        for name in ("challenger", "champion", "anchor"):
            if getattr(self, name) is not None and len(integers(name, getattr(self, name))) != len(labels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} answers to {len(labels)} labels: pass one each"
                )
        if self.anchor is not None and self.champion is None:
            raise ValueError("an anchor without a champion: pass the champion's answers too")


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, and why. Plain values throughout: `dataclasses.asdict` of it is JSON.

    rule: what decided: floors (there was no champion), superior or fresh. reason: a line
    for people. checks: [{name, passed, value, limit, detail}], all of them, also after one failed; limit None: none is
    set. Under the fresh rule a promoted challenger may have failed "better than the champion". numbers: what the
    checks come from.
    """

    promote: bool
    rule: str
    reason: str
    checks: list[dict]
    numbers: dict


def alpha_at(config: GateConfig, look: int) -> float:
    """The alpha of the look-th night, from 1, that one frozen holdout is used.

    `alpha` for the first `looks` nights, then alpha * (looks / look) ** 2. Each look may promote a model that is no
    better, and chances add up whatever they have to do with each other (Bonferroni): looks * alpha over the first
    looks, and less than that again over all that ever follow, because the squares converge. So over its whole life a
    holdout makes fewer than 2 * looks * alpha false promotions on average, less than two at the defaults; and yet no
    night has no chance, which a budget that runs out would end in: a model that is much better still passes.

    Looking again at the same images also invites luck: a champion that was promoted on them is, among models equally
    good, one that these images favour. That makes the test conservative, not liberal: the luck is the champion's, the
    next challenger has to beat it, and no challenger has seen the images. (It would be liberal if challengers were
    chosen by their score here before they came to the gate. Choose them by validation images.)

    Raises ValueError for a look that is no whole number from 1.
    """
    if look != int(look) or look < 1:
        raise ValueError(f"look is {look}: pass which night of its holdout this is, from 1")
    return config.alpha * min(1.0, (config.looks / look) ** 2)


def decide(config: GateConfig, look: int, scores: Scores) -> Decision:
    """The decision for a classifier, on the look-th night of the holdout, from 1.

    Without a champion the floors decide alone. Otherwise all floors must hold, and the challenger must be better than
    the champion: `Comparison.p_value` at most `alpha_at`. Under the fresh rule it is enough that its lower bound at
    fresh_alpha, challenger - champion, is above -margin, and the same against the anchor (the module says why).
    fresh_alpha is not lowered by looks: a mistake costs little there, and it is the anchor that keeps many from adding.
    """
    alpha = alpha_at(config, look)
    labels, answers = integers("labels", scores.labels), integers("challenger", scores.challenger)
    accuracy, recalls = float((labels == answers).mean()), _recalls(labels, answers, scores.classes)
    floors = [_at_least("accuracy", accuracy, config.floor), _class_floor(recalls, config.class_floor)]
    floors += _costs(config, scores.size_mb, scores.latency_ms)
    numbers = {"look": int(look), "alpha": alpha, "n": len(labels), "accuracy": accuracy, "recall": recalls}
    numbers |= {"size_mb": scores.size_mb, "latency_ms": scores.latency_ms}
    if scores.champion is None:
        first = f"the first model: no champion to compare with; {accuracy:.4f} on {len(labels):,} images"
        return _decision(floors, None, [], first, numbers)

    against = compare(labels, scores.champion, answers)
    numbers |= _compared(against, alpha)
    better, fresh = _better(against, alpha), []
    if config.rule == "fresh":
        fresh.append(_not_worse("champion", against, config))
        if scores.anchor is not None:
            anchored = compare(labels, scores.anchor, answers)
            fresh.append(_not_worse("anchor", anchored, config))
            numbers["anchor"] = _compared(anchored, alpha)
    head = f"{accuracy:.4f} against {against.champion_accuracy:.4f} on {against.n:,} images: "
    return _decision(floors, better, fresh, head, numbers)


def decide_gan(
    config: GateConfig,
    look: int,
    comparison: KidDifference,
    anchor: KidDifference | None = None,
    size_mb: float | None = None,
    latency_ms: float | None = None,
) -> Decision:
    """The decision for a generator, from its KID against the champion's, both on one frozen set of real images.

    Superior: the upper bound of challenger - champion at `alpha_at` is below 0. Fresh: at fresh_alpha its KID is below
    1 + margin times the champion's, and below the same of the anchor's: `anchor` compares the challenger with it, and
    is None where the champion is its own. Floors are kid_ceiling, size and latency, and decide alone where
    `comparison` has no champion.
    """
    alpha = alpha_at(config, look)
    floors = [_at_most("KID", comparison.challenger, config.kid_ceiling, ""), *_costs(config, size_mb, latency_ms)]
    numbers = {"look": int(look), "alpha": alpha, "kid": comparison.challenger, "blocks": comparison.blocks}
    numbers |= {"size_mb": size_mb, "latency_ms": latency_ms}
    if comparison.champion is None:
        first = f"the first model: no champion to compare with; KID {comparison.challenger:.4g}"
        return _decision(floors, None, [], first, numbers)

    numbers |= _compared_kid(comparison, alpha)
    upper, p = comparison.upper(alpha), comparison.p_value()
    detail = f"p = {p:.2g} {_below(upper < 0)} {alpha:.2g}; the difference is at most {upper:.3g}"
    better, fresh = _check("better than the champion", upper < 0, upper, 0.0, detail), []
    if config.rule == "fresh":
        fresh.append(_not_farther("champion", comparison, config))
        if anchor is not None:
            fresh.append(_not_farther("anchor", anchor, config))
            numbers["anchor"] = _compared_kid(anchor, alpha)
    head = f"KID {comparison.challenger:.4g} against {comparison.champion:.4g}, {comparison.blocks} blocks: "
    return _decision(floors, better, fresh, head, numbers)


def _decision(floors: list[dict], better: dict | None, fresh: list[dict], head: str, numbers: dict) -> Decision:
    if better is None:
        rule, passed, told = "floors", True, []
    elif better["passed"] or not fresh:
        rule, passed, told = "superior", better["passed"], [better]
    else:
        rule, passed, told = "fresh", all(check["passed"] for check in fresh), [better, *fresh]
    if failed := [check for check in floors if not check["passed"]]:
        reason = "short of its floors: " + "; ".join(f"{check['name']} {check['detail']}" for check in failed)
    else:
        reason = head + "; ".join(check["detail"] for check in told)
    checks = [*floors, *([better] if better else []), *fresh]
    return Decision(passed and not failed, rule, reason, checks, numbers)


def _check(name: str, passed: bool, value: float | None, limit: float | None, detail: str) -> dict:
    return {"name": name, "passed": bool(passed), "value": value, "limit": limit, "detail": detail}


def _at_least(name: str, value: float, floor: float) -> dict:
    passed = value >= floor
    return _check(name, passed, value, floor, f"{value:.4f} {'reaches' if passed else 'is below'} {floor:g}")


def _at_most(name: str, value: float | None, limit: float, unit: str) -> dict:
    unit = f" {unit}".rstrip()
    if not limit:
        return _check(name, True, value, None, "no limit" if value is None else f"{value:.4g}{unit}, no limit")
    if value is None or not math.isfinite(value):
        return _check(name, False, None, limit, f"is not known, and the limit is {limit:g}{unit}: measure it")
    passed = value <= limit
    return _check(name, passed, value, limit, f"{value:.4g}{unit} {'within' if passed else 'above'} {limit:g}{unit}")


def _costs(config: GateConfig, size_mb: float | None, latency_ms: float | None) -> list[dict]:
    return [
        _at_most("size", size_mb, config.max_mb, "MB"),
        _at_most("latency", latency_ms, config.max_latency_ms, "ms"),
    ]


def _class_floor(recalls: dict[str, float], floor: float) -> dict:
    worst = sorted(recalls, key=recalls.get)
    value = recalls[worst[0]]
    below = [name for name in worst if recalls[name] < floor]
    if not below:
        return _check("recall of each class", True, value, floor, f"the worst, {worst[0]}: {value:.4f}")
    named = ", ".join(f"{name} {recalls[name]:.4f}" for name in below[:_NAMED])
    more = f" and {len(below) - _NAMED:,} more" if len(below) > _NAMED else ""
    return _check("recall of each class", False, value, floor, f"is below {floor:g} for {named}{more}")


def _recalls(labels: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Of the classes that have images; a name that occurs twice is told apart by its index."""
    support = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[labels == answers], minlength=len(classes))
    times = Counter(classes)
    names = [f"{name} ({at})" if times[name] > 1 else str(name) for at, name in enumerate(classes)]
    return {names[at]: float(right[at] / support[at]) for at in np.flatnonzero(support)}


def _better(against: Comparison, alpha: float) -> dict:
    passed = against.p_value <= alpha
    tally = f"{against.wins:,} wins, {against.losses:,} losses, p = {against.p_value:.2g} {_below(passed)} {alpha:.2g}"
    return _check("better than the champion", passed, against.p_value, alpha, tally)


def _not_worse(whom: str, against: Comparison, config: GateConfig) -> dict:
    # By the p-value, which is the test whose level is proven; its bound, found to 1e-6, is for people.
    passed = against.p_above(-config.margin) <= config.fresh_alpha
    lower, told = against.lower(config.fresh_alpha), "above" if passed else "not above"
    detail = f"against the {whom} {against.difference:+.4f}, at least {lower:+.4f}, {told} {-config.margin:g}"
    return _check(f"not worse than the {whom} by the margin", passed, lower, -config.margin, detail)


def _not_farther(whom: str, against: KidDifference, config: GateConfig) -> dict:
    # Champion and challenger vary together from block to block, so the margin is taken of each block, not of the mean.
    upper = against.upper(config.fresh_alpha, config.margin)
    detail = f"over {1 + config.margin:g} times the {whom}'s KID by at most {upper:.3g}, {_below(upper < 0)} 0"
    return _check(f"not worse than the {whom} by the margin", upper < 0, upper, 0.0, detail)


def _compared(against: Comparison, alpha: float) -> dict:
    bounds = {"lower": against.lower(alpha), "detectable": against.detectable(alpha)}
    return asdict(against) | {"interval": list(against.interval)} | bounds


def _compared_kid(against: KidDifference, alpha: float) -> dict:
    numbers = {"champion_kid": against.champion, "difference": against.difference, "interval": list(against.interval)}
    return numbers | {"p_value": against.p_value(), "upper": against.upper(alpha)}


def _below(passed: bool) -> str:
    return "below" if passed else "not below"
