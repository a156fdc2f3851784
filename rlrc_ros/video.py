"""Videos as WebM (VP8), which OpenCV writes and every browser plays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np


def write_webm(path: Path, frames: Iterable[np.ndarray], rate: float) -> bool:
    """Write (H, W, 3) uint8 RGB frames of one even size, whole or not at all.

    Returns whether this OpenCV can write VP8; where it cannot, nothing is written.
    """
    partial = path.with_name(f".{path.stem}.partial.webm")
    writer = None
    try:
        for frame in frames:
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                with _quiet():  # the tag is unknown to OpenCV's list for WebM, the codec is not
                    codec = cv2.VideoWriter.fourcc(*"VP80")
                    writer = cv2.VideoWriter(str(partial), codec, rate, size)
                if not writer.isOpened():
                    return False
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        if writer is not None:
            writer.release()
            partial.replace(path)
        return writer is not None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what C code prints to standard error."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
