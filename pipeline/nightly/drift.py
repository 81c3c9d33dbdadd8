"""Is what came tonight like what the champion was trained on? Two profiles, compared feature by feature.

    measure(dataset, generations, images)    -> Profile, `profile.py`
    compare(reference, candidate, config)    -> Report: a finding a feature, and the worst of their verdicts
    section(report, reference, candidate)    -> HTML

How far: the population stability index (Siddiqi, Credit Risk Scorecards, 2006), whose limits 0.1 and 0.25 are custom.
How sure: a chi-squared test of homogeneity. Both are needed: of a million images a difference that matters to nobody
is certain, and of twenty a large one is nothing. The test takes images as independent draws, which one night's uploads
are not, so a night of fewer than FEW images is never failed by what it looks like.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.evaluation import histograms
from pipeline.evaluation.markup import escaped, shown, table
from pipeline.nightly.profile import FEATURES, Profile, measure

__all__ = ["DriftConfig", "Finding", "Profile", "Report", "compare", "measure", "section"]
VERDICTS = ("ok", "warn", "fail")
FEW = 50  # images or items; with fewer, what would be a fail is a warning
_NAMED = 5  # classes, in one line
_SHARE, _EXPECTED = 0.1, 5  # a bin's share of all, and how many it must lead either side to expect: Cochran's rule
_DRAWS = 9999


@dataclass(frozen=True)
class DriftConfig:
    """When a night's images are taken for others than those the champion knows."""

    warn: float = 0.1
    """Population stability index (PSI) of a feature from which on it is a warning."""
    fail: float = 0.25
    """PSI from which on the night's images are held; 0: never."""
    chance: float = 0.001
    """A difference that equal populations would show with more than this probability is no drift, whatever its PSI."""
    max_rejects: float = 0.05
    """Share of the night's items that could not become samples, at most; duplicates do not count."""
    images: int = 1000
    """Images decoded on each side for brightness and contrast; 0: neither is compared."""
    new_classes: str = "warn"
    """What classes mean that the champion never saw: ok, warn or fail."""
    missing_classes: str = "ok"
    """What classes mean of which the night should have images, and has none: ok, warn or fail."""

    def __post_init__(self):
        """ValueError, naming the field, for a value that cannot be."""
        if not 0 < self.warn < math.inf:
            raise ValueError(f"warn {self.warn}: a PSI above 0, customarily 0.1")
        if self.fail != 0 and not self.warn <= self.fail < math.inf:
            raise ValueError(f"fail {self.fail}: a PSI of at least warn ({self.warn}), or 0 never to fail")
        if not 0 < self.chance < 1:
            raise ValueError(f"chance {self.chance}: a probability above 0 and below 1")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"max_rejects {self.max_rejects}: a share, from 0 to 1 (never fail)")
        if self.images < 0:
            raise ValueError(f"images {self.images}: at least 0")
        for name in ("new_classes", "missing_classes"):
            if getattr(self, name) not in VERDICTS:
                raise ValueError(f"{name} {getattr(self, name)!r}: {', '.join(VERDICTS)}")


@dataclass(frozen=True)
class Finding:
    """What was found of one feature; psi and p_value are None where none is computed."""

    feature: str
    psi: float | None
    p_value: float | None
    verdict: str
    detail: str


@dataclass(frozen=True)
class Report:
    """findings: one a feature, the ok ones too; verdict: the worst of theirs; reason: one line, of all fails, else of
    all warnings. Plain JSON by `asdict`."""

    findings: list[Finding]
    verdict: str
    reason: str


# ---- comparing


def compare(reference: Profile, candidate: Profile, config: DriftConfig) -> Report:
    """What differs between what the champion was trained on and what came.

    psi: of counts to which half an image a bin is added, spread over the bins as both sides' sum is, so that an empty
    bin is a large difference and not an infinite one; less the (bins - 1) (1/n + 1/m) that equal populations of n and m
    images show on average (Yurdakul, 2018), so that small nights can be judged by the same limits; at least 0.
    The bins are merged first, until each holds a tenth of all images of both sides together, or leads the smaller side
    to expect five if that is more; a bin that holds as much by itself is never merged with its neighbours, so that a
    side of 64 px among 32 px is seen.
    Classes are merged, the rarest ones, only until five are expected, and those new tonight are left out.

    p_value: chi-squared on the same bins. Where thin ones are left and fewer than five expected, the tail is counted
    in 9,999 draws of the night's images from both sides together (Hope, 1968): given these sums it is exact.

    Whether a class is new is a fact and not a matter of chance; missing is one whose absence is (p_value times the
    number of classes at most `chance`).
    """
    findings = [_rejects(candidate, config)]
    empty = [who for who, profile in (("reference", reference), ("night", candidate)) if not profile.samples]
    if empty:
        findings.append(Finding("samples", None, None, "warn", f"no image of the {empty[0]} is in train: not compared"))
    else:
        findings += _classes(reference, candidate, config) if reference.classes or candidate.classes else []
        findings += [_histogram(feature, reference, candidate, config) for feature in FEATURES]
    verdict = max((finding.verdict for finding in findings), key=VERDICTS.index)
    worst = [f"{finding.feature}: {finding.detail}" for finding in findings if finding.verdict == verdict]
    same = f"{candidate.samples:,} images in train are like the {reference.samples:,} before"
    return Report(findings, verdict, same if verdict == "ok" else "; ".join(worst))


def _rejects(candidate: Profile, config: DriftConfig) -> Finding:
    bad = {reason: count for reason, count in candidate.rejects.items() if reason != "duplicate"}
    items, count = candidate.items - candidate.rejects.get("duplicate", 0), sum(bad.values())
    said = f"{count:,} of {items:,} items could not become samples"
    if bad:
        said += f" ({', '.join(f'{reason} {n:,}' for reason, n in sorted(bad.items(), key=lambda r: -r[1]))})"
    if count <= config.max_rejects * items:
        return Finding("rejects", None, None, "ok", said)
    return _held_back("rejects", None, None, "fail", f"{said}; the limit is {_percent(config.max_rejects)}", items)


def _classes(reference: Profile, candidate: Profile, config: DriftConfig) -> list[Finding]:
    """Findings of new classes, missing ones, and the shares of all others."""
    new = {name: n for name, n in candidate.classes.items() if not reference.classes.get(name)}
    said = f"never seen before: {_named(new)}" if new else "none"
    found = [Finding("new classes", None, None, config.new_classes if new else "ok", said)]
    names = sorted(
        reference.classes, key=lambda name: (-reference.classes[name] - candidate.classes.get(name, 0), name)
    )
    counts = np.array([[side.classes.get(name, 0) for name in names] for side in (reference, candidate)], np.int64)
    counts = counts.reshape(2, -1)
    found.append(_missing(names, counts, config))
    if not counts.sum(1).all():
        return [*found, Finding("classes", None, None, "ok", "no class is on both sides")]
    together = _filled(counts.sum(0), _EXPECTED * counts.sum() / counts.sum(1).min())  # the most frequent come first
    psi, p_value = _compared(_merge(counts, together))
    before, now = counts / counts.sum(1, keepdims=True)
    most = int((now - before).argmax())  # in words, what came rather than what there is less of
    said = f"class {names[most]!r}: {_percent(before[most])} before, {_percent(now[most])} now"
    verdict = _judged(psi, p_value, config)
    return [*found, _held_back("classes", psi, p_value, verdict, said, candidate.samples)]


def _missing(names: list[str], counts: np.ndarray, config: DriftConfig) -> Finding:
    absent = np.flatnonzero(counts[1] == 0)
    if not len(absent):
        return Finding("missing classes", None, None, "ok", "none")
    # Of so many classes one is missing by chance more often than a given one.
    p_values = stats.hypergeom.pmf(0, counts.sum(), counts[0, absent], counts[1].sum()) * len(names)
    p_value, sure = min(float(p_values.min()), 1.0), absent[p_values <= config.chance]
    if not len(sure):
        said = f"{len(absent):,} of {len(names):,} classes have no image, which so few images explain"
        return Finding("missing classes", None, p_value, "ok", said)
    said = f"no image of {_named({names[i]: int(counts[0, i]) for i in sure}, ' before')}"
    return Finding("missing classes", None, p_value, config.missing_classes, said)


def _histogram(feature: str, reference: Profile, candidate: Profile, config: DriftConfig) -> Finding:
    sides, unit = [side.histograms[feature] for side in (reference, candidate)], FEATURES[feature][1]
    counts = np.array([side["counts"] for side in sides], np.int64)
    if not counts.sum(1).all():
        return Finding(feature, None, None, "ok", "not measured on both sides")
    held = np.flatnonzero(counts.any(0))
    groups = _neighbours_together(counts[:, held])
    merged = _merge(counts[:, held], groups)
    psi, p_value = _compared(merged)
    before, now = merged / merged.sum(1, keepdims=True)
    most = int((now - before).argmax())
    bins = held[groups == most]
    edges = FEATURES[feature][0]
    means = " -> ".join(shown(side["mean"]) for side in sides)
    said = f"mean {feature} {means} {unit}".rstrip()
    said += (
        f"; {edges[bins[0]]:g} to {edges[bins[-1] + 1]:g}: {_percent(before[most])} before, {_percent(now[most])} now"
    )
    return _held_back(feature, psi, p_value, _judged(psi, p_value, config), said, candidate.samples)


def _held_back(feature: str, psi: float | None, p_value: float | None, verdict: str, said: str, count: int) -> Finding:
    """The finding; where `count` is below FEW, of a verdict that holds nothing up."""
    if verdict == "fail" and count < FEW:
        verdict, said = "warn", f"{said} (of {count:,}: too few to fail)"
    return Finding(feature, psi, p_value, verdict, said)


def _judged(psi: float, p_value: float, config: DriftConfig) -> str:
    if p_value > config.chance or psi < config.warn:
        return "ok"
    return "fail" if config.fail and psi >= config.fail else "warn"


# ---- the two numbers; counts are int64 (2, bins), the reference's and the night's


def _neighbours_together(counts: np.ndarray) -> np.ndarray:
    """Bins in a row -> the group of each, int64 (bins,), rising; a bin that is large enough is one by itself.

    What is merged depends on the sums of both sides alone, so that a test that takes these as given stays exact.
    """
    pooled, groups, first = counts.sum(0), [], 0
    enough = pooled.sum() * max(_SHARE, _EXPECTED / counts.sum(1).min())
    large = pooled >= enough
    for run in np.split(pooled, 1 + np.flatnonzero(large[1:] | large[:-1])):
        groups.append(first + _filled(run, enough))
        first = groups[-1][-1] + 1
    return np.concatenate(groups)


def _filled(pooled: np.ndarray, enough: float) -> np.ndarray:
    """The group of each bin, int64 (bins,): each takes bins until it holds `enough`, the last one what is left too."""
    groups, group, held = [], 0, 0
    for n in pooled.tolist():
        if held >= enough:
            group, held = group + 1, 0
        groups.append(group)
        held += n
    return np.minimum(groups, group - 1 if group and held < enough else group)


def _merge(counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(groups, weights=side) for side in counts]).astype(np.int64)


def _parts(counts: np.ndarray) -> np.ndarray:
    """What each bin adds to the PSI, float64 (bins,); none is empty on both sides."""
    bins, pooled = counts.shape[1], counts.sum(0)
    # As `compare` says; half an image in every bin alike would by itself set a night of twenty far from a million.
    reference, candidate = (counts + bins / 2 * pooled / pooled.sum()) / (counts.sum(1, keepdims=True) + bins / 2)
    return (candidate - reference) * np.log(candidate / reference)


def _compared(counts: np.ndarray) -> tuple[float, float]:
    """(PSI beyond what chance adds, p-value) of bins none of which is empty on both sides."""
    bins, sizes = counts.shape[1], counts.sum(1)
    if bins < 2:
        return 0.0, 1.0
    psi = float(_parts(counts).sum() - (bins - 1) * (1 / sizes).sum())
    expected = stats.contingency.expected_freq(counts)
    found = _chi_squared(counts[1], expected)
    p_value = float(stats.chi2.sf(found, bins - 1))
    if expected.min() < _EXPECTED:
        random = np.random.default_rng(0)
        drawn = random.multivariate_hypergeometric(counts.sum(0), sizes[1], _DRAWS, method="marginals")
        # A hair below, since equal tables must count as equal however their sums are rounded.
        beyond = int((_chi_squared(drawn, expected) >= found * (1 - 1e-9)).sum())
        # Where no draw came as far, the draws only say that it is rarer than they can tell.
        p_value = (1 + beyond) / (1 + _DRAWS) if beyond else min(p_value, 1 / (1 + _DRAWS))
    return max(psi, 0.0), p_value


def _chi_squared(candidate: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of the night's counts (..., bins): with the sums of both sides given, the reference's differ by as much."""
    return ((candidate - expected[1]) ** 2 * (1 / expected).sum(0)).sum(-1)


# ---- saying it


def section(report: Report, reference: Profile, candidate: Profile) -> str:
    """The findings as an HTML fragment, worst first, and under them each feature before and now."""
    ordered = sorted(report.findings, key=lambda finding: -VERDICTS.index(finding.verdict))
    rows = [
        f'<tr><td class="name">{escaped(f.feature)}</td>'
        f'<td class="{"bad" if f.verdict == "fail" else ""}">{f.verdict}</td>'
        f"<td>{shown(f.psi)}</td><td>{shown(f.p_value)}</td><td>{escaped(f.detail)}</td></tr>"
        for f in ordered
    ]
    parts = [table(["feature", "verdict", "PSI", "by chance", "what was found"], rows, "list")]
    sides = (("before", reference), ("now", candidate))
    if names := [*reference.classes, *(name for name in candidate.classes if name not in reference.classes)]:
        counts = {when: [side.classes.get(name, 0) for name in names] for when, side in sides}
        parts.append(f"<h3>Classes</h3>{histograms.class_counts(names, counts)}")
    figures = []
    for feature in FEATURES:
        for when, side in sides:
            found = side.histograms[feature]
            says = f"{sum(found['counts']):,} images, mean {shown(found['mean'])}"
            figures.append(histograms.histogram(found["edges"], found["counts"], f"{feature}, {when}", says))
    return "".join(parts) + f'<h3>Images</h3><div class="plots">{"".join(figures)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _named(counts: dict[str, int], when: str = "") -> str:
    """The largest few of {class: images} in words, and how many more there are."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    said = ", ".join(f"{name!r} ({counts[name]:,}{when})" for name in names[:_NAMED])
    return said + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
