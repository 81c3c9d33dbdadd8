"""How often the nightly gate promotes a model that is no better, and how often it misses one that is."""

import time
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from jobs.command import execute, parse, say
from pipeline.evaluation.kid import kid_difference
from pipeline.evaluation.paired import critical_wins, wins_at_least
from pipeline.nightly.gate import GateConfig, decide_gan

_IMAGES, _DISAGREE = 10_000, 0.05
_ROUGHLY = 64  # between the counts of disagreements at which creep's limits are worked out; linear between
_CREEP_YEARS = 20
_WORSE = 0.001  # truly, each night of creep
_RIGHT = 0.95  # accuracy where creep starts
_UNDECIDED = 1024  # images in a year's holdout that any model gets right or wrong by chance: 5.1 % disagreement
_KID = (400, 16, 0.3, 0.15)  # images, features; distance of the generators from the real ones, of a better one


@dataclass(frozen=True)
class Args:
    """What share of nights the gate promotes: by exact sums over every outcome, and by simulated nights.

    Equal models on holdouts of 10,000 and 1,000 images, which it should hold; one that is better by a point; a year on
    one reused holdout; the fresh rule, and what it loses in a year of ever worse models; generators by KID. `ratio` is
    the false promotions a year of equal models makes on one holdout, of those that 365 looks at alpha allow.
    """

    nights: int = 1_000_000
    """Simulated nights of each case of two classifiers. The share of 10,000 varies by 0.0005, a fifth of alpha."""
    years: int = 4_000
    """Simulated years on one holdout; creep, which is slower, takes 20 of them."""
    kid_nights: int = 4_000
    """Simulated nights of two generators."""
    seed: int = 0
    """Of all that is drawn."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{cases: [...], year, fresh: [...], creep, kid: [...], holds, ratio, seconds}; shares of nights unless named."""
    if min(args.nights, args.kid_nights) < 1 or args.years < 2:
        raise ValueError(
            f"nights {args.nights}, kid_nights {args.kid_nights} and years {args.years}: 1, 1 and 2 at least"
        )
    began, config, random = time.monotonic(), GateConfig(), np.random.default_rng(args.seed)
    say(f"superior at {config.alpha}: share of nights promoted (exact; simulated; McNemar's exact test; its mid-p)")
    equal = [(images, share, 0.0) for images in (_IMAGES, 1000) for share in (0.02, 0.05, 0.2)]
    cases = [_case(*case, config, args.nights, random) for case in [*equal, (_IMAGES, _DISAGREE, 0.01)]]
    year = _year(config, args.years, random)
    fresh = _fresh(config, args.nights, random)
    creep = _creep(config, min(args.years, _CREEP_YEARS), random)
    generators = [_generators(better, config, args.kid_nights, random) for better in (False, True)]

    holds = {
        "equal models: exact share at most alpha": all(case["exact"] <= config.alpha for case in cases[:-1]),
        "better by a point: exact share at least 0.95": cases[-1]["exact"] >= 0.95,
        "worse by the margin: exact share at most fresh_alpha": fresh[1]["exact"] <= config.fresh_alpha,
    }
    for claim, kept in holds.items():
        say(f"{'holds' if kept else 'DOES NOT HOLD'}: {claim}")
    parts = {"cases": cases, "year": year, "fresh": fresh, "creep": creep, "kid": generators}
    ratio = year["false_promotions"] / (365 * config.alpha)
    return parts | {"holds": all(holds.values()), "ratio": ratio, "seconds": time.monotonic() - began}


def limits(images: int, counts: np.ndarray, alpha: float, difference: float = 0.0) -> np.ndarray:
    """For each number of disagreements the fewest wins that the gate's test passes."""
    return np.array([critical_wins(images, count, alpha, difference) for count in counts.tolist()])


def mcnemar(counts: np.ndarray, alpha: float, mid: bool) -> np.ndarray:
    """The same of McNemar's exact test, or of its mid-p variant."""
    # One below the smallest that could do; the mid-p value is at most half a term smaller, so two steps suffice.
    fewest = binom.isf(alpha, counts, 0.5).astype(int) - 1
    for _ in range(3):
        value = binom.sf(fewest - 1, counts, 0.5) - mid * binom.pmf(fewest, counts, 0.5) / 2
        fewest += value > alpha
    return fewest


def around(images: int, share: float) -> np.ndarray:
    """The numbers of disagreements that occur, but for a chance of 2e-13."""
    return np.arange(binom.ppf(1e-13, images, share), binom.isf(1e-13, images, share) + 1).astype(int)


def promoted(images: int, share: float, gap: float, counts: np.ndarray, fewest: np.ndarray) -> float:
    """The exact share of nights with enough wins, of models that differ by `gap` and disagree on `share`."""
    return float(binom.pmf(counts, images, share) @ wins_at_least(counts, fewest, (1 + gap / share) / 2))


def _simulated(images: int, share: float, gap: float, counts, fewest, nights: int, random) -> dict:
    wins, losses, _ = random.multinomial(images, [(share + gap) / 2, (share - gap) / 2, 1 - share], nights).T
    at = np.clip(wins + losses - counts[0], 0, len(counts) - 1)
    times = int((wins >= fewest[at]).sum())
    return {"simulated": times / nights, "nights": nights, "promoted": times}


def _case(images: int, share: float, gap: float, config: GateConfig, nights: int, random) -> dict:
    counts = around(images, share)
    fewest = limits(images, counts, config.alpha)
    others = {name: mcnemar(counts, config.alpha, mid) for name, mid in (("mcnemar_exact", False), ("mid_p", True))}
    row = {"images": images, "disagree": share, "gap": gap, "exact": promoted(images, share, gap, counts, fewest)}
    row |= _simulated(images, share, gap, counts, fewest, nights, random)
    row |= {name: promoted(images, share, gap, counts, limit) for name, limit in others.items()}
    say(
        f"  {images:6,} images, {share:4.0%} disagree, better by {gap:.2f}: {row['exact']:.6f}; "
        f"{row['simulated']:.6f}; {row['mcnemar_exact']:.6f}; {row['mid_p']:.6f}"
    )
    return row


def _year(config: GateConfig, years: int, random) -> dict:
    """365 equal models come to one holdout, one a night; who the gate says is better becomes champion.

    Each model is right on each undecided image by a coin of its own. Images that all get right or wrong change nothing
    and are not drawn.
    """
    counts = np.arange(_UNDECIDED // 4, _UNDECIDED * 3 // 4)
    fewest = limits(_IMAGES, counts, config.alpha)
    words = _UNDECIDED // 64

    def models() -> np.ndarray:
        return random.integers(0, 1 << 64, (years, words), np.uint64, endpoint=False)

    def passes(challenger: np.ndarray, champion: np.ndarray) -> np.ndarray:
        wins = np.bitwise_count(challenger & ~champion).sum(1, dtype=int)
        losses = np.bitwise_count(champion & ~challenger).sum(1, dtype=int)
        return wins >= fewest[wins + losses - counts[0]]

    champion, promotions = models(), np.zeros(years, int)
    for _ in range(365):
        challenger = models()
        better = passes(challenger, champion)
        champion[better], promotions = challenger[better], promotions + better
    average, some = float(promotions.mean()), float((promotions > 0).mean())
    error = float(promotions.std() / np.sqrt(years))
    say(
        f"365 nights of equal models on one holdout, {years:,} years: {average:.3f} ± {error:.3f} false promotions a "
        f"year, at least one in {some:.1%} of years, at most {promotions.max()}; allowed {365 * config.alpha:.2f}"
    )
    return {"years": years, "false_promotions": average, "error": error, "years_with_one": some}


def _fresh(config: GateConfig, nights: int, random) -> list[dict]:
    counts = around(_IMAGES, _DISAGREE)
    fewest = limits(_IMAGES, counts, config.fresh_alpha, -config.margin)
    say(f"fresh, no worse than {config.margin} at {config.fresh_alpha}: share of nights promoted (exact; simulated)")
    rows = []
    for gap in (0.0, -config.margin, config.margin):
        row = {"gap": gap, "exact": promoted(_IMAGES, _DISAGREE, gap, counts, fewest)}
        rows.append(row | _simulated(_IMAGES, _DISAGREE, gap, counts, fewest, nights, random))
        say(f"  truly {gap:+.3f}: {row['exact']:.5f}; {rows[-1]['simulated']:.5f}")
    return rows


def _creep(config: GateConfig, years: int, random) -> dict:
    """365 nights of models each truly worse than the champion of the day: what a year of the fresh rule loses.

    The challenger errs where the champion does but on 5 % of images: of all it would ever see it loses a share of what
    the champion has right and gains a smaller one of what it has wrong. Once with one holdout all year, image by image;
    once with new images every night, where only the numbers of each kind matter, and no champion has luck to defend.
    """
    rough = np.arange(0, _IMAGES // 2, _ROUGHLY)
    superior = limits(_IMAGES, rough, config.alpha)
    fresh = limits(_IMAGES, rough, config.fresh_alpha, -config.margin)
    row = {"years": years, "worse_each_night": _WORSE}

    def passes(fewest: np.ndarray, wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return wins >= np.interp(wins + losses, rough, fewest)

    for holdout, lost in (("one holdout", _lost_on_one), ("new images each night", _lost_on_new)):
        for anchored in (True, False):
            loss = lost(years, superior, fresh, passes, anchored, random)
            name = f"{holdout}, {'with' if anchored else 'without'} the anchor"
            row[name] = {"mean": float(loss.mean()), "worst": float(loss.max())}
            say(f"  {name}: accuracy falls by {loss.mean():.4f} on average, {loss.max():.4f} in the worst year")
    return row


def _flips(true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (_DISAGREE + _WORSE) / 2 / true, (_DISAGREE - _WORSE) / 2 / (1 - true)


def _lost_on_one(years: int, superior, fresh, passes, anchored: bool, random) -> np.ndarray:
    champion = random.random((years, _IMAGES), np.float32) < _RIGHT
    anchor, true = champion.copy(), np.full(years, _RIGHT)
    for _ in range(365):
        falls, rises = _flips(true)
        flips = random.random((years, _IMAGES), np.float32)
        challenger = champion ^ (flips < np.where(champion, falls[:, None], rises[:, None]))
        tally = (challenger & ~champion).sum(1), (champion & ~challenger).sum(1)
        better, takes = passes(superior, *tally), passes(fresh, *tally)
        if anchored:
            takes &= passes(fresh, (challenger & ~anchor).sum(1), (anchor & ~challenger).sum(1))
        takes |= better
        anchor[better], champion[takes] = challenger[better], challenger[takes]
        true = true - _WORSE * takes
    return _RIGHT - true


def _lost_on_new(years: int, superior, fresh, passes, anchored: bool, random) -> np.ndarray:
    # Of all images: anchor and champion right; anchor alone; champion alone; neither.
    start = np.array([_RIGHT, 0, 0, 1 - _RIGHT])
    shares, true = np.tile(start, (years, 1)), np.full(years, _RIGHT)
    for _ in range(365):
        falls, rises = _flips(true)
        chances = np.stack([1 - falls, rises, 1 - falls, rises], axis=1)  # of the challenger to be right
        both = np.concatenate([shares * chances, shares * (1 - chances)], axis=1)
        drawn = random.multinomial(_IMAGES, both / both.sum(1, keepdims=True))
        wins, losses = drawn[:, 1] + drawn[:, 3], drawn[:, 4] + drawn[:, 6]
        better, takes = passes(superior, wins, losses), passes(fresh, wins, losses)
        if anchored:
            takes &= passes(fresh, drawn[:, 2] + drawn[:, 3], drawn[:, 4] + drawn[:, 5])
        takes |= better
        after = both[:, [0, 4, 2, 6]] + both[:, [1, 5, 3, 7]]  # (anchor, challenger)
        shares = np.where(takes[:, None], after, shares)
        true = true - _WORSE * takes
        # A new anchor is the champion: they agree on everything.
        same = np.stack([true, 0 * true, 0 * true, 1 - true], axis=1)
        shares = np.where(better[:, None], same, shares)
    return _RIGHT - true


def _generators(better: bool, config: GateConfig, nights: int, random) -> dict:
    """Normal features: both generators off by the same, or the challenger by less."""
    images, width, off, less = _KID
    row = {"images": images, "better": better, "nights": nights}
    p_values, times = [], 0
    for _ in range(nights):
        real, champion, challenger = random.normal(size=(3, images, width))
        against = kid_difference(real, champion + off, challenger + (less if better else off))
        p_values.append(against.p_value())
        times += decide_gan(config, 1, against).promote
    row |= {"promoted": times / nights, "at_0.05": float((np.array(p_values) < 0.05).mean())}
    what = f"a generator off by {less} against one by {off}" if better else "equal generators"
    say(f"KID of {images} images, {what}: {row['promoted']:.4f} of nights promoted; {row['at_0.05']:.4f} at 0.05")
    return row


def main(argv: list[str]) -> int:
    args = parse(Args, "bench gate", argv)
    return execute(lambda: run(args), args.json)
