"""`rlrc robot`: a robot profile against the robot that is running."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

if TYPE_CHECKING:
    from rlrc_ros.robot_check import Finding

HELP = "compare a robot profile with the live ROS graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "action",
        choices=["check"],
        help="check: say what does not fit, before anything moves; nothing is published",
    )
    parser.add_argument("profile", help="a YAML file, or the name of one in config/robots")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="BUNDLE",
        help="compare with what this policy needs, instead of the profile's own; repeatable",
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="how long to listen (default: 3)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 where something does not fit."""
    from rlrc_ros.profile import load_profile

    if not 0.5 <= arguments.seconds <= 600.0:
        raise UserError(f"--seconds is {arguments.seconds:g}: it must be between 0.5 and 600")
    profile = load_profile(arguments.profile)
    from rlrc_ros.robot_check import check, report
    from rlrc_ros.vla.bundle import open_bundle

    given = {path: path for path in arguments.policy} or profile.policies
    policies = {label: open_bundle(path).config for label, path in given.items()}
    findings = check(profile, policies, arguments.seconds)
    data = report(findings)
    emit(arguments, {"profile": profile.name, **data}, _for_people(profile.name, findings))
    return 0 if data["ok"] else 1


def _for_people(name: str, findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        mark, said = ("FAIL", finding.problem) if finding.problem else ("ok", finding.detail)
        lines.append(f"{mark:<5}{finding.part:<20}{finding.topic}: {said}")
    problems = sum(bool(finding.problem) for finding in findings)
    lines.append(
        f"{name}: {problems} of {len(findings)} do not fit" if problems else f"{name} fits"
    )
    return "\n".join(lines)
