"""What a report shows of the recordings: frames, paths, and the episodes of a pair side by side."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rlrc_ros.messages.image import image_to_rgb
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.profile import RobotProfile
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.trials.frames import EpisodeFrames, FrameStrip
from rlrc_ros.video import write_webm

FRAME_RATE = 10.0
"""Frames per second that are kept of a recording, and of a clip."""
LARGEST = 240
"""Pixels of a kept frame's longer side, and of a clip's pictures."""
STRIP_COLUMNS = 6
_GAP, _BAR = 8, 22
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)
_COLOURS = {"success": (0, 102, 75), "failure": (163, 60, 0), "partial": (122, 89, 0)}


@dataclass(frozen=True)
class Footage:
    """What is kept of one episode's recording.

    Args:
        frames: (H, W, 3) uint8 RGB at FRAME_RATE from the episode's beginning.
        pose_times: (N,) s of the end effector's poses.
        positions: (N, 3) metres, base frame.

    """

    frames: list[np.ndarray]
    pose_times: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Clip:
    """Both episodes of a pair beside each other, at the same speed, as a data URI of WebM."""

    pair: int
    caption: str
    uri: str


def read_footage(bag: Path, profile: RobotProfile) -> Footage:
    """Frames of the first camera and the end effector's path; times from the first command on.

    Raises:
        UserError: there is no such bag, it cannot be read, or it lacks the camera or the commands.
    """
    camera = "/" + next(iter(profile.cameras.values())).topic.lstrip("/")
    pose, command = "/" + profile.ee_pose.lstrip("/"), "/policy_command"
    images: list[tuple[int, np.ndarray]] = []
    poses: list[tuple[int, list[float]]] = []
    began = None
    period = 1e9 / FRAME_RATE
    for topic, message, received in read_messages(bag, [camera, pose, command]):
        stamp = to_nanoseconds(message.header.stamp) or received
        if topic == command:
            began = stamp if began is None else began
        elif topic == pose:
            point = message.pose.position
            poses.append((stamp, [point.x, point.y, point.z]))
        elif not images or stamp - images[-1][0] > 0.3 * period:
            images.append((stamp, _small(image_to_rgb(message))))
    if began is None:
        began = images[0][0] if images else 0
    frames, i = [], 0
    last = images[-1][0] if images else began - 1
    for tick in np.arange(began, last + 1, period):
        while i + 1 < len(images) and images[i + 1][0] <= tick:
            i += 1
        frames.append(images[i][1])
    moving = [(stamp, point) for stamp, point in poses if stamp >= began]
    return Footage(
        frames,
        np.array([(stamp - began) * 1e-9 for stamp, _ in moving]),
        np.array([point for _, point in moving]).reshape(-1, 3),
    )


def frame_strip(
    pair: int, footage: Mapping[str, Footage], ends: Mapping[str, tuple[str, float]]
) -> FrameStrip | None:
    """Frames of a pair at equal time intervals; None where an episode has none.

    ends: outcome and duration in s by arm.
    """
    if any(not one.frames for one in footage.values()):
        return None
    times = np.linspace(0, max(duration for _, duration in ends.values()), STRIP_COLUMNS)
    episodes = {}
    for arm, one in footage.items():
        outcome, duration = ends[arm]
        kept = [t for t in times if t <= duration]
        frames = [one.frames[min(int(t * FRAME_RATE), len(one.frames) - 1)] for t in kept]
        episodes[arm] = EpisodeFrames(frames, outcome, duration)
    return FrameStrip([float(t) for t in times], episodes, pair=pair)


def side_by_side(
    pair: int,
    caption: str,
    footage: Mapping[str, Footage],
    ends: Mapping[str, tuple[str, float]],
) -> Clip | None:
    """A clip of a pair; an episode that has ended stands still and says how.

    None where an episode has no frames, or where this OpenCV cannot write VP8.
    """
    if any(not one.frames for one in footage.values()):
        return None
    count = max(int(ends[arm][1] * FRAME_RATE) + 1 for arm in footage) + int(FRAME_RATE)
    panels = []
    for arm, one in footage.items():
        outcome, duration = ends[arm]
        last = min(int(duration * FRAME_RATE), len(one.frames) - 1)
        panels.append([_panel(arm, one.frames[min(k, last)], k > last, outcome, duration, k)
                       for k in range(count)])  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pair.webm"
        frames = (_beside([panel[k] for panel in panels]) for k in range(count))
        if not write_webm(path, frames, FRAME_RATE):
            return None
        content = path.read_bytes()
    return Clip(pair, caption, "data:video/webm;base64," + base64.b64encode(content).decode())


def _panel(
    arm: str, frame: np.ndarray, ended: bool, outcome: str, duration: float, k: int
) -> np.ndarray:
    """One episode's picture under a bar with its name, its time, and how it ended."""
    size = (LARGEST, round(frame.shape[0] * LARGEST / frame.shape[1]))
    picture = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
    bar = np.full((_BAR, LARGEST, 3), _BACKGROUND, np.uint8)
    time = min(k / FRAME_RATE, duration)
    told = f"{outcome} {duration:.1f} s" if ended else f"{time:.1f} s"
    _write(bar, arm[:16], 2, _INK)
    _write(bar, told, LARGEST - 8 * len(told), _COLOURS.get(outcome, _INK) if ended else _INK)
    return np.vstack([bar, picture // 2 + 127 if ended else picture])


def _write(image: np.ndarray, text: str, x: int, colour: tuple[int, int, int]) -> None:
    ascii_ = text.encode("ascii", "replace").decode()  # all that OpenCV's fonts have
    cv2.putText(image, ascii_, (x, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)


def _beside(panels: list[np.ndarray]) -> np.ndarray:
    """Panels in a row, even in height and width as the codec wants it."""
    height = max(panel.shape[0] for panel in panels)
    row = []
    for panel in panels:
        padded = np.full((height, panel.shape[1] + _GAP, 3), _BACKGROUND, np.uint8)
        padded[: panel.shape[0], : panel.shape[1]] = panel
        row.append(padded)
    image = np.hstack(row)
    return np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])


def _small(image: np.ndarray) -> np.ndarray:
    scale = LARGEST / max(image.shape[:2])
    if scale >= 1:
        return image
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
