"""Keeps a node off the shared memory of processes that were killed.

A process hears others by ports of Fast DDS's in /dev/shm, which those keep open. One that takes
over a dead one's port gets a new file under the old name, and whoever still has the old one open
goes on writing there: for ever, where the kill came between two messages, since the dead listener
then looks neither frozen at work nor frozen waiting (`SharedMemGlobal.hpp` of Fast DDS 3.2.3; the
mend proposed in its pull request 4728 is not in it). So the ports of the dead are left alone.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108, where Fast DDS puts it
_PORT = re.compile(rf" {_SHARED_MEMORY}/(fast\w+_port\d+)$", re.MULTILINE)


@contextmanager
def avoided() -> Iterator[None]:
    """Have a participant that is created meanwhile take no port that belonged to a dead process.

    Fast DDS takes the next port where one is locked: the locks are held that their owners left.
    """
    with ExitStack() as held:
        for port in _open_ports():
            with suppress(OSError):  # its owner is alive and holds it, or it has just gone
                lock = held.enter_context((_SHARED_MEMORY / f"{port}_el").open("rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _open_ports() -> set[str]:
    """Ports that a process has open, as far as this user may look."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's, or it has ended
            found |= set(_PORT.findall(maps.read_text(errors="replace")))
    return found
