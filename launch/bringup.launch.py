"""The nodes of a robot: command guard, recorder and policies, for drivers that run already.

    ros2 launch rlrc bringup.launch.py profile:=my_arm.yaml policies:=A=original,B=compressed

`ros2 launch rlrc bringup.launch.py --show-args` describes the arguments. Begin with `dry_run:=true`.
When a node ends, all of them are stopped.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "profile", description="the robot: a YAML file, or the name of one in config/robots"
            ),
            DeclareLaunchArgument(
                "policies",
                default_value="",
                description="bundles as LABEL=BUNDLE,LABEL=BUNDLE; empty: those of the profile",
            ),
            DeclareLaunchArgument(
                "output_dir", default_value="rollouts", description="where recordings go"
            ),
            DeclareLaunchArgument(
                "record_topics",
                default_value="",
                description="topics to record as TOPIC,TOPIC; empty: every one there is",
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

    specs = bringup.nodes(
        load_profile(Path(argument("profile")).expanduser()),
        output_dir=argument("output_dir"),
        policies=_policies(argument("policies")),
        record_topics=_words(argument("record_topics")),
        dry_run=argument("dry_run") == "true",
    )
    return [
        Node(
            package="rlrc",
            executable=spec.executable,
            # Not `parameters`: those may not be empty lists, as a profile without policies has one.
            ros_arguments=spec.ros_arguments(),
            additional_env=bringup.TRANSPORT_ENVIRONMENT,
            output="screen",
            on_exit=Shutdown(),
        )
        for spec in specs
    ]


def _policies(text: str) -> dict[str, str] | None:
    policies: dict[str, str] = {}
    for word in _words(text):
        label, _, bundle = word.partition("=")
        if not label or not bundle:
            raise UserError(f"policies: '{word}' is not LABEL=BUNDLE")
        if label in policies:
            raise UserError(f"policies: there are two called '{label}'")
        policies[label] = bundle
    return policies or None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
