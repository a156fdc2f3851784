"""Smoothness of a path: the spectral arc length of its speed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

CUTOFF = 10.0
"""Hz: the highest frequency that counts."""
THRESHOLD = 0.05
"""Of the greatest magnitude: frequencies above the last one that reaches it do not count."""
PADDING = 4
"""Powers of two by which the spectrum is interpolated."""


def sparc(speed: ArrayLike, rate: float) -> float | None:
    """SPARC of a speed profile: 0 at best, more negative where the movement is less smooth.

    The negative length of the curve that the speed's normalised Fourier magnitude draws over the
    frequency from 0 to the cutoff, which is scaled to length 1. It depends neither on how fast nor
    (nearly) on how long the movement is. Balasubramanian, Melendez-Calderon, Roby-Brami and Burdet
    (2015), On the analysis of movement smoothness, Journal of NeuroEngineering and Rehabilitation
    12:112, with the parameters given there.

    Args:
        speed: (N,) at equal intervals, in any unit.
        rate: samples per second.

    Returns:
        None for fewer than two samples, or where nothing moved.

    """
    profile = np.asarray(speed, float)
    if profile.size < 2 or not np.isfinite(profile).all() or not profile.any():
        return None
    count = 2 ** (int(np.ceil(np.log2(profile.size))) + PADDING)
    frequencies = np.arange(count) * rate / count
    magnitude = np.abs(np.fft.fft(profile, count))
    magnitude /= magnitude.max()
    inside = frequencies <= CUTOFF
    frequencies, magnitude = frequencies[inside], magnitude[inside]
    last = int(np.flatnonzero(magnitude >= THRESHOLD)[-1])
    if last < 1:
        return None
    frequencies, magnitude = frequencies[: last + 1], magnitude[: last + 1]
    steps = np.diff(frequencies) / (frequencies[-1] - frequencies[0])
    return -float(np.hypot(steps, np.diff(magnitude)).sum())


def path_sparc(times: ArrayLike, positions: ArrayLike, rate: float = 50.0) -> float | None:
    """SPARC of a path that was sampled at irregular times.

    Args:
        times: (N,) s, rising.
        positions: (N, 3) metres.
        rate: Hz at which it is sampled anew before its speed is taken.

    Returns:
        None for less than two samples or nothing that moved.

    """
    known, first = np.unique(np.asarray(times, float), return_index=True)
    if known.size < 3:
        return None
    points = np.asarray(positions, float)[first]
    at = np.arange(known[0], known[-1], 1 / rate)
    path = np.stack([np.interp(at, known, axis) for axis in points.T], axis=1)
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * rate
    # Encoder noise alone is no movement.
    return sparc(speed, rate) if speed.size and speed.max() > 1e-4 else None
