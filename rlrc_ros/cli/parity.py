"""`rlrc parity`: whether an OpenVLA checkpoint gives here what it gives upstream."""

from __future__ import annotations

import argparse
from typing import Any

from rlrc_ros.cli.output import emit

HELP = "check a checkpoint's actions against upstream's own, in the expected.json beside it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", metavar="DIR", help="OpenVLA checkpoint directory")


def main(arguments: argparse.Namespace) -> int:
    """Compare; the status is 1 where they do not agree."""
    from rlrc_ros.vla.parity import parity

    result = parity(arguments.checkpoint)
    emit(arguments, result, _for_people(result))
    return 0 if result["agree"] else 1


def _for_people(result: dict[str, Any]) -> str:
    lines = [f"{'image':<20}{'tokens':>10}{'actions':>11}{'logits':>11}{'pixels':>11}"]
    for case in result["cases"]:
        differences = ("max_action_diff", "max_logit_diff", "max_pixel_stat_diff")
        tokens = "equal" if case["tokens_equal"] else "DIFFERENT"
        numbers = "".join(f"{case[name]:>11.1e}" for name in differences)
        lines.append(f"{case['image']:<20}{tokens:>10}{numbers}")
    lines.append(
        "agrees with upstream"
        if result["agree"]
        else "does NOT agree with upstream (tokens equal; actions within 1e-6, logits 1e-3, pixel "
        "statistics 1e-4)"
    )
    return "\n".join(lines)
