"""Continuous actions to bins and back, exactly as OpenVLA does it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.vla.config import ActionCodecConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class ActionCodec:
    """Scales a dimension by its quantiles to [-1, 1], then takes one of `n_bins` uniform bins.

    A bin here is an offset from the first action token, so bin 0 is the *highest* value: OpenVLA
    numbers its tokens downwards (`id = vocabulary - digitize`,
    openvla/prismatic/vla/action_tokenizer.py).
    """

    def __init__(self, config: ActionCodecConfig) -> None:
        self.config = config
        self._edges = np.linspace(-1.0, 1.0, config.n_bins)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2
        self._low, self._high = np.asarray(config.q01), np.asarray(config.q99)
        self._mask = np.asarray(config.mask)

    def encode(self, actions: Floats) -> Ints:
        """(…, D) actions in metres, radians and gripper opening -> (…, D) bins.

        Values outside the range are clipped.
        """
        digits = np.digitize(np.clip(self.scale(actions), -1.0, 1.0), self._edges)
        return (self.config.n_bins - digits).astype(np.int64)

    def scale(self, actions: Floats) -> Floats:
        """(…, D) actions -> (…, D), those between the quantiles in [-1, 1]."""
        span = np.where(self._mask & (self._high > self._low), self._high - self._low, 1.0)
        return np.where(self._mask, 2 * (actions - self._low) / span - 1, actions)

    def decode(self, bins: Ints) -> Floats:
        """(…, D) bins -> (…, D) actions, each the centre of its bin."""
        last = len(self._centres) - 1
        return self.unscale(
            self._centres[np.clip(self.config.n_bins - 1 - np.asarray(bins), 0, last)]
        )

    def unscale(self, scaled: Floats) -> Floats:
        """(…, D) of which [-1, 1] spans the quantiles -> (…, D) actions."""
        return np.where(
            self._mask, 0.5 * (scaled + 1) * (self._high - self._low) + self._low, scaled
        )
