"""Two classifiers on the same images: which is better, by how much, and how sure.

    compare(labels, champion, challenger)  -> Comparison: accuracies, wins and losses, a p-value, bounds

Only images on which exactly one of the two is right say anything: wins (the challenger is) and losses (the champion
is), w + l = m of n images. Their chances are p10 and p01; the true difference of the accuracies is p10 - p01.

The test is exact and unconditional. Pairs (w, l) are ordered by the score statistic of Tango 1998 ("Equivalence test
and confidence interval for the difference in proportions for the paired-sample design", Statistics in Medicine 17),
which is McNemar's (w - l) / sqrt(w + l) where the difference asked about is 0. The p-value is the chance of a pair as
extreme as the one seen, summed over all pairs, at the worst share of disagreement p10 + p01 inside a 1 - 1e-9 interval
for it, plus 1e-9 (Berger and Boos 1994, JASA 89; for matched pairs see Fagerland, Lydersen and Laake 2013, BMC Medical
Research Methodology 13:91).

Why not McNemar's exact test, binomtest(w, w + l): given m, its p-values are few and its size stays well below alpha
(0.0022 of 0.0025 at m = 500), which costs power: a model better by a point on 10,000 images with 5 % disagreement
passes at 0.0025 in 94.96 % of nights, here in 95.4 %. Its mid-p variant has that power and no guarantee: summed
exactly, its size passes 0.0025 at some shares of disagreement. `millstream bench gate` prints all three.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, gammaln, xlog1py, xlogy
from scipy.stats import beta, binom, norm

GAMMA = 1e-9  # chance that the share of disagreement is outside its interval; no p-value is below it
_RESAMPLES = 10_000
_NEGLIGIBLE = 1e-14  # mass of counts left out of a sum
_FINE = 1e-6  # to which a lower bound is found: a hundredth of an image of 10,000


@dataclass(frozen=True)
class Comparison:
    """Challenger against champion on the same `n` images. Differences are challenger - champion, shares from -1 to 1.

    wins, losses: images that only the challenger, only the champion has right. p_value: one-sided, of a challenger
    this much better though it is not (the module says how). interval: 95 % of the difference, two-sided, for people:
    decisions use the p-values, which keep their level however few the images on which the two differ.
    """

    n: int
    wins: int
    losses: int
    champion_accuracy: float
    challenger_accuracy: float
    difference: float
    p_value: float
    interval: tuple[float, float]

    def p_above(self, difference: float) -> float:
        """One-sided p-value against "the true difference is at most `difference`" (in [-1, 1]); small: it is above."""
        return p_above(self.n, self.wins, self.losses, difference)

    def lower(self, alpha: float) -> float:
        """Lower bound of the true difference, above it in 1 - alpha of all nights; 0 < alpha < 0.5.

        The exact test inverted: the difference at which `p_above` is alpha, to 1e-6. Counts are whole, and so
        `p_above` may dip on its way up, within the width of an image, 1 / n: there the bound is one of several, and
        who decides at a stated difference asks `p_above` itself.
        """
        _level(alpha)
        if self.p_above(-1.0) > alpha:
            return -1.0

        def above(difference: float) -> float:
            return np.log(self.p_above(difference) / alpha)

        # Tango's own bound is next to the exact one: few of the costly sums are left to do.
        score = norm.isf(alpha)
        low = high = _tango_bound(self.n, self.wins, self.losses, score)
        step = max(_FINE, (self.difference - low) / 64)
        while above(low) > 0:
            low, step = max(low - step, -1.0), step * 2
        step = max(_FINE, (self.difference - low) / 64)
        while above(high) <= 0 and high < 1:
            low, high, step = high, min(high + step, 1.0), step * 2
        return low if above(high) <= 0 else float(brentq(above, low, high, xtol=_FINE))

    def detectable(self, alpha: float, power: float = 0.8) -> float | None:
        """The smallest true difference found in `power` of nights that test at `alpha` and disagree as often as here.

        None where not even wins alone would do. 0 < alpha < 0.5, 0 < power < 1.
        """
        _level(alpha)
        if not 0 < power < 1:
            raise ValueError(f"power is {power}: pass a share between 0 and 1, such as 0.8")
        discordant = self.wins + self.losses
        needed = critical_wins(self.n, discordant, alpha)
        if needed > discordant:
            return None
        # P(wins >= needed) is the incomplete beta function of the share of wins.
        share = betaincinv(needed, discordant - needed + 1, power)
        return float(discordant / self.n * (2 * share - 1))


def compare(labels: np.ndarray, champion: np.ndarray, challenger: np.ndarray) -> Comparison:
    """labels and both models' answers, integers of shape (n,), n >= 1 -> Comparison.

    Answers are labels, so models that know different classes compare. Raises ValueError for arrays that are empty, of
    differing length or not of integers.
    """
    named = {"labels": labels, "champion": champion, "challenger": challenger}
    arrays = {name: integers(name, values) for name, values in named.items()}
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{lengths} are the lengths: both models must answer for each label of one holdout")
    labels, champion, challenger = arrays.values()
    was, now = champion == labels, challenger == labels
    n, wins, losses = len(labels), int((now & ~was).sum()), int((was & ~now).sum())
    return Comparison(
        n=n,
        wins=wins,
        losses=losses,
        champion_accuracy=float(was.mean()),
        challenger_accuracy=float(now.mean()),
        difference=(wins - losses) / n,
        p_value=p_above(n, wins, losses, 0.0),
        interval=_bootstrap(n, wins, losses),
    )


def integers(name: str, values: np.ndarray) -> np.ndarray:
    """values as int64 of shape (n,), n >= 1; ValueError that calls them `name` where they are something else."""
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}: pass integers of shape (n,), n >= 1")
    return values.astype(np.int64)


def p_above(n: int, wins: int, losses: int, difference: float) -> float:
    """The exact one-sided p-value of `wins` and `losses` on n images against "p10 - p01 is at most `difference`".

    Valid: whatever p10 and p01 of that null hypothesis, the chance of a value <= alpha is at most alpha. Falls in wins
    where wins + losses is fixed. Raises ValueError for counts that are no table and a difference outside [-1, 1].
    """
    if not (n >= 1 and wins >= 0 and losses >= 0 and wins + losses <= n):
        raise ValueError(f"{wins} wins and {losses} losses of {n} images: pass counts >= 0 that sum to at most n >= 1")
    if not -1 <= difference <= 1:
        raise ValueError(f"difference is {difference}: pass a difference of accuracies, from -1 to 1")
    seen = wins + losses
    low = beta.ppf(GAMMA / 2, seen, n - seen + 1) if seen else 0.0
    high = beta.isf(GAMMA / 2, seen + 1, n - seen) if seen < n else 1.0
    low = max(low, -difference)  # fewer disagreements cannot make a challenger this much worse
    if low > high:
        return GAMMA
    counts = np.arange(binom.ppf(_NEGLIGIBLE, n, low), binom.isf(_NEGLIGIBLE, n, high) + 1)
    least = _least(n, counts, difference, float(tango(n, wins, losses, difference)))
    # Steps of a quarter of the standard deviation of the share of disagreement, on the scale where it is constant.
    ends = np.arcsin(np.sqrt([low, high]))
    angles = np.linspace(*ends, int(np.ceil(8 * np.sqrt(n) * (ends[1] - ends[0]))) + 2)
    chances = _tail(n, counts, least, difference, np.sin(angles) ** 2)
    top = int(chances.argmax())
    around = np.linspace(angles[max(top - 1, 0)], angles[min(top + 1, len(angles) - 1)], 33)
    worst = _tail(n, counts, least, difference, np.sin(around) ** 2).max()
    return float(min(worst + GAMMA, 1.0))


def critical_wins(n: int, discordant: int, alpha: float, difference: float = 0.0) -> int:
    """The fewest wins of `discordant` images that pass `p_above(..., difference) <= alpha`; discordant + 1: none do."""

    def passes(wins: int) -> bool:
        return wins > discordant or (wins >= 0 and p_above(n, wins, discordant - wins, difference) <= alpha)

    # The normal approximation is right or next to right.
    at = int(_least(n, np.array([discordant]), difference, norm.isf(alpha))[0])
    while not passes(at):
        at += 1
    while at and passes(at - 1):
        at -= 1
    return at


def tango(n: int, wins, losses, difference: float):
    """Tango's score statistic: how many standard errors above `difference` the counts are.

    The errors are those of the likeliest chances whose difference is `difference`. Numbers or arrays.
    """
    wins, losses = np.asarray(wins, float), np.asarray(losses, float)
    b = (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Two ways to write one root of a square equation: the sum without cancellation.
        q = np.where(b > 0, -2 * c / (b + root), (root - b) / (4 * n))
        gap = wins - losses - n * difference
        z = gap / np.sqrt(np.maximum(n * (2 * q + difference * (1 - difference)), 0))
    return np.where(np.abs(gap) < 1e-9, 0.0, z)


def _tango_bound(n: int, wins: int, losses: int, score: float) -> float:
    """The difference that the counts are `score` standard errors above."""
    most = (wins - losses) / n
    if most <= -1 or tango(n, wins, losses, -1 + 1e-9) < score:
        return -1.0
    return float(brentq(lambda difference: min(tango(n, wins, losses, difference), 1e9) - score, -1 + 1e-9, most))


def _least(n: int, counts: np.ndarray, difference: float, score: float) -> np.ndarray:
    """For each number of discordant images the fewest wins whose statistic reaches `score`; count + 1 where none."""
    low, high = np.zeros_like(counts), counts + 1
    score -= 1e-9 * (1 + abs(score))  # the pair seen must count itself, whatever the rounding
    while (low < high).any():
        middle = (low + high) // 2
        reached = (tango(n, middle, counts - middle, difference) >= score) | (middle > counts)
        low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
    return low


def _tail(n: int, counts: np.ndarray, least: np.ndarray, difference: float, shares: np.ndarray) -> np.ndarray:
    """The chance of `least` wins or more, for each share of disagreement, where p10 - p01 is `difference`."""
    log = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    mass = np.exp(log + xlogy(counts, shares[:, None]) + xlog1py(n - counts, -shares[:, None]))
    # With the share below the difference asked about, the null hypothesis reaches as far as wins alone.
    with np.errstate(divide="ignore", invalid="ignore"):
        won = np.where(shares > abs(difference), (1 + difference / shares) / 2, float(difference > 0))
    won[shares == 0] = 0.5
    if difference == 0:
        return mass @ wins_at_least(counts, least, 0.5)
    row, column = np.nonzero(mass > 1e-17)
    weighted = mass[row, column] * wins_at_least(counts[column], least[column], won[row])
    return np.bincount(row, weighted, len(shares))


def wins_at_least(counts: np.ndarray, least: np.ndarray, share) -> np.ndarray:
    """P(Binomial(counts, share) >= least), elementwise."""
    inside = (least > 0) & (least <= counts)
    chance = betainc(np.where(inside, least, 1), np.where(inside, counts - least + 1, 1), share)
    return np.where(inside, chance, least <= 0)


def _level(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}: pass a chance between 0 and 0.5")


def _bootstrap(n: int, wins: int, losses: int) -> tuple[float, float]:
    """95 % percentile interval of the difference over resamples of the images, of which only three kinds differ."""

    def differences(wins: int, losses: int) -> np.ndarray:
        shares = np.array([wins, losses, n - wins - losses]) / n
        drawn = np.random.default_rng(0).multinomial(n, shares, _RESAMPLES)
        return (drawn[:, 0] - drawn[:, 1]) / n

    # Both ways round, so that champion and challenger swapped give the same interval mirrored.
    both = np.concatenate([differences(wins, losses), -differences(losses, wins)])
    low, high = np.quantile(both, [0.025, 0.975])
    return float(low), float(high)
