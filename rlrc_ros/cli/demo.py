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
    from rlrc_ros.trials.plan import Plan
    from rlrc_ros.trials.state import Trial

HELP = "compress a tiny policy, then try the shipped ones on the simulated arm over ROS 2"

ARMS = {"original": "tabletop-original", "compressed": "tabletop-compressed"}
MARGIN = 0.03
MAX_DURATION = 12.0
"""s."""
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
        "--pairs", type=whole_number(2), default=10, help="scenes to try both in (default 10)"
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
    from rlrc_ros.trials.table import text_table

    say = _Clock()
    out: Path = arguments.out
    _claim(out)
    policies = {arm: _facts(bundle) for arm, bundle in ARMS.items()}
    compressed = None if arguments.skip_compress else _compress(out, say)
    _trial(arguments, out, say)
    summary = _report(arguments, out, policies, compressed, say)
    data = {
        "report": str(out / REPORT),
        "trial": summary.to_dict(),
        "policies": policies,
        "compress": compressed,
    }
    text = f"\n{text_table(summary, policies, width=100)}\n\nreport: {out / REPORT}, and as PDF"
    emit(arguments, data, text)
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
        (out / REPORT).with_suffix(".pdf").unlink(missing_ok=True)
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


def _trial(arguments: argparse.Namespace, out: Path, say: _Clock) -> None:
    from rlrc_ros.profile import load_profile
    from rlrc_ros.trials.session import TrialSession
    from rlrc_ros.trials.simulated import run_simulated

    say(f"part 2 of 2: {arguments.pairs} scenes, both policies in each, blinded")

    def progress(trial: Trial) -> None:
        say(
            f"{trial.number:>2}/{2 * arguments.pairs} {trial.outcome:<7} {trial.duration:4.1f} s  "
            f"{trial.instruction}"
        )

    with TrialSession.create(out / TRIAL, _plan(arguments)) as session:
        run_simulated(session, load_profile("sim"), progress)
        session.unblind()


def _plan(arguments: argparse.Namespace) -> Plan:
    """Every scene with its own task."""
    from rlrc_ros.sim.scene import sample_scene
    from rlrc_ros.trials.plan import Draft, DraftTask, Start, lock

    seeds: dict[str, list[int]] = {}
    for scene in range(arguments.seed, arguments.seed + arguments.pairs):
        seeds.setdefault(sample_scene(scene).family, []).append(scene)
    rubric = "success: the simulator finds the scene as its instruction says"
    tasks = tuple(
        DraftTask(name=name, rubric=rubric, starts=tuple(Start(seed=one) for one in some))
        for name, some in sorted(seeds.items())
    )
    draft = Draft(
        name="Original against compressed on the simulated tabletop",
        robot="sim",
        margin=MARGIN,
        max_duration=MAX_DURATION,
        arms=ARMS,
        tasks=tasks,
        pairs=arguments.pairs,
    )
    return lock(draft, Path())


def _report(
    arguments: argparse.Namespace,
    out: Path,
    policies: dict[str, dict[str, Any]],
    compressed: dict[str, Any] | None,
    say: _Clock,
) -> Any:
    from rlrc_ros.trials.dossier import write_dossier

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
    written = write_dossier(
        out / TRIAL,
        out / REPORT,
        policies,
        notes=[
            "Both policies ran as ROS 2 nodes on the simulated arm, in the same scenes, in random "
            "order. The simulator's state judged success. Every episode is recorded as a bag."
        ],
        tables=tables,
        commands=[f"rlrc demo --out DIR --pairs {arguments.pairs} --seed {arguments.seed}"],
        progress=say,
    )
    return written["compressed"][0]
