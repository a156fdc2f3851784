"""The nodes of a blinded trial: its policies sealed, its recordings in its directory.

    rlrc trial begin runs/trial --plan plan.yaml
    ros2 launch rlrc trial.launch.py dir:=runs/trial

then, beside it, the operator's side, as often as it takes:

    rlrc trial run runs/trial --attach

`dry_run:=true` keeps the arm still. When a node ends, all of them are stopped.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from rlrc_ros import bringup
from rlrc_ros.profile import load_profile
from rlrc_ros.trials import seal
from rlrc_ros.trials.session import read_trial
from rlrc_ros.trials.state import BAGS


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("dir", description="the trial's directory"),
            DeclareLaunchArgument(
                "dry_run",
                default_value="false",
                choices=["true", "false"],
                description="true: the command guard sends nothing to the controllers",
            ),
            OpaqueFunction(function=_nodes),
        ]
    )


def _nodes(context: LaunchContext) -> list[Node]:
    def argument(name: str) -> str:
        return LaunchConfiguration(name).perform(context).strip()

    directory = Path(argument("dir")).expanduser().resolve()
    plan = read_trial(directory).plan
    specs = bringup.nodes(
        load_profile(plan.robot),
        output_dir=str(directory / BAGS),
        sealed=str(directory / seal.FILE),
        dry_run=argument("dry_run") == "true",
    )
    return [
        Node(
            package="rlrc",
            executable=spec.executable,
            ros_arguments=spec.ros_arguments(),
            additional_env=bringup.TRANSPORT_ENVIRONMENT,
            output="screen",
            on_exit=Shutdown(),
        )
        for spec in specs
    ]
