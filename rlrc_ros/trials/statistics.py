"""Intervals and tests for success rates, for one policy and for two policies tried in pairs.

The counts of a paired trial, with policy a the reference and policy b the candidate:

=========  =========  ==========
..         b succeeds b fails
=========  =========  ==========
a succeeds both       only_a
a fails    only_b     neither
=========  =========  ==========

Every difference is b − a: negative where the candidate is worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import bisect
from scipy.special import bdtr, betaincinv, ndtr, ndtri
from scipy.stats import binom

from rlrc_ros.errors import UserError

Alternative = Literal["two-sided", "less", "greater"]
Verdict = Literal["noninferior", "inferior", "inconclusive"]
Stopping = Literal["fixed", "anytime"]


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two paired success proportions, b − a, in [−1, 1].

    Without any pair the estimate is NaN and the interval [−1, 1].
    """

    estimate: float
    interval: Interval
    confidence: float


@dataclass(frozen=True)
class NonInferiority:
    """Whether b is worse than a by less than a margin, and how that was decided.

    The interval is two-sided at 1 − alpha, so the error of calling b non-inferior when it is worse
    by the margin is alpha / 2: compare `p_value` with alpha / 2, not with alpha.
    """

    margin: float
    alpha: float
    difference: PairedDifference
    p_value: float
    verdict: Verdict


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact interval for a success probability; [0, 1] when n = 0.

    Clopper and Pearson (1934), Biometrika 26, 404–413, in its beta-quantile form: the α/2 quantile
    of Beta(s, n − s + 1) and the 1 − α/2 quantile of Beta(s + 1, n − s).

    Raises:
        UserError: negative counts, more successes than tries, or a confidence outside (0, 1).

    """
    _check_probability("confidence", confidence)
    _check_counts(successes=successes, n=n)
    if successes > n:
        raise UserError(
            f"{successes} successes in {n} tries: there cannot be more successes than tries"
        )
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(low, high)


def tango_score(both: int, only_a: int, only_b: int, neither: int, difference: float) -> float:
    """Score statistic of a hypothetical difference b − a; standard normal where it is the true one.

    Tango (1998), Statistics in Medicine 17, 891–908: with n pairs, the difference δ under test and
    q the maximum-likelihood probability of "only a" under δ ("only b" then has q + δ),

        T(δ) = (only_b − only_a − nδ) / sqrt(n (2q + δ (1 − δ)))

    where q is the larger root of 2n q² + Bq + C = 0 with C = −only_a δ (1 − δ) and
    B = (2n − only_b + only_a) δ − only_a − only_b. T falls as δ rises, is 0 at the estimate, and
    ±∞ where the data are impossible under δ.
    """
    n = both + only_a + only_b + neither
    d = difference
    residual = only_b - only_a - n * d
    if residual == 0:
        return 0.0
    linear = (2 * n - only_b + only_a) * d - only_a - only_b
    constant = -only_a * d * (1 - d)
    root = math.sqrt(max(linear * linear - 8 * n * constant, 0.0))
    # The two forms of the same root; each where it does not subtract nearly equal numbers.
    q = -2 * constant / (linear + root) if linear > 0 else (root - linear) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    return residual / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, residual)


def paired_difference(
    both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95
) -> PairedDifference:
    """Difference b − a of paired proportions with Tango's score interval: every δ with |T(δ)| ≤ z.

    Tango (1998), see `tango_score`. Unlike the Wald interval it stays in [−1, 1] and has a width
    when no pair is discordant (then ±z² / (n + z²)). It is asymptotic: over 10 to 100 pairs, 5% to
    50% of them discordant and differences of −20 to 5 points, its exact coverage at 95% is 93.9% or
    more, and the lower bound lies above the true difference in 3.0% of trials at most, where 2.5%
    is nominal.

    Raises:
        UserError: negative counts or a confidence outside (0, 1).

    """
    _check_probability("confidence", confidence)
    _check_counts(both=both, only_a=only_a, only_b=only_b, neither=neither)
    n = both + only_a + only_b + neither
    if n == 0:
        return PairedDifference(math.nan, Interval(-1.0, 1.0), confidence)
    estimate = (only_b - only_a) / n
    z = -float(ndtri((1 - confidence) / 2))

    def above(d: float, level: float) -> float:
        return tango_score(both, only_a, only_b, neither, d) - level

    # Bisection, because T is infinite at ±1 and jumps to 0 at an estimate with no variance.
    low = -1.0 if estimate == -1 else bisect(above, -1.0, estimate, args=(z,), xtol=1e-13)
    high = 1.0 if estimate == 1 else bisect(above, estimate, 1.0, args=(-z,), xtol=1e-13)
    return PairedDifference(estimate, Interval(float(low), float(high)), confidence)


def mcnemar_exact(only_a: int, only_b: int, alternative: Alternative = "two-sided") -> float:
    """P-value of McNemar's exact test that both policies are equally good.

    The binomial form of McNemar (1947), Psychometrika 12, 153–157: of the discordant pairs either
    policy wins each with probability 1/2. "less" asks whether b is worse than a, "greater" whether
    it is better. Without discordant pairs the answer is 1.
    """
    _check_counts(only_a=only_a, only_b=only_b)
    n = only_a + only_b
    worse = float(bdtr(only_b, n, 0.5))
    better = float(bdtr(only_a, n, 0.5))
    if alternative == "less":
        return worse
    if alternative == "greater":
        return better
    return min(1.0, 2 * min(worse, better))


def barnard(successes_a: int, n_a: int, successes_b: int, n_b: int) -> float:
    """P-value of Barnard's exact test, two-sided, for two policies that were not tried in pairs.

    Barnard (1947), Biometrika 34, 123–138, with the pooled Wald statistic: the greatest
    probability, over every common success rate, of an outcome at least as extreme. The rates are
    taken from a grid of 0.0005: `scipy.stats.barnard_exact` searches instead, and stops at lesser
    maxima (3 of 3 against 1 of 3: 0.15 for 0.22). 1 where an arm has no episodes.

    Raises:
        UserError: negative counts, or more successes than tries.

    """
    _check_counts(successes_a=successes_a, successes_b=successes_b)
    if successes_a > n_a or successes_b > n_b:
        raise UserError("there cannot be more successes than tries")
    if not n_a or not n_b:
        return 1.0
    a, b = np.arange(n_a + 1)[:, None], np.arange(n_b + 1)
    pooled = (a + b) / (n_a + n_b)
    variance = pooled * (1 - pooled) * (1 / n_a + 1 / n_b)
    contrast = np.abs(a / n_a - b / n_b)
    extreme = np.divide(contrast, np.sqrt(variance), out=np.zeros_like(pooled), where=variance > 0)
    outcomes = extreme >= extreme[successes_a, successes_b] * (1 - 1e-9)
    rates = np.linspace(0, 1, 2001)
    chances = binom.pmf(a, n_a, rates) * (outcomes @ binom.pmf(b[:, None], n_b, rates))
    return min(1.0, float(chances.sum(axis=0).max()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of several hypotheses, adjusted for their number.

    Comparing each with alpha keeps the chance of any false rejection at alpha. Holm (1979),
    Scandinavian Journal of Statistics 6, 65–70: from the smallest up, times the number of
    hypotheses left, never less than the one before.
    """
    adjusted, highest = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - i) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def noninferiority(
    both: int, only_a: int, only_b: int, neither: int, margin: float, alpha: float = 0.05
) -> NonInferiority:
    """Whether b is worse than a by less than `margin` (0.03 is 3 percentage points).

    "noninferior" when Tango's two-sided 1 − alpha interval lies above −margin, which is the
    one-sided score test at alpha / 2 (2.5% for the default) with p-value P(Z ≥ T(−margin));
    "inferior" when all of it lies below −margin; otherwise "inconclusive". Tango (1998).

    Raises:
        UserError: a margin or alpha outside (0, 1), or negative counts.

    """
    _check_probability("margin", margin)
    _check_probability("alpha", alpha)
    difference = paired_difference(both, only_a, only_b, neither, confidence=1 - alpha)
    if math.isnan(difference.estimate):
        return NonInferiority(margin, alpha, difference, 1.0, "inconclusive")
    p_value = float(ndtr(-tango_score(both, only_a, only_b, neither, -margin)))
    verdict: Verdict = "inconclusive"
    if difference.interval.low > -margin:
        verdict = "noninferior"
    elif difference.interval.high < -margin:
        verdict = "inferior"
    return NonInferiority(margin, alpha, difference, p_value, verdict)


def fewest_pairs(margin: float, alpha: float = 0.05) -> int:
    """Pairs it takes to show non-inferiority when both policies end alike in every single pair.

    With no discordant pair Tango's lower bound is −z² / (n + z²), which exceeds −margin from n > z²
    (1/margin − 1) on. Any trial whose policies do equally well but not pair by pair needs more.
    """
    _check_probability("margin", margin)
    _check_probability("alpha", alpha)
    z = float(ndtri(alpha / 2))
    return math.floor(z * z * (1 / margin - 1)) + 1


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}: it must lie between 0 and 1, both excluded")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise UserError(f"{name} is {count}: a count cannot be negative")
