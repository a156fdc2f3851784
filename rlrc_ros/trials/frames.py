"""Camera frames of one pair at equal time intervals, both episodes under the same clock."""

from __future__ import annotations

import base64
import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from rlrc_ros.errors import UserError

MOST_COLUMNS = 8
_WIDTH = 320
_JPEG_QUALITY = 85
# Times come from stamps and multiples of periods: nothing nearer than a millisecond is told apart.
_SAME_TIME = 1e-3


@dataclass(frozen=True)
class EpisodeFrames:
    """One episode's frames.

    Args:
        frames: (H, W, 3) uint8 RGB, one for each of the strip's times until the episode ended.
        outcome: success, failure, partial or unlabelled.
        duration_s: how long the episode took, in seconds.

    """

    frames: Sequence[np.ndarray]
    outcome: str
    duration_s: float


@dataclass(frozen=True)
class FrameStrip:
    """Frames of the episodes of one pair.

    Args:
        times: seconds since the start of the episode, rising, the same for both episodes.
        episodes: each arm's frames; an episode that ended earlier has fewer.
        pair: the pair's number in the trial.

    Raises:
        UserError: no times or times that do not rise, or an episode with no frames, more frames
            than times, or frames that are not (H, W, 3) uint8.

    """

    times: Sequence[float]
    episodes: Mapping[str, EpisodeFrames]
    pair: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        if not len(self.times) or not rising:
            raise UserError("the times of a frame strip must be one or more and rise")
        for arm, episode in self.episodes.items():
            if not 0 < len(episode.frames) <= len(self.times):
                raise UserError(
                    f"{arm} has {len(episode.frames)} frames for {len(self.times)} times: "
                    "give one for each time until the episode ended"
                )
            for frame in episode.frames:
                if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
                    raise UserError(
                        f"{arm} has a frame of shape {frame.shape} and type {frame.dtype}: "
                        "frames are (H, W, 3) uint8"
                    )

    def columns(self) -> list[float]:
        """The times to show: equal intervals from the first to the last, at most MOST_COLUMNS."""
        count = min(MOST_COLUMNS, len(self.times))
        return [float(t) for t in np.linspace(self.times[0], self.times[-1], count)]

    def frame(self, arm: str, time: float) -> tuple[np.ndarray, bool]:
        """The newest frame of an episode at a time, and whether the episode had ended by then."""
        episode = self.episodes[arm]
        now = bisect.bisect_right(self.times, time + _SAME_TIME) - 1
        ended = time > episode.duration_s + _SAME_TIME or now >= len(episode.frames)
        last = bisect.bisect_right(self.times, episode.duration_s + _SAME_TIME) - 1
        return episode.frames[max(0, min(now, last, len(episode.frames) - 1))], ended


def jpeg_uri(frame: np.ndarray) -> str:
    """A (H, W, 3) uint8 RGB frame as a data URI, at most 320 pixels wide."""
    height, width = frame.shape[:2]
    bgr = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
    if width > _WIDTH:
        size = (_WIDTH, max(1, round(height * _WIDTH / width)))
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
    ok, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert ok, "OpenCV encodes every uint8 image as JPEG"
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
