"""The simulated arm, with its command guard, recorder and policies.

    ros2 launch rlrc sim.launch.py output_dir:=runs/rollouts

The robot is config/robots/sim.yaml. When a node ends, all of them are stopped.
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import OpaqueFunction, SetLaunchConfiguration
from launch_ros.actions import Node

from rlrc_ros import launching
from rlrc_ros.profile import load_profile


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    names = ("policies", "device", "output_dir", "record_topics", "dry_run", "enclave")
    return LaunchDescription(
        [
            *launching.arguments(*names),
            SetLaunchConfiguration("use_sim_time", "false"),  # it follows the wall clock
            OpaqueFunction(function=_nodes),
        ]
    )


def _nodes(context: LaunchContext) -> list[Node]:
    return launching.actions(launching.specs(context, load_profile("sim")))
