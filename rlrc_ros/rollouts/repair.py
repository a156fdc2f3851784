"""Making a bag whole again whose recorder was killed, or whose disk was full."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts import episode as episodes
from rlrc_ros.rollouts.mcap_file import Index, Scan, scan
from rlrc_ros.rollouts.metadata import FILE as METADATA
from rlrc_ros.rollouts.metadata import compression_of, write_metadata
from rlrc_ros.rollouts.recording import PARTIAL
from rlrc_ros.rollouts.verify import mcap_files

REPAIRING, DAMAGED = ".repairing", ".damaged"
INTERRUPTED = "recording_interrupted"
"""The termination reason of an episode whose recorder did not live to hear of its end."""


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What `repair` made."""

    uri: str
    """The whole bag."""
    original: str
    """Where the damaged one lies now."""
    messages: int
    lost_bytes: int
    """Bytes of the original after its last whole record; not a message could be read in them."""


def repair(uri: str | Path) -> Repaired:
    """Make a whole bag of everything up to the first damage.

    `X.partial` or a damaged `X` becomes a whole `X`; the original is kept as `X.damaged`.

    Args:
        uri: The bag's directory.

    Raises:
        UserError: There is nothing to repair, it is being recorded right now, or there is no room.
    """
    damaged = Path(uri).resolve()
    whole = damaged.with_name(damaged.name.removesuffix(PARTIAL))
    kept = whole.with_name(whole.name + DAMAGED)
    build = whole.with_name(whole.name + REPAIRING)
    if kept.exists() and build.exists() and not damaged.exists():
        return _finish_earlier(build, kept, whole)
    files = _files_to_repair(damaged)
    if whole != damaged and whole.exists():
        raise UserError(f"{whole} exists already: move it or {damaged} away first")
    if kept.exists():
        raise UserError(f"{kept} exists already, from an earlier repair: move it away first")
    _refuse_if_recording(files)
    scans = {file: scan(file) for file in files}
    is_finished = whole == damaged and (damaged / METADATA).exists()
    if is_finished and not any(found.problem for found in scans.values()):
        raise UserError(f"{damaged} is whole: there is nothing to repair")
    shutil.rmtree(build, ignore_errors=True)
    try:
        lost = _rebuild(build, damaged, scans)
        damaged.rename(kept)
        build.rename(whole)
    except OSError as error:
        raise UserError(f"cannot repair {damaged}: {error.strerror}") from None
    finally:
        shutil.rmtree(build, ignore_errors=True)
    messages = sum(sum(found.index.counts.values()) for found in scans.values())
    return Repaired(uri=str(whole), original=str(kept), messages=messages, lost_bytes=lost)


def _finish_earlier(build: Path, kept: Path, whole: Path) -> Repaired:
    """End a repair that was killed after it had set the original aside."""
    scans = {file: scan(file) for file in mcap_files(kept)}
    lost = sum(file.stat().st_size - found.end for file, found in scans.items() if found.problem)
    build.rename(whole)
    messages = sum(sum(found.index.counts.values()) for found in scans.values())
    return Repaired(uri=str(whole), original=str(kept), messages=messages, lost_bytes=lost)


def _files_to_repair(damaged: Path) -> list[Path]:
    """The files of a bag; without those of a recorder that was killed before it wrote anything."""
    files = list(damaged.glob("*.mcap"))
    if (
        damaged.is_dir()
        and damaged.name.endswith(PARTIAL)
        and not any(file.stat().st_size for file in files)
    ):
        raise UserError(f"nothing was recorded in {damaged}: delete it")
    return mcap_files(damaged)


def _refuse_if_recording(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{file} is being recorded right now: stop that first") from None


def _rebuild(build: Path, damaged: Path, scans: dict[Path, Scan]) -> int:
    build.mkdir()
    lost = 0
    for file, found in scans.items():
        if found.problem:
            lost += file.stat().st_size - found.end
            _copy_whole_part(file, build / file.name, found)
        else:
            shutil.copyfile(file, build / file.name)
    indexes = {file.name: found.index for file, found in scans.items()}
    write_metadata(build, indexes, compression_of(damaged))
    if (damaged / episodes.FILE).exists():
        episodes.write_episode(build, _mended_episode(damaged, indexes, lost))
    return lost


def _copy_whole_part(source: Path, target: Path, found: Scan) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        left = found.end
        while left and (block := reader.read(min(left, 8 << 20))):
            writer.write(block)
            left -= len(block)
        writer.write(found.appendix)
        writer.write(found.index.tail(found.end + len(found.appendix)))
        writer.flush()
        os.fsync(writer.fileno())


def _mended_episode(damaged: Path, indexes: dict[str, Index], lost: int) -> episodes.Episode:
    episode = episodes.read_episode(damaged)
    counts: dict[str, int] = {}
    for index in indexes.values():
        for topic, (_, count) in index.topics().items():
            counts[topic] = counts.get(topic, 0) + count
    episode.message_counts = counts
    episode.termination_reason = episode.termination_reason or INTERRUPTED
    end = max(index.span[1] for index in indexes.values())
    if not episode.stop_time and end:
        episode.stop_time = episodes.iso_time(end * 1e-9)
    if not episode.recording_error:
        episode.recording_error = f"the recording was cut off; repaired, {lost} bytes were lost"
    return episode
