"""`rlrc bag export`: recorded episodes as training data."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.episode import OUTCOMES, UNLABELLED

HELP = "turn recorded episodes into training data: what the policy saw, and what it did"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "bags", type=Path, nargs="+", metavar="BAG", help="bags, or directories with bags in them"
    )
    parser.add_argument("--out", type=Path, required=True, help="the new data's directory")
    parser.add_argument(
        "--format",
        choices=("sft", "lerobot"),
        default="sft",
        help="sft: shards for --demonstrations of `rlrc sft` (the default); lerobot: a "
        "LeRobotDataset v3, frames as PNG",
    )
    parser.add_argument(
        "--contract",
        required=True,
        metavar="BUNDLE",
        help="the policy the data are for: its cameras, joints and control rate",
    )
    parser.add_argument(
        "--profile", required=True, help="the robot that was recorded: a profile's name or file"
    )
    parser.add_argument(
        "--outcome",
        nargs="+",
        choices=(*OUTCOMES, UNLABELLED),
        default=["success"],
        help="only episodes so labelled (default: success)",
    )
    parser.add_argument(
        "--task", nargs="+", default=[], help="only instructions with one of these in them"
    )
    parser.add_argument(
        "--policy",
        nargs="+",
        default=[],
        help="only episodes of these policies: labels, or six or more first digits of hashes",
    )


def main(arguments: argparse.Namespace) -> int:
    """Export; an existing directory is not replaced."""
    from rlrc_ros.profile import load_profile
    from rlrc_ros.rollouts.alignment import Contract
    from rlrc_ros.rollouts.export import ExportReport, Filters, find_bags
    from rlrc_ros.vla.bundle import open_bundle

    out: Path = arguments.out
    if out.exists():
        raise UserError(f"{out}: is there already; name another directory, or delete it")
    contract = Contract(open_bundle(arguments.contract).config, load_profile(arguments.profile))
    filters = Filters(outcomes=arguments.outcome, tasks=arguments.task, policies=arguments.policy)
    bags, report = find_bags(arguments.bags), ExportReport()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(arguments.format, partial, bags, contract, filters, report)
        if not report.episodes:
            raise UserError(f"none of {len(bags)} bags was exported{_left_out(report)}")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    emit(arguments, {"out": str(out), **vars(report)}, _for_people(out, report))
    return 0


def _write(
    kind: str, directory: Path, bags: list[Path], contract: Any, filters: Any, report: Any
) -> None:
    from tqdm import tqdm

    from rlrc_ros.rollouts.export import rollouts

    progress = tqdm(bags, desc="bags", unit="bag")
    if kind == "lerobot":
        from rlrc_ros.rollouts import lerobot

        frames = rollouts(progress, contract, filters, lerobot.encode, report)
        lerobot.LeRobotWriter(directory, contract).write(frames)
    else:
        from training.data.rollouts import SftEncoder, write_sft

        encoder = SftEncoder(contract.config)
        write_sft(directory, rollouts(progress, contract, filters, encoder, report))


def _left_out(report: Any) -> str:
    reasons = [f"{count} with {reason}" for reason, count in report.refused.items()]
    reasons += [f"{bag}: {reason}" for bag, reason in report.unusable.items()]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _for_people(out: Path, report: Any) -> str:
    lines = [f"{out}: {report.episodes} episodes, {report.steps} steps"]
    if report.missed:
        lines.append(f"  {report.missed} control periods in them had no command")
    lines += [f"  {count} steps lost: {reason}" for reason, count in report.lost.items()]
    lines += [f"  left out: {count} with {reason}" for reason, count in report.refused.items()]
    lines += [f"  unusable: {bag}: {reason}" for bag, reason in report.unusable.items()]
    return "\n".join(lines)
