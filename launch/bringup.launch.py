"""The nodes of a robot: command guard, recorder and policies, for drivers that run already.

    ros2 launch rlrc bringup.launch.py profile:=my_arm.yaml policies:=A=original,B=compressed

`--show-args` after it describes the arguments. Begin with `dry_run:=true` on a real arm.
When a node ends, all of them are stopped.
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import OpaqueFunction
from launch_ros.actions import Node

from rlrc_ros import launching


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    names = ("profile", "policies", "device", "output_dir", "record_topics", "dry_run")
    return LaunchDescription(
        [*launching.arguments(*names, "use_sim_time", "enclave"), OpaqueFunction(function=_nodes)]
    )


def _nodes(context: LaunchContext) -> list[Node]:
    return launching.actions(launching.specs(context, launching.profile(context)))
