import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

from rlrc_ros.trials.power import pair_probabilities
from rlrc_ros.trials.sequential import anytime_difference, anytime_p, decided, log_capital

counts = st.integers(0, 150)
tables = st.tuples(counts, counts, counts, counts).filter(any)


@settings(max_examples=15)
@given(st.integers(0, 8), st.floats(-0.9, 0.9), st.floats(0, 1))
def test_the_capital_is_expected_to_stay_what_it_was_under_the_hypothesis(n, mean, spread):
    # Summed over every outcome of n pairs whose mean is the hypothetical one: exactly 1.
    discordance = abs(mean) + spread * (1 - abs(mean))
    probabilities = pair_probabilities(discordance, mean)
    cells = [(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]
    weights = multinomial.pmf(np.array(cells), n, probabilities)
    worse, better = (np.array(cells)[:, i] for i in (0, 1))
    expected = (weights * np.exp(log_capital(worse, better, n, mean))).sum()
    assert expected == pytest.approx(1, rel=1e-9)


def test_the_capital_is_what_the_bets_bring():
    stakes = np.linspace(0, 1, 100_001)
    for sequence in ([1, 1, 0], [-1, 1, 1, 1], [0, 0]):
        mean = -0.1
        capital = np.ones_like(stakes)
        for x in sequence:
            capital *= 1 + stakes / (1 + mean) * (x - mean)
        found = log_capital(sequence.count(-1), sequence.count(1), len(sequence), mean)
        assert math.exp(float(found)) == pytest.approx(np.trapezoid(capital, stakes), rel=1e-6)


@settings(max_examples=15)
@given(tables, st.floats(0.01, 0.5), st.sampled_from([0.01, 0.05, 0.1]))
def test_rule_interval_and_p_value_agree(table, margin, alpha):
    _, only_a, only_b, _ = table
    low, high = anytime_difference(*table, confidence=1 - alpha).interval
    expected = "noninferior" if low > -margin else "inferior" if high < -margin else None
    if abs(low + margin) > 1e-6 and abs(high + margin) > 1e-6:
        assert decided(*table, margin, alpha) == expected
    if abs(low + margin) > 1e-6:
        assert (anytime_p(only_a, only_b, sum(table), margin) < alpha / 2) == (low > -margin)


@settings(max_examples=15)
@given(tables)
def test_interval_laws(table):
    both, only_a, only_b, neither = table
    found = anytime_difference(*table)
    low, high = found.interval
    assert -1 <= low <= found.estimate <= high <= 1
    swapped = anytime_difference(both, only_b, only_a, neither).interval
    assert (swapped.low, swapped.high) == pytest.approx((-high, -low), abs=1e-9)
    assert anytime_difference(neither, only_a, only_b, both) == found


def test_without_pairs_nothing_is_known():
    assert anytime_difference(0, 0, 0, 0).interval == (-1, 1)
    assert decided(0, 0, 0, 0, 0.1, 0.05) is None


@pytest.mark.parametrize(("margin", "discordance"), [(0.1, 0.1), (0.2, 0.5)])
def test_who_looks_after_every_pair_errs_no_more_than_promised(margin, discordance):
    # A candidate that is worse by exactly the margin, 1,000 trials of up to 150 pairs.
    rng = np.random.default_rng(3)
    probabilities = pair_probabilities(discordance, -margin)
    outcomes = rng.choice(3, p=probabilities, size=(1000, 150))
    worse, better = (np.cumsum(outcomes == kind, axis=1) for kind in (0, 1))
    capital = log_capital(worse, better, np.arange(1, 151), -margin)
    wrong = (capital >= math.log(2 / 0.05)).any(axis=1).mean()
    assert wrong <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1000)
