"""`rlrc convert`: a bundle from a checkpoint as upstream publishes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlrc_ros.cli.arguments import whole_number
from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

HELP = "make a bundle of an OpenVLA, OpenVLA-OFT or pi0 checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's directory")
    parser.add_argument(
        "--unnorm-key",
        metavar="KEY",
        help="which data set's statistics scale its actions (not needed where there is one)",
    )
    parser.add_argument(
        "--cameras",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the robot profile's cameras that it looks through, in order, the third-person view "
        "first (default: front, for OpenVLA-OFT wrist too, for pi0 those of the checkpoint)",
    )
    parser.add_argument(
        "--joints",
        nargs="+",
        default=[],
        metavar="NAME",
        help="joints that are its proprioception, in order (a checkpoint does not name them)",
    )
    parser.add_argument(
        "--ee-pose",
        action="store_true",
        help="its proprioception begins with the end effector's position and rotation vector, six "
        "values, as LIBERO's does; --joints names the rest",
    )
    parser.add_argument(
        "--control-rate",
        type=_hertz,
        metavar="HZ",
        help="of the data that it was trained on (default 5, BridgeData's; pi0: 20, LIBERO's)",
    )
    parser.add_argument(
        "--chunk",
        type=whole_number(1),
        help="actions in a chunk of OpenVLA-OFT (default: upstream's, 8, or 5 for BridgeData)",
    )
    parser.add_argument(
        "--center-crop",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of an image's area to look at: 0.9 where upstream trained with image_aug, as its "
        "LIBERO checkpoints were (default 1)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Convert."""
    from rlrc_ros.vla.conversion import convert
    from rlrc_ros.vla.inspection import inspect

    if arguments.out.exists():
        raise UserError(f"{arguments.out}: is there already; name another directory, or delete it")
    bundle = convert(
        arguments.checkpoint,
        arguments.out,
        unnorm_key=arguments.unnorm_key,
        cameras=arguments.cameras,
        joints=arguments.joints,
        ee_pose=arguments.ee_pose,
        control_rate=arguments.control_rate,
        chunk=arguments.chunk,
        center_crop=arguments.center_crop,
    )
    facts = inspect(bundle.path)
    takes = bundle.config.proprioception
    lines = [
        f"{bundle.path}  {bundle.hash[:12]}  {facts['bundle_bytes'] / 1e6:.1f} MB",
        f"  cameras: {', '.join(camera['name'] for camera in facts['cameras'])}",
        f"  proprioception: {', '.join(takes.names) if takes else 'none'}",
        f"  control rate: {facts['control_rate']:g} Hz; actions in a chunk: {facts['chunk']}",
    ]
    emit(arguments, facts, "\n".join(lines))
    return 0


def _hertz(text: str) -> float:
    """An argparse type: a rate that an arm can be commanded at."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1000.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from above 0 to 1000 Hz")
    return value
