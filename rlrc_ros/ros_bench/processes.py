"""Processes of a measurement, and what /proc says of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc_ros.bringup import TRANSPORT_ENVIRONMENT
from rlrc_ros.errors import UserError

STOP_TIME = 10.0
"""s that a process may take to stop before it is killed."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a process holds at one time."""

    time: float
    """s of the steady clock."""
    rss: int
    """Bytes resident."""
    anonymous: int
    """Of these, bytes that are its own and no file's or shared memory's."""
    shared: int
    """Of these, bytes of memory that it shares with others. DDS makes it once, of a fixed size, and
    whoever reads what others left there comes to touch more and more of it."""
    threads: int
    descriptors: int


class Process:
    """One process, its output in a log."""

    def __init__(self, name: str, command: Sequence[str], logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        with self.log.open("a") as log:
            self.popen = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if name == "sources" else log,
                stderr=log,
                start_new_session=True,
            )
        self._unread = b""
        if self.popen.stdout is not None:
            os.set_blocking(self.popen.stdout.fileno(), False)

    def check(self) -> None:
        """Raises UserError where it has ended."""
        if self.popen.poll() is not None:
            last = (self.log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
            raise UserError(
                f"{self.name} has ended ({self.popen.returncode}): {last}; see {self.log}"
            )

    def kill(self) -> None:
        """SIGKILL it and wait."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """Ask it to end, and wait; kill it where it does not."""
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
        try:
            self.popen.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            self.kill()
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        self.check()
        assert self.popen.stdin is not None
        self.popen.stdin.write(line.encode() + b"\n")
        self.popen.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """The next line of its standard output, which is JSON; None while there is none."""
        assert self.popen.stdout is not None
        self._unread += self.popen.stdout.read() or b""
        line, newline, rest = self._unread.partition(b"\n")
        if not newline:
            return None
        self._unread = rest
        return dict(json.loads(line))

    def realtime(self) -> bool:
        """Whether it runs ahead of ordinary processes."""
        return os.sched_getscheduler(self.popen.pid) == os.SCHED_FIFO

    def cpu_seconds(self) -> float:
        """Of all its threads so far, in user and kernel."""
        # After the name, which may hold spaces: fields 14 and 15 of proc(5) are utime and stime.
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def usage(self) -> Usage:
        """Now; raises UserError where it has ended."""
        self.check()
        proc = Path(f"/proc/{self.popen.pid}")
        facts = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )

        def kilobytes(key: str) -> int:
            return int(facts[key].split()[0]) << 10

        return Usage(
            time.monotonic(),
            kilobytes("VmRSS"),
            kilobytes("RssAnon"),
            kilobytes("RssShmem"),
            int(facts["Threads"]),
            len(list((proc / "fd").iterdir())),
        )


class Processes:
    """Those that run, by name."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, Process] = {}

    def __getitem__(self, name: str) -> Process:
        return self._running[name]

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start one; it is stopped when the `with` ends at the latest."""
        self._running[name] = Process(name, command, self._logs)

    def stop(self, name: str) -> None:
        """Stop one."""
        self._running.pop(name).stop()

    def kill(self, name: str) -> None:
        """SIGKILL one."""
        self._running.pop(name).kill()

    def check(self) -> None:
        """Raises UserError where one has ended."""
        for process in self._running.values():
            process.check()

    def stop_all(self) -> None:
        """Stop whatever still runs."""
        while self._running:
            self._running.popitem()[1].stop()


def module(name: str, *words: object) -> list[str]:
    """The command line of a module of this package."""
    return [sys.executable, "-m", f"rlrc_ros.ros_bench.{name}", *map(str, words)]


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Processes in a ROS domain of their own, which this one joins too; all end with the `with`."""
    logs.mkdir(parents=True, exist_ok=True)
    variables = {
        **TRANSPORT_ENVIRONMENT,
        # Not the domain of a robot that may be on the same network.
        "ROS_DOMAIN_ID": str(random.SystemRandom().randint(1, 101)),
        "ROS_LOG_DIR": str(logs),
        "PYTHONUNBUFFERED": "1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    started = Processes(logs)
    try:
        yield started
    finally:
        started.stop_all()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
