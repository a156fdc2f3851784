"""What came in the last seconds before an episode began."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

PREROLL_SIZE = 256 << 20
"""Bytes that a pre-roll may hold, whatever its length."""


class PrerollMessage(NamedTuple):
    """A message that waits for an episode to begin."""

    came: float
    """s of the steady clock."""
    topic: str
    received: int
    """ns since the epoch."""
    sent: int
    """ns since the epoch."""
    data: bytes


class Preroll:
    """Keeps the messages of the last seconds, in the order they came.

    Args:
        seconds: how long each is kept, by the steady clock: the system's may be set meanwhile.
        size: bytes kept at most; the oldest messages go first.
    """

    def __init__(self, seconds: float, size: int = PREROLL_SIZE) -> None:
        self._seconds, self._size = seconds, size
        self._messages: deque[PrerollMessage] = deque()
        self._bytes = 0

    def add(self, topic: str, received: int, sent: int, data: bytes) -> None:
        """Take a message in, and let go of those that are too old by now."""
        self._messages.append(PrerollMessage(time.monotonic(), topic, received, sent, data))
        self._bytes += len(data)
        self._trim()

    def take(self) -> list[PrerollMessage]:
        """Everything it holds, oldest first; it is empty after that."""
        self._trim()
        messages = list(self._messages)
        self._messages.clear()
        self._bytes = 0
        return messages

    def _trim(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._messages and (self._bytes > self._size or self._messages[0].came < oldest):
            self._bytes -= len(self._messages.popleft().data)
