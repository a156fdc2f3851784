import math

import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.trials.power import (
    assumed_discordance,
    decision_times,
    detectable_margin,
    pair_probabilities,
    pairs_needed,
    power,
)
from rlrc_ros.trials.statistics import fewest_pairs, noninferiority


@pytest.mark.parametrize(
    ("n", "margin", "difference"), [(40, 0.2, 0.0), (100, 0.15, -0.05), (60, 0.1, -0.1)]
)
def test_power_is_the_share_of_simulated_trials_that_show_it(n, margin, difference):
    rng = np.random.default_rng(1)
    a, b, unlike = pair_probabilities(0.25, difference)
    trials = rng.multinomial(n, [a, b, unlike], size=1000).tolist()
    shown = [noninferiority(u, x, y, 0, margin).verdict == "noninferior" for x, y, u in trials]
    promised = power(n, margin, 0.05, 0.25, difference)
    error = math.sqrt(promised * (1 - promised) / len(shown))
    assert np.mean(shown) == pytest.approx(promised, abs=3.5 * error + 1e-3)


def test_power_of_a_large_trial_is_that_of_the_normal_distribution():
    # Known for differences of paired proportions: z = δ sqrt(n / d), n large.
    from scipy.stats import norm

    n, margin, d = 2000, 0.05, 0.3
    expected = norm.cdf(margin * math.sqrt(n / d) - norm.ppf(0.975))
    assert power(n, margin, 0.05, d) == pytest.approx(expected, abs=0.01)


def test_the_pairs_that_are_needed_are_enough_and_hardly_more():
    for margin, success in ((0.2, 0.8), (0.15, 0.9), (0.3, 0.5)):
        n = pairs_needed(margin, 0.05, 0.8, success)
        d = assumed_discordance(success)
        assert power(n, margin, 0.05, d) >= 0.8
        assert power(n - 8, margin, 0.05, d) < 0.83
        assert n >= fewest_pairs(margin)


def test_more_pairs_wanted_power_or_a_smaller_margin_need_more():
    n = pairs_needed(0.2, 0.05, 0.8, 0.8)
    assert pairs_needed(0.15, 0.05, 0.8, 0.8) > n
    assert pairs_needed(0.2, 0.01, 0.8, 0.8) > n
    assert pairs_needed(0.2, 0.05, 0.95, 0.8) > n
    assert pairs_needed(0.2, 0.05, 0.8, 0.8, discordance=0.1) < n


def test_an_anytime_trial_needs_more_at_most_and_about_as_many_in_the_middle():
    fixed = pairs_needed(0.2, 0.05, 0.8, 0.8)
    most = pairs_needed(0.2, 0.05, 0.8, 0.8, stopping="anytime")
    assert fixed < most < 2.2 * fixed
    d = assumed_discordance(0.8)
    assert power(most, 0.2, 0.05, d, stopping="anytime") >= 0.8
    times = decision_times(most, 0.2, 0.05, d)
    assert np.median(times) < 1.3 * fixed


def test_what_so_many_pairs_can_show_they_show():
    margin = detectable_margin(60, 0.05, 0.8, 0.3)
    assert power(60, margin, 0.05, 0.3) >= 0.8 > power(60, margin - 0.02, 0.05, 0.3)


def test_arms_cannot_differ_in_more_pairs_than_they_fail_in():
    assert assumed_discordance(0.9) == pytest.approx(0.18)
    with pytest.raises(UserError, match=r"at most 0\.2 of the pairs"):
        assumed_discordance(0.9, 0.3)
    with pytest.raises(UserError, match="more than 20000 pairs"):
        pairs_needed(0.0001, 0.05, 0.8, 0.8)
