"""What the launch files share: their arguments, and the nodes of `bringup` as launch actions.

Only for `ros2 launch`, whose libraries come with the ROS distribution.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from launch import LaunchContext, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import RobotProfile, load_profile

_YES_OR_NO = ["true", "false"]
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "profile": {
        "description": "the robot: a YAML file, or the name of one in config/robots: sim, fr3, "
        "ur5e, xarm7, so101. Compare it with the running robot first: rlrc robot check PROFILE"
    },
    "policies": {
        "default_value": "",
        "description": "bundles as LABEL=BUNDLE,LABEL=BUNDLE, all loaded at once; an episode names "
        "its label, the first is taken where it names none. Empty: those of the profile",
    },
    "device": {
        "default_value": "cpu",
        "description": "where policies run, as torch names it: cpu, cuda, cuda:1",
    },
    "output_dir": {
        "default_value": "rollouts",
        "description": "where recordings go, one directory an episode",
    },
    "record_topics": {
        "default_value": "",
        "description": "topics to record as TOPIC,TOPIC. Empty: every one there is",
    },
    "dry_run": {
        "default_value": "false",
        "choices": _YES_OR_NO,
        "description": "true: everything runs, and the command guard sends nothing to the "
        "controllers. Begin with it on a real arm",
    },
    "use_sim_time": {
        "default_value": "false",
        "choices": _YES_OR_NO,
        "description": "true: stamps are of the topic /clock, as with Gazebo. Never on a real arm",
    },
    "enclave": {
        "default_value": "",
        "description": "where the nodes' SROS 2 enclaves are: with /rlrc the command guard takes "
        "/rlrc/command_guard, the policy node /rlrc/policy, and so on. Empty: none",
    },
}


def arguments(*names: str, **others: str) -> list[LaunchDescriptionEntity]:
    """Declarations of a launch file's arguments, and a look for misspelled ones.

    Args:
        names: of those that launch files share.
        others: descriptions of the file's own, by name.
    """
    own = [DeclareLaunchArgument(name, description=text) for name, text in others.items()]
    shared = [DeclareLaunchArgument(name, **_ARGUMENTS[name]) for name in names]
    return [OpaqueFunction(function=_refuse_misspelled, args=[[*others, *names]]), *own, *shared]


def _refuse_misspelled(context: LaunchContext, known: list[str]) -> None:
    """`ros2 launch` passes over arguments that it does not know: `dryrun:=true` moves the arm."""
    for word in context.argv:
        name, given, _ = word.partition(":=")
        # Not every stranger: it may belong to a launch file that includes this one.
        close = difflib.get_close_matches(name, known, n=1)
        if given and name not in known and close:
            raise UserError(f"there is no argument '{name}'; did you mean '{close[0]}'?")


def argument(context: LaunchContext, name: str) -> str:
    """What was given for an argument."""
    return LaunchConfiguration(name).perform(context).strip()


def profile(context: LaunchContext) -> RobotProfile:
    """The profile of the argument `profile`."""
    return load_profile(Path(argument(context, "profile")).expanduser())


def specs(context: LaunchContext, robot: RobotProfile) -> list[bringup.NodeSpec]:
    """The nodes of a robot, as the arguments have them."""
    return bringup.nodes(
        robot,
        output_dir=argument(context, "output_dir"),
        policies=_policies(argument(context, "policies")),
        record_topics=words(argument(context, "record_topics")),
        dry_run=argument(context, "dry_run") == "true",
        device=argument(context, "device"),
        use_sim_time=argument(context, "use_sim_time") == "true",
        enclave=argument(context, "enclave"),
    )


def actions(nodes: list[bringup.NodeSpec]) -> list[Node]:
    """Launch actions that start the nodes; when one of them ends, all are stopped.

    `ros2 launch` has exit status 1 where one ended by itself with another status than 0.
    """
    return [
        Node(
            package="rlrc",
            executable=spec.executable,
            # Not `parameters`: those may not be empty lists, as a profile without policies has one.
            ros_arguments=spec.ros_arguments(),
            additional_env=bringup.TRANSPORT_ENVIRONMENT,
            output="screen",
            on_exit=_ended,
        )
        for spec in nodes
    ]


def _ended(event: ProcessExited, context: LaunchContext) -> Shutdown | None:
    if context.is_shutdown:
        return None
    if event.returncode:
        raise UserError(f"{event.process_name} has ended, and all nodes are stopped")
    return Shutdown(reason=f"{event.process_name} has ended")


def words(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _policies(text: str) -> dict[str, str] | None:
    policies: dict[str, str] = {}
    for word in words(text):
        label, _, bundle = word.partition("=")
        if not label or not bundle:
            raise UserError(f"policies: '{word}' is not LABEL=BUNDLE")
        if label in policies:
            raise UserError(f"policies: there are two called '{label}'")
        policies[label] = bundle
    return policies or None
