"""Stamps of images in a file, so that noting them takes no memory in a run of hours."""

from __future__ import annotations

import struct
from pathlib import Path

_ENTRY = struct.Struct("<qq")


class StampWriter:
    """Appends; a process that is killed loses what was not flushed.

    Args:
        path: the file, made anew.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 16)

    def write(self, source: int, value: int) -> None:
        """Note a number, a stamp in ns for one, of one of several sources."""
        self._file.write(_ENTRY.pack(source, value))

    def flush(self) -> None:
        """Hand everything so far to the operating system."""
        self._file.flush()


def read_stamps(path: Path) -> dict[int, list[int]]:
    """What was noted, by source, in order."""
    found: dict[int, list[int]] = {}
    data = path.read_bytes()
    whole = len(data) - len(data) % _ENTRY.size
    for source, value in _ENTRY.iter_unpack(data[:whole]):
        found.setdefault(source, []).append(value)
    return found
