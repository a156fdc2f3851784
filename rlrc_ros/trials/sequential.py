"""Looking at a paired trial whenever one likes: a test and an interval that stay valid.

Of every pair, X is 1 where only the candidate succeeded, −1 where only the reference did, else 0;
its mean is the difference of the success rates. Against the hypothesis that the mean is at most m a
gambler bets on X > m: with a stake λ in [0, 1/(1 + m)] the capital is multiplied by 1 + λ (X − m)
at every pair, and under the hypothesis it does not grow on average, whatever was bet before. By
Ville's inequality it ever reaches 1/α with probability α at most, however often one looks and
whatever makes one stop. The stakes are mixed: the capital is the mean of that of gamblers with
different ones.

Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables by betting, Journal of
the Royal Statistical Society B 86, 1–27; Ville (1939). Exact for any n: no normal approximation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import bisect
from scipy.special import logsumexp

from rlrc_ros.trials.statistics import Interval, PairedDifference, Verdict

# Shares of the largest stake: Gauss–Legendre, so that the mean is that over all stakes.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_STAKES = (1 + _NODES) / 2
_LOG_WEIGHTS = np.log(_WEIGHTS / 2)


def log_capital(worse: ArrayLike, better: ArrayLike, n: ArrayLike, mean: float) -> np.ndarray:
    """Logarithm of the capital against "the mean is at most `mean`", in (−1, 1).

    Args:
        worse: pairs with X = −1; shapes are broadcast.
        better: pairs with X = 1.
        n: all pairs.
        mean: the hypothetical mean.

    """
    worse, better, n = (np.asarray(count, float)[..., None] for count in (worse, better, n))
    largest = 1 / (1 + mean)
    growth = (
        better * np.log1p(_STAKES * largest * (1 - mean))
        + (n - worse - better) * np.log1p(-_STAKES * largest * mean)
        + worse * np.log1p(-_STAKES)
    )
    return logsumexp(growth + _LOG_WEIGHTS, axis=-1)


def decided(
    both: int, only_a: int, only_b: int, neither: int, margin: float, alpha: float
) -> Verdict | None:
    """What an anytime trial has shown so far; None as long as it must go on.

    "noninferior" where the capital against b − a ≤ −margin has reached 2 / alpha, "inferior" where
    that against b − a ≥ −margin has: each errs with probability alpha / 2 at most.
    """
    n = both + only_a + only_b + neither
    enough = math.log(2 / alpha)
    if log_capital(only_a, only_b, n, -margin) >= enough:
        return "noninferior"
    if log_capital(only_b, only_a, n, margin) >= enough:
        return "inferior"
    return None


def anytime_p(only_a: int, only_b: int, n: int, margin: float) -> float:
    """One-sided p-value, valid at any time, of "b − a ≤ −margin": 1 over the capital."""
    return min(1.0, math.exp(-float(log_capital(only_a, only_b, n, -margin))))


def anytime_difference(
    both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95
) -> PairedDifference:
    """Difference b − a with an interval that holds at every look at once (a confidence sequence).

    Every mean that neither gambler has refuted at (1 − confidence) / 2.
    """
    n = both + only_a + only_b + neither
    if n == 0:
        return PairedDifference(math.nan, Interval(-1.0, 1.0), confidence)
    enough = math.log(2 / (1 - confidence))
    end = 1 - 1e-9

    def lower(mean: float, worse: int, better: int) -> float:
        """Where the capital is just enough; it falls with the mean."""

        def excess(mean: float) -> float:
            return float(log_capital(worse, better, n, mean)) - enough

        return -1.0 if excess(-end) <= 0 else bisect(excess, -end, mean, xtol=1e-12)

    estimate = (only_b - only_a) / n
    low = lower(min(estimate, end), only_a, only_b)
    high = -lower(min(-estimate, end), only_b, only_a)
    return PairedDifference(estimate, Interval(low, high), confidence)
