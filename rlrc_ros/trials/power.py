"""What a paired trial can show, before it is run."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri
from scipy.stats import multinomial

from rlrc_ros.errors import UserError
from rlrc_ros.trials.sequential import log_capital
from rlrc_ros.trials.statistics import Stopping, fewest_pairs, tango_score

MOST_PAIRS = 20_000
_SIMULATED = 1000
"""Trials simulated for the power of a sequential rule: its standard error is 1.6% at most."""


def assumed_discordance(success: float, discordance: float | None = None) -> float:
    """Share of pairs in which only one arm succeeds, for two arms that both succeed in `success`.

    None gives 2p(1 − p), which the episodes of a pair have when they are independent.

    Raises:
        UserError: no two such arms can differ in so many pairs.
    """
    if discordance is None:
        return 2 * success * (1 - success)
    most = 2 * min(success, 1 - success)
    if not 0 < discordance <= most:
        raise UserError(
            f"assumed_discordance is {discordance:g}: arms that succeed in {success:g} of their "
            f"episodes can differ in more than 0 and at most {most:g} of the pairs"
        )
    return discordance


def pair_probabilities(discordance: float, difference: float) -> tuple[float, float, float]:
    """Of only the reference, only the candidate, and no difference.

    difference: the candidate's success minus the reference's. Where it is larger than the
    discordance the latter grows to it.
    """
    discordance = max(discordance, abs(difference))
    return (discordance - difference) / 2, (discordance + difference) / 2, 1 - discordance


def power(
    n: int,
    margin: float,
    alpha: float,
    discordance: float,
    difference: float = 0.0,
    stopping: Stopping = "fixed",
) -> float:
    """Probability that a trial of n pairs shows non-inferiority.

    For a fixed n it is exact, summed over every outcome; for the anytime rule, with n as the most
    pairs, it is simulated (always with the same random numbers).
    """
    if stopping == "anytime":
        return float(np.mean(decision_times(n, margin, alpha, discordance, difference) <= n))
    probabilities = pair_probabilities(discordance, difference)
    # Only the counts within seven standard deviations matter.
    bounds = []
    for p in probabilities[:2]:
        spread = 7 * math.sqrt(n * p * (1 - p)) + 7
        bounds.append((max(0, int(n * p - spread)), min(n, int(n * p + spread))))
    only_a, only_b = np.meshgrid(*(np.arange(low, high + 1) for low, high in bounds))
    inside = only_a + only_b <= n
    only_a, only_b = only_a[inside], only_b[inside]
    outcomes = np.stack([only_a, only_b, n - only_a - only_b], axis=-1)
    enough = -float(ndtri(alpha / 2))
    shown = [tango_score(0, a, b, unlike, -margin) > enough for a, b, unlike in outcomes.tolist()]
    return float(multinomial.pmf(outcomes[np.array(shown)], n, probabilities).sum())


def decision_times(
    n: int, margin: float, alpha: float, discordance: float, difference: float = 0.0
) -> np.ndarray:
    """After how many pairs simulated anytime trials show non-inferiority; n + 1 where not in n."""
    rng = np.random.default_rng(0)
    times = np.full(_SIMULATED, n + 1)
    only_a, only_b, unlike = pair_probabilities(discordance, difference)
    going = np.arange(_SIMULATED)
    counts = np.zeros((_SIMULATED, 2))
    enough = math.log(2 / alpha)
    done = 0
    while done < n and going.size:
        block = 64  # whatever n is, so that the random numbers are the same
        outcomes = rng.choice(3, size=(_SIMULATED, block), p=[only_a, only_b, unlike])[going]
        worse = counts[going, :1] + np.cumsum(outcomes == 0, axis=1)
        better = counts[going, 1:] + np.cumsum(outcomes == 1, axis=1)
        looks = np.arange(done + 1, done + block + 1)
        shown = (log_capital(worse, better, looks, -margin) >= enough) & (looks <= n)
        first = np.where(shown.any(axis=1), shown.argmax(axis=1), block)
        times[going] = np.where(first < block, done + 1 + first, n + 1)
        counts[going] = np.stack([worse[:, -1], better[:, -1]], axis=1)
        going = going[first == block]
        done += block
    return times


def pairs_needed(
    margin: float,
    alpha: float,
    wanted: float,
    success: float,
    discordance: float | None = None,
    stopping: Stopping = "fixed",
) -> int:
    """The fewest pairs from which on non-inferiority is shown with the wanted probability.

    For two arms that are equally good; with the anytime rule the most pairs to plan for.

    Raises:
        UserError: it takes more than MOST_PAIRS.
    """
    d = assumed_discordance(success, discordance)

    def enough(n: int) -> bool:
        return power(n, margin, alpha, d, stopping=stopping) >= wanted

    high = fewest_pairs(margin, alpha)
    while high > MOST_PAIRS or not enough(high):
        high *= 2
        if high > MOST_PAIRS:
            raise UserError(
                f"showing non-inferiority at a margin of {margin:g} takes more than {MOST_PAIRS} "
                "pairs; choose a larger margin"
            )
    if stopping == "anytime":
        times = np.sort(decision_times(high, margin, alpha, d))
        return max(2, int(times[math.ceil(wanted * times.size) - 1]))
    # Power has teeth, as counts are whole: the last n below the wanted power is looked for.
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    while not all(enough(n) for n in range(high, high + 4)):
        high += 1
    return max(2, high)


def detectable_margin(n: int, alpha: float, wanted: float, discordance: float) -> float:
    """The smallest margin, to 0.001, that n pairs can show with the wanted probability.

    For two arms that are equally good and a fixed n; 1 where no margin will do.
    """
    low, high = 0, 1000
    while low + 1 < high:
        middle = (low + high) // 2
        good = power(n, middle / 1000, alpha, discordance) >= wanted
        low, high = (low, middle) if good else (middle, high)
    return high / 1000
