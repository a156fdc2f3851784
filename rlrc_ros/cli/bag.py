"""`rlrc bag`: look after recorded episodes."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rlrc_ros.cli import bag_export
from rlrc_ros.cli.output import emit
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.repair import repair
from rlrc_ros.rollouts.verify import BagReport, verify

HELP = "verify, repair and export recorded episodes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do, and with which bag."""
    parser.epilog = "Every action takes --json."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    helps = {
        "verify": "is it whole, and what is in it; exit status 1 where something is wrong",
        "repair": "make a cut-off recording whole again, and keep the original",
    }
    for name, text in helps.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("bag", help="the bag's directory")
        if name == "verify":
            action.add_argument(
                "--profile",
                help="the robot, a YAML file or the name of one in config/robots; what it names "
                "and the bag lacks is wrong too",
            )
    export = actions.add_parser("export", help=bag_export.HELP, description=bag_export.HELP)
    bag_export.add_arguments(export)


def main(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    return {"verify": _verify, "repair": _repair, "export": bag_export.main}[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    report = verify(args.bag, load_profile(args.profile) if args.profile else None)
    emit(args, asdict(report), _for_people(report))
    return 0 if report.ok else 1


def _for_people(report: BagReport) -> str:
    lines = [
        f"{report.uri}: {report.messages} messages, {report.duration:.1f} s,"
        f" {report.bytes / 1e6:.1f} MB"
    ]
    if report.episode is not None:
        episode = report.episode
        lines.append(
            f"{episode.policy_label or 'no policy'}: {episode.instruction or 'no instruction'};"
            f" ended: {episode.termination_reason or 'unknown'}, outcome: {episode.outcome}"
        )
    width = max((len(topic.topic) for topic in report.topics), default=0)
    for topic in report.topics:
        lines.append(
            f"  {topic.topic:{width}}  {topic.messages:7d}  {topic.rate:7.1f} Hz"
            f"  longest interval {topic.longest_interval:.3f} s, {topic.gaps} gaps  {topic.type}"
        )
    lines += report.problems + report.losses
    lines += ["ok"] if report.ok else []
    return "\n".join(lines)


def _repair(args: argparse.Namespace) -> int:
    repaired = repair(args.bag)
    text = (
        f"{repaired.uri} is whole, {repaired.messages} messages; {repaired.lost_bytes} bytes"
        f" were lost; the original is {repaired.original}"
    )
    emit(args, asdict(repaired), text)
    return 0
