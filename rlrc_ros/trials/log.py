"""The log of a trial: one JSON object a line, only ever appended to, on the disk when acknowledged.

Every line carries a number, the time, and the beginning of the SHA-256 of the line before it, so
that a line that was changed, removed or put in shows. What a crash left of an unfinished last line
was never acknowledged and is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.episode import now

CLOCK_TOLERANCE = 2.0
"""s by which the clock may have been set back between two runs of a trial."""
_BEGINNING = "0" * 16

Event = dict[str, Any]


class WriterLock:
    """Held by the one process that writes a trial; freed when it ends, however it does."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another one has it; says which.
        """
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"{path.parent}: {holder} is running this trial; one writes at a time, so that no "
                "two people label the same trial: use that one, or end it first"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let others have it."""
        self._file.close()


class TrialLog:
    """A log open for appending; hold a WriterLock meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open a log, or begin one; an unfinished last line is cut off.

        Raises:
            UserError: it is damaged, or its last entry lies in the future.
        """
        self.path = path
        created = not path.exists()
        self._file: IO[bytes] = path.open("x+b" if created else "r+b", buffering=0)
        try:
            content = self._file.read()
            self._end = content.rfind(b"\n") + 1
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self.events, self._previous = _parse(content[: self._end], path)
            self._check_clock()
        except BaseException:
            self._file.close()
            raise
        if created:
            # Without this a power cut can lose the new file's name though its content is there.
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def append(self, event: str, **fields: Any) -> Event:
        """Add a line; returns when it is on the disk.

        Raises:
            UserError: it could not be written; then the log is as before.
        """
        entry = {"n": len(self.events), "time": now(), "event": event, **fields}
        entry["previous"] = self._previous
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise UserError(
                f"{self.path}: '{event}' could not be written ({error.strerror}); nothing has "
                "changed, make room and do it again"
            ) from None
        self._end += len(line)
        self._previous = _digest(line)
        self.events.append(entry)
        return entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check_clock(self) -> None:
        if not self.events:
            return
        last = datetime.fromisoformat(self.events[-1]["time"])
        behind = (last - datetime.now(timezone.utc)).total_seconds()
        if behind > CLOCK_TOLERANCE:
            raise UserError(
                f"{self.path}: its last entry is {behind:.0f} s in the future: this machine's "
                "clock was set back, or differs from the one that wrote it; set it right first"
            )


def read_events(path: Path) -> list[Event]:
    """Every acknowledged event of a log, oldest first.

    Raises:
        UserError: there is no log, or it is damaged; names the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no trial: there is no {path.name}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse(content[: content.rfind(b"\n") + 1], path)[0]


def _parse(content: bytes, path: Path) -> tuple[list[Event], str]:
    """The events of whole lines, and the digest of the last line."""
    events: list[Event] = []
    previous = _BEGINNING
    for number, line in enumerate(content.splitlines(keepends=True)):
        place = f"{path}:{number + 1}"
        try:
            event = json.loads(line)
            known = event["n"], event["previous"], str(event["event"])
            datetime.fromisoformat(event["time"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{place}: not an entry of a trial's log; restore the file") from None
        if known[:2] != (number, previous):
            raise UserError(
                f"{place}: this line does not follow the one before it: the log was edited; "
                "restore the file"
            )
        events.append(event)
        previous = _digest(line)
    return events, previous


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[: len(_BEGINNING)]
