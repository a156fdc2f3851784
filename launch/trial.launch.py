"""The nodes of a blinded trial: its policies sealed, its recordings in its directory.

    rlrc trial begin runs/trial --plan plan.yaml
    ros2 launch rlrc trial.launch.py dir:=runs/trial

then, beside it, the operator's side, as often as it takes:

    rlrc trial run runs/trial --attach

`dry_run:=true` keeps the arm still. When a node ends, all of them are stopped.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import OpaqueFunction
from launch_ros.actions import Node

from rlrc_ros import bringup, launching
from rlrc_ros.profile import load_profile
from rlrc_ros.trials import seal
from rlrc_ros.trials.session import read_trial
from rlrc_ros.trials.state import BAGS


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            *launching.arguments(
                *("device", "dry_run", "use_sim_time", "enclave"),
                dir="the trial's directory, as `rlrc trial begin` made it",
            ),
            OpaqueFunction(function=_nodes),
        ]
    )


def _nodes(context: LaunchContext) -> list[Node]:
    directory = Path(launching.argument(context, "dir")).expanduser().resolve()
    return launching.actions(
        bringup.nodes(
            load_profile(read_trial(directory).plan.robot),
            output_dir=str(directory / BAGS),
            sealed=str(directory / seal.FILE),
            device=launching.argument(context, "device"),
            dry_run=launching.argument(context, "dry_run") == "true",
            use_sim_time=launching.argument(context, "use_sim_time") == "true",
            enclave=launching.argument(context, "enclave"),
        )
    )
