"""Which action of a chunk is due: receding horizon, compensated latency, splices without a jump."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Action = NDArray[np.float64]

BLEND_STEPS = 4
"""Control steps over which a new chunk takes over from the one before it."""
ENSEMBLE_DECAY = 0.01
"""m of the weights exp(-m·i), the oldest prediction i = 0: Zhao et al., 2023 (ACT), section 4.2."""


@dataclass
class _Slot:
    """One control step to come: the predictions of it so far, averaged."""

    action: Action
    weight: float
    predictions: int
    stamp_ns: int


class ActionPlan:
    """The actions that are still to be commanded, one a control step.

    A policy's chunk says what to do at the moment it looked at and in the steps after it. By the
    time it arrives some of those are over: so many are left out, but for the last. Where the chunk
    before it still has actions for the same steps, the new one takes over from them within
    BLEND_STEPS, linearly: the first action differs from what was planned for its step by no more
    than a share of 1 / (BLEND_STEPS + 1) of the two chunks' difference. The gripper is not blended:
    half closed is not between open and closed.

    Args:
        period: s, of the control.
        replan_steps: how many actions of a chunk to command before the policy looks again; 0: half.
        ensemble: average all predictions of a step (temporal ensembling) instead of blending.
    """

    def __init__(self, period: float, replan_steps: int = 0, ensemble: bool = False) -> None:
        self.period = period
        self._replan_steps, self._ensemble = replan_steps, ensemble
        self._slots: deque[_Slot] = deque()
        self._chunk = 1
        self._taken = 0
        self.skipped = 0
        """How many actions the last chunk came too late for."""

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def wants_more(self) -> bool:
        """Whether it is time for the policy to look again."""
        steps = self._replan_steps or math.ceil(self._chunk / 2)
        return not self._slots or self._taken >= steps

    def add(self, actions: Action, stamp_ns: int, age: float) -> None:
        """Take a chunk in.

        Args:
            actions: (T, 7).
            stamp_ns: of what it was computed from.
            age: s from then to the moment the next action is commanded.
        """
        late = min(max(round(age / self.period), 0), len(actions) - 1)
        self.skipped, self._chunk, self._taken = late, len(actions), 0
        before, self._slots = self._slots, deque()
        for step, action in enumerate(actions[late:]):
            overlaps = step < len(before) and (self._ensemble or step < BLEND_STEPS)
            old = before[step] if overlaps else None
            self._slots.append(self._slot(action, stamp_ns, old, step))

    def _slot(self, action: Action, stamp_ns: int, old: _Slot | None, step: int) -> _Slot:
        if old is None:
            return _Slot(action, 1.0, 1, stamp_ns)
        if self._ensemble:
            weight = math.exp(-ENSEMBLE_DECAY * old.predictions)
            share = weight / (old.weight + weight)
            mixed = old.action + share * (action - old.action)
            return _Slot(mixed, old.weight + weight, old.predictions + 1, stamp_ns)
        share = (step + 1) / (BLEND_STEPS + 1)
        mixed = old.action + share * (action - old.action)
        mixed[-1] = action[-1]
        return _Slot(mixed, 1.0, 1, stamp_ns)

    def take(self) -> tuple[Action, int] | None:
        """The next action and the stamp of what it was computed from; None: there is none."""
        if not self._slots:
            return None
        slot = self._slots.popleft()
        self._taken += 1
        return slot.action, slot.stamp_ns
