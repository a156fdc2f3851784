import itertools

import numpy as np
import pytest

from rlrc_ros.trials.smoothness import path_sparc, sparc


def minimum_jerk(duration, rate=100.0):
    """Speed of a minimum-jerk movement, Flash and Hogan (1985), of length 1."""
    t = np.arange(0, duration, 1 / rate) / duration
    return 30 * t**2 * (1 - t) ** 2 / duration


def test_a_minimum_jerk_movement_has_its_known_value():
    # About −1.41, whatever its amplitude and duration: Balasubramanian et al. (2015), figure 3, and
    # their published code.
    assert sparc(minimum_jerk(1.0), 100.0) == pytest.approx(-1.41, abs=0.01)


def test_it_depends_on_neither_amplitude_nor_duration():
    plain = sparc(minimum_jerk(1.0), 100.0)
    assert sparc(37 * minimum_jerk(1.0), 100.0) == pytest.approx(plain)
    assert sparc(minimum_jerk(3.0), 100.0) == pytest.approx(plain, abs=0.02)


def test_more_submovements_and_more_shaking_are_less_smooth():
    one = minimum_jerk(1.0)
    values = [sparc(np.concatenate([one] * k), 100.0) for k in (1, 2, 4, 8)]
    assert all(a > b for a, b in itertools.pairwise(values))
    shaking = one * (1 + 0.8 * np.sin(2 * np.pi * 6 * np.arange(100) / 100))
    assert sparc(shaking, 100.0) < values[0] - 0.2


def test_a_path_is_sampled_anew_where_its_stamps_jitter():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 1, 200))
    s = 10 * times**3 - 15 * times**4 + 6 * times**5
    positions = np.outer(s, [0.3, -0.2, 0.1])
    assert path_sparc(times, positions) == pytest.approx(sparc(minimum_jerk(1.0), 100.0), abs=0.05)


@pytest.mark.parametrize(
    ("times", "positions"),
    [([], np.zeros((0, 3))), ([0.0], np.zeros((1, 3))), (range(9), np.ones((9, 3)))],
)
def test_what_did_not_move_has_no_smoothness(times, positions):
    assert path_sparc(times, positions) is None
    assert sparc([0.0] * 9, 50.0) is None
    assert sparc([1.0, np.nan, 1.0], 50.0) is None
