"""The nodes of a blinded trial: its policies sealed, its recordings in its directory.

    ros2 launch rlrc trial.launch.py dir:=runs/trial plan:=plan.yaml

then, beside it, the operator's side, as often as it takes:

    rlrc trial run runs/trial --attach

Without `plan` the trial in the directory is resumed. `dry_run:=true` keeps the arm still.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from rlrc_ros import bringup
from rlrc_ros.profile import load_profile
from rlrc_ros.trials import seal
from rlrc_ros.trials.plan import read_plan
from rlrc_ros.trials.session import TrialSession, is_begun, read_trial
from rlrc_ros.trials.state import BAGS


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("dir", description="the trial's directory"),
            DeclareLaunchArgument(
                "plan", default_value="", description="the locked plan of a trial that is to begin"
            ),
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
    if argument("plan") and not is_begun(directory):
        path = Path(argument("plan")).expanduser()
        TrialSession.create(directory, read_plan(path), images=path.parent).close()
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
