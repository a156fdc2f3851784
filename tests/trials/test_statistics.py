import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import barnard_exact, binom, binomtest, multinomial, norm

from rlrc_ros.errors import UserError
from rlrc_ros.trials.statistics import (
    barnard,
    clopper_pearson,
    fewest_pairs,
    holm,
    mcnemar_exact,
    noninferiority,
    paired_difference,
    tango_score,
)

counts = st.integers(0, 200)
tables = st.tuples(counts, counts, counts, counts).filter(any)
margins = st.floats(0.005, 0.5)
confidences = st.floats(0.5, 0.999)


# Clopper–Pearson


@given(st.integers(0, 300), st.integers(0, 300), confidences)
def test_clopper_pearson_is_scipys_exact_interval(successes, failures, confidence):
    n = successes + failures
    assume(n > 0)
    expected = binomtest(successes, n).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, n, confidence) == pytest.approx(tuple(expected), abs=1e-9)


def test_clopper_pearson_gives_published_values():
    # Newcombe (1998), Statistics in Medicine 17, 857–872, table I.
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)
    assert clopper_pearson(15, 148) == pytest.approx((0.0578, 0.1617), abs=5e-5)
    assert clopper_pearson(0, 20) == pytest.approx((0.0, 0.1684), abs=5e-5)
    assert clopper_pearson(1, 29) == pytest.approx((0.0009, 0.1776), abs=5e-5)


def test_clopper_pearson_of_nothing_is_everything():
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 200), st.integers(0, 200))
def test_clopper_pearson_laws(successes, failures):
    n = successes + failures
    assume(n > 0)
    interval = clopper_pearson(successes, n)
    assert 0 <= interval.low <= successes / n <= interval.high <= 1
    mirrored = clopper_pearson(failures, n)
    assert interval == pytest.approx((1 - mirrored.high, 1 - mirrored.low), abs=1e-9)
    four_times = clopper_pearson(4 * successes, 4 * n)
    assert interval.low <= four_times.low + 1e-12
    assert four_times.high <= interval.high + 1e-12


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (1, 2, 1.0), (1, 2, 0.0), (1, 2, math.nan)])
def test_clopper_pearson_refuses_what_is_no_proportion(arguments):
    with pytest.raises(UserError):
        clopper_pearson(*arguments)


# Tango's interval


@pytest.mark.parametrize(
    ("table", "confidence", "interval"),
    [
        # both, only b, only a, neither
        # Tango (1998), as ratesci's tests hold them.
        ((4, 9, 3, 16), 0.95, (-0.027, 0.390)),
        ((43, 0, 1, 0), 0.90, (-0.096, 0.037)),
        # Agresti and Min (2005), Statistics in Medicine 24, 729–740.
        ((53, 16, 8, 9), 0.95, (-0.020, 0.207)),
        # Fagerland, Lydersen and Laake (2017), Statistical Analysis of Contingency Tables,
        # chapter 8, as contingencytables' tests hold it.
        ((59, 6, 16, 80), 0.95, (-0.124, -0.005)),
    ],
)
def test_tango_gives_published_intervals(table, confidence, interval):
    both, only_b, only_a, neither = table
    found = paired_difference(both, only_a, only_b, neither, confidence)
    assert found.interval == pytest.approx(interval, abs=5.1e-4)
    assert found.estimate == pytest.approx((only_b - only_a) / sum(table))


@given(tables, st.floats(-0.95, 0.95))
def test_tango_score_uses_the_constrained_maximum_likelihood(table, difference):
    both, only_a, only_b, neither = table
    n = sum(table)

    def minus_log_likelihood(q):
        terms = ((only_b, q + difference), (only_a, q), (both + neither, 1 - 2 * q - difference))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    variance = n * (2 * q + difference * (1 - difference))
    expected = (only_b - only_a - n * difference) / math.sqrt(variance)
    found = tango_score(both, only_a, only_b, neither, difference)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(tables, confidences)
def test_tango_interval_laws(table, confidence):
    both, only_a, only_b, neither = table
    found = paired_difference(both, only_a, only_b, neither, confidence)
    assert -1 <= found.interval.low <= found.estimate <= found.interval.high <= 1
    swapped = paired_difference(both, only_b, only_a, neither, confidence)
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx(
        (-found.interval.high, -found.interval.low), abs=1e-9
    )
    # What both do alike carries no sign: only how many pairs agree matters.
    same = paired_difference(neither, only_a, only_b, both, confidence)
    assert same == found


@given(tables, st.integers(2, 20))
def test_tango_interval_narrows_as_pairs_are_added(table, factor):
    interval = paired_difference(*table).interval
    more = paired_difference(*(factor * count for count in table)).interval
    assert interval.low <= more.low + 1e-9
    assert more.high <= interval.high + 1e-9


@given(tables, st.floats(0.5, 0.99), st.floats(0.001, 0.009))
def test_tango_interval_widens_with_confidence(table, confidence, step):
    narrow = paired_difference(*table, confidence=confidence).interval
    wide = paired_difference(*table, confidence=confidence + step).interval
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@given(tables)
def test_tango_score_falls_as_the_difference_rises(table):
    scores = [tango_score(*table, d) for d in np.linspace(-0.999, 0.999, 101)]
    assert (np.diff(scores) <= 1e-9).all()


@given(st.integers(1, 10_000))
def test_tango_interval_without_discordant_pairs_has_a_closed_form(n):
    half = norm.ppf(0.975) ** 2 / (n + norm.ppf(0.975) ** 2)
    assert paired_difference(n, 0, 0, 0).interval == pytest.approx((-half, half), abs=1e-9)


@given(st.integers(1, 10_000))
def test_tango_interval_when_every_pair_goes_one_way_has_a_closed_form(n):
    z2 = norm.ppf(0.975) ** 2
    assert paired_difference(0, 0, n, 0).interval == pytest.approx(
        ((n - z2) / (n + z2), 1.0), abs=1e-9
    )
    assert paired_difference(0, n, 0, 0).interval.low == -1.0


def test_tango_interval_without_pairs_is_everything():
    found = paired_difference(0, 0, 0, 0)
    assert math.isnan(found.estimate)
    assert found.interval == (-1.0, 1.0)


@pytest.mark.parametrize("n", [10, 20, 50])
def test_tango_coverage_is_nominal_summed_over_every_outcome(n):
    cells = [(b, a) for b in range(n + 1) for a in range(n + 1 - b)]
    intervals = np.array([paired_difference(n - b - a, a, b, 0).interval for b, a in cells])
    outcomes = np.array([[b, a, n - b - a] for b, a in cells])
    for discordant in (0.05, 0.1, 0.2, 0.3, 0.5):
        for difference in (-0.2, -0.1, -0.05, -0.03, 0.0, 0.05):
            if abs(difference) >= discordant:
                continue
            only_b, only_a = (discordant + difference) / 2, (discordant - difference) / 2
            weights = multinomial.pmf(outcomes, n, [only_b, only_a, 1 - discordant])
            low, high = intervals.T
            covered = weights[(low <= difference) & (difference <= high)].sum()
            wrongly_above = weights[low > difference].sum()
            assert covered > 0.935
            assert wrongly_above < 0.031


def test_tango_coverage_is_nominal_in_simulated_trials():
    rng = np.random.default_rng(7)
    truth = -0.04
    # both, only a, only b, neither
    trials = rng.multinomial(150, [0.78, 0.08, 0.04, 0.10], size=4000)
    covered = [
        low <= truth <= high
        for low, high in (paired_difference(*map(int, t)).interval for t in trials)
    ]
    # 95% within four standard errors of 4,000 trials
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize("arguments", [(-1, 0, 0, 2), (1, 0, 0, 2, 1.0), (1, 0, 0, 2, -0.5)])
def test_tango_refuses_impossible_counts_and_confidences(arguments):
    with pytest.raises(UserError):
        paired_difference(*arguments)


# McNemar


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(only_a, only_b):
    n = only_a + only_b
    for alternative in ("two-sided", "less", "greater"):
        expected = binomtest(only_b, n, alternative=alternative).pvalue if n else 1.0
        assert mcnemar_exact(only_a, only_b, alternative) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_does_not_care_which_policy_comes_first(only_a, only_b):
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a)
    assert mcnemar_exact(only_a, only_b, "less") == mcnemar_exact(only_b, only_a, "greater")


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(UserError):
        mcnemar_exact(-1, 3)


# Non-inferiority


@given(tables, margins, st.floats(0.01, 0.2))
def test_noninferiority_test_and_interval_agree(table, margin, alpha):
    found = noninferiority(*table, margin=margin, alpha=alpha)
    low, high = found.difference.interval
    assume(abs(low + margin) > 1e-9)
    assert (found.p_value < alpha / 2) == (low > -margin)
    assert (found.verdict == "noninferior") == (low > -margin)
    assert (found.verdict == "inferior") == (high < -margin)


@given(tables, margins, st.floats(1.01, 1.9))
def test_a_wider_margin_is_met_more_easily(table, margin, factor):
    strict = noninferiority(*table, margin=margin)
    lenient = noninferiority(*table, margin=factor * margin)
    assert lenient.p_value <= strict.p_value + 1e-12
    assert strict.verdict != "noninferior" or lenient.verdict == "noninferior"


def test_noninferiority_turns_where_the_published_interval_begins():
    # Tango (1998): 44 pairs, one of them discordant; the 90% interval begins at −0.096.
    assert noninferiority(43, 1, 0, 0, margin=0.097, alpha=0.1).verdict == "noninferior"
    assert noninferiority(43, 1, 0, 0, margin=0.095, alpha=0.1).verdict == "inconclusive"
    assert noninferiority(43, 1, 0, 0, margin=0.0957, alpha=0.1).p_value == pytest.approx(
        0.05, abs=5e-4
    )


def test_noninferiority_is_about_the_candidate_not_the_reference():
    assert noninferiority(500, 0, 100, 0, margin=0.03).verdict == "noninferior"
    assert noninferiority(500, 100, 0, 0, margin=0.03).verdict == "inferior"


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.03, 3.0, math.nan])
def test_noninferiority_refuses_a_margin_that_is_no_fraction(margin):
    with pytest.raises(UserError, match="margin"):
        noninferiority(10, 1, 1, 1, margin=margin)


def test_noninferiority_without_pairs_is_inconclusive():
    assert noninferiority(0, 0, 0, 0, margin=0.5).verdict == "inconclusive"


@given(margins, st.floats(0.01, 0.2))
def test_fewest_pairs_are_just_enough_when_every_pair_ends_alike(margin, alpha):
    n = fewest_pairs(margin, alpha)
    # Nobody can tell apart a bound that meets the margin to the last digit.
    assume(
        abs(noninferiority(n - 1, 0, 0, 0, margin, alpha).difference.interval.low + margin) > 1e-9
    )
    assert noninferiority(n, 0, 0, 0, margin, alpha).verdict == "noninferior"
    assert noninferiority(n - 1, 0, 0, 0, margin, alpha).verdict == "inconclusive"


def test_fewest_pairs_at_three_points():
    assert fewest_pairs(0.03) == 125


# Barnard


def test_barnard_gives_published_values():
    # Mehta and Senchaudhuri (2003), Conditional versus unconditional exact tests for comparing two
    # binomials: 7 of 15 vaccinated and 12 of 15 others infected, one-sided 0.0340.
    assert barnard(7, 15, 12, 15) == pytest.approx(2 * 0.0340, abs=2e-3)


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_barnard_laws(a, b, more_a, more_b):
    n_a, n_b = a + more_a, b + more_b
    p = barnard(a, n_a, b, n_b)
    assert 0 <= p <= 1
    # What scipy finds is never more, as it may miss the greatest maximum.
    table = [[a, b], [more_a, more_b]]
    expected = barnard_exact(table).pvalue if 0 < a + b < n_a + n_b else 1.0
    assert p > expected - 1e-3
    assert p == pytest.approx(barnard(b, n_b, a, n_a), abs=1e-6)
    assert p == pytest.approx(barnard(more_a, n_a, more_b, n_b), abs=1e-6)


@pytest.mark.parametrize("table", [(3, 8, 6, 8), (0, 10, 4, 9), (12, 20, 5, 20), (9, 10, 30, 60)])
def test_barnard_is_scipys_where_that_finds_the_maximum(table):
    a, n_a, b, n_b = table
    expected = barnard_exact([[a, b], [n_a - a, n_b - b]], n=512).pvalue
    assert barnard(*table) == pytest.approx(expected, abs=1e-3)


def test_barnard_keeps_its_level_summed_over_every_outcome():
    n, rates = 9, np.linspace(0.05, 0.95, 19)
    p = np.array([[barnard(a, n, b, n) for b in range(n + 1)] for a in range(n + 1)])
    for rate in rates:
        weights = binom.pmf(np.arange(n + 1), n, rate)
        assert (np.outer(weights, weights) * (p <= 0.05)).sum() <= 0.05 + 1e-6


def test_barnard_of_nothing_or_no_contrast_is_one():
    assert barnard(0, 0, 3, 5) == 1.0
    assert barnard(0, 4, 0, 5) == barnard(4, 4, 5, 5) == pytest.approx(1.0)
    with pytest.raises(UserError, match="more successes than tries"):
        barnard(6, 5, 1, 5)


# Holm


def test_holm_gives_what_the_paper_says():
    # Wright (1992), Biometrics 48, 1005–1013, as R's p.adjust has it.
    p = {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04, "e": 0.05}
    assert holm(p) == pytest.approx({"a": 0.05, "b": 0.08, "c": 0.09, "d": 0.09, "e": 0.09})
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_laws(values):
    p = {str(i): value for i, value in enumerate(values)}
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    for name, value in p.items():
        assert value <= adjusted[name] <= min(1.0, len(p) * value)
    ranked = sorted(p, key=p.__getitem__)
    assert sorted(adjusted[name] for name in ranked) == [adjusted[name] for name in ranked]
