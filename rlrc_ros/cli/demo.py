"""`rlrc demo`: every stage of the compression, then the shipped policies against each other."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc_ros.cli.arguments import seed, whole_number
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

if TYPE_CHECKING:
    from rlrc_ros.trials.frames import FrameStrip
    from rlrc_ros.trials.records import EpisodeRecord

HELP = "compress a tiny policy, then try the shipped ones on the simulated arm over ROS 2"

ARMS = {"original": "tabletop-original", "compressed": "tabletop-compressed"}
FRAMES = 6
MARKER, REPORT, COMPRESS, TRIAL = ".rlrc-demo", "report.html", "compress", "trial"
"""What a demo's directory holds; the marker says that it is one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory for bags and report; a demo that was stopped goes on, a finished one is "
        "made anew",
    )
    parser.add_argument(
        "--pairs", type=whole_number(1), default=8, help="scenes to try both in (default 8)"
    )
    parser.add_argument(
        "--seed", type=seed, default=900_000, help="the first scene's seed (default 900000)"
    )
    parser.add_argument(
        "--skip-compress", action="store_true", help="only the trial, without the pipeline"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run it and print the table."""
    # Before anything else: what is missing should be said at once, not after the first part.
    import rlrc_ros.trials.client  # noqa: F401
    from rlrc_ros.trials.summary import summarise
    from rlrc_ros.trials.table import text_table

    say = _Clock()
    out: Path = arguments.out
    _claim(out)
    policies = {arm: _facts(bundle) for arm, bundle in ARMS.items()}
    compressed = None if arguments.skip_compress else _compress(out, say)
    records = _trial(arguments, out, say)
    summary = summarise(records, ("original", "compressed"))
    data = {
        "report": str(out / REPORT),
        "trial": summary.to_dict(),
        "policies": policies,
        "compress": compressed,
    }
    report = _report(arguments, out, records, summary, policies, compressed)
    emit(arguments, data, f"\n{text_table(summary, policies, width=100)}\n\nreport: {report}")
    return 0


def _claim(out: Path) -> None:
    """Make the directory, or make room in that of an earlier demo; leave anything else alone.

    Raises:
        UserError: other things are in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER
    if not marker.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds other files; name a new or an empty directory")
    marker.touch()
    if (out / REPORT).exists():
        shutil.rmtree(out / COMPRESS, ignore_errors=True)
        (out / REPORT).unlink()
    shutil.rmtree(out / TRIAL, ignore_errors=True)


class _Clock:
    """Says what is going on, and how long it has been."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        elapsed = time.monotonic() - self._began
        print(f"[{elapsed:4.0f} s] {line}", file=sys.stderr, flush=True)


def _compress(out: Path, say: _Clock) -> dict[str, Any]:
    from rlrc_ros.paths import config_file
    from training.compress import Pipeline
    from training.config import load_config

    say("part 1 of 2: every stage of `rlrc compress`, with hardly any work in it")
    config = load_config(config_file("training", "tiny"))
    return Pipeline(config, out / COMPRESS, "cpu", say).run()


def _facts(bundle: str) -> dict[str, Any]:
    from rlrc_ros.vla import load_policy
    from rlrc_ros.vla.inspection import inspect

    return {**inspect(bundle), "memory": load_policy(bundle).weight_bytes()}


def _trial(arguments: argparse.Namespace, out: Path, say: _Clock) -> list[EpisodeRecord]:
    from rlrc_ros.profile import load_profile
    from rlrc_ros.trials.records import read
    from rlrc_ros.trials.simulated import SimulatedTrial, run_trial

    trial = SimulatedTrial(arms=ARMS, pairs=arguments.pairs, first_seed=arguments.seed)
    say(f"part 2 of 2: {trial.pairs} scenes, the original and the compressed policy in each")
    directory = out / TRIAL

    def progress(record: EpisodeRecord) -> None:
        say(
            f"{record.pair + 1:>2}/{trial.pairs} {record.arm:<10} {record.outcome:<7} "
            f"{record.duration_s:4.1f} s  p50 {record.latency_ms_p50 or 0:5.1f} ms  "
            f"{record.instruction}"
        )

    run_trial(trial, load_profile("sim"), directory, progress)
    return read(directory / "episodes.jsonl")


def _report(
    arguments: argparse.Namespace,
    out: Path,
    records: list[EpisodeRecord],
    summary: Any,
    policies: dict[str, dict[str, Any]],
    compressed: dict[str, Any] | None,
) -> Path:
    from rlrc_ros.trials.report import write_report

    tables = {}
    if compressed:
        tables["The stages of rlrc compress, run with a tiny budget"] = [
            {
                "stage": stage["name"],
                "LLM parameters": stage["parameters"]["llm"],
                "bundle MB": round(stage["bundle_bytes"] / 1e6, 2),
                "success": f"{stage['successes']}/{stage['episodes']}",
            }
            for stage in compressed["stages"]
        ]
    path = out / REPORT
    write_report(
        path,
        title="Original against compressed on the simulated tabletop",
        summary=summary,
        records=records,
        policies=policies,
        frames=_frames(out / TRIAL, records),
        notes=[
            "Both policies ran as ROS 2 nodes on the simulated arm, in the same scenes, in random "
            "order. The simulator's state judged success. Every episode is recorded as a bag."
        ],
        tables=tables,
        commands=[f"rlrc demo --out DIR --pairs {arguments.pairs} --seed {arguments.seed}"],
    )
    return path


def _frames(directory: Path, records: list[EpisodeRecord]) -> FrameStrip | None:
    """Frames of the first pair that both policies solved, or else of the first pair."""
    import numpy as np

    from rlrc_ros.profile import load_profile
    from rlrc_ros.trials.frames import EpisodeFrames, FrameStrip

    by_pair: dict[int, dict[str, EpisodeRecord]] = {}
    for record in records:
        by_pair.setdefault(record.pair, {})[record.arm] = record
    whole = {n: pair for n, pair in by_pair.items() if all(r.bag_uri for r in pair.values())}
    if not whole:
        return None
    solved = [n for n, pair in whole.items() if all(r.outcome == "success" for r in pair.values())]
    number = min(solved or whole)
    pair = whole[number]
    times = np.linspace(0, max(record.duration_s for record in pair.values()), FRAMES)
    topic = "/" + load_profile("sim").cameras["front"].topic
    episodes = {}
    for arm in ARMS:
        record = pair[arm]
        frames = _at_times(directory / record.bag_uri, topic, times[times <= record.duration_s])
        episodes[arm] = EpisodeFrames(frames, record.outcome, record.duration_s)
    return FrameStrip([float(time) for time in times], episodes, pair=number)


def _at_times(bag: Path, topic: str, times: Any) -> list[Any]:
    """The camera's last frame before each time, in s since the bag's first frame."""
    from rlrc_ros.messages.image import image_to_rgb
    from rlrc_ros.rollouts.bag import read_messages

    frames: list[Any] = []
    latest, start = None, None
    for _, message, received in read_messages(bag, [topic]):
        start = received if start is None else start
        while len(frames) < len(times) and (received - start) * 1e-9 > times[len(frames)]:
            frames.append(latest if latest is not None else image_to_rgb(message))
        latest = image_to_rgb(message)
    return frames + [latest] * (len(times) - len(frames))
