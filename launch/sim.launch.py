"""The simulated arm, with its command guard, recorder and policies.

    ros2 launch rlrc sim.launch.py output_dir:=runs/rollouts

The arguments are those of bringup.launch.py, but for the profile: that is config/robots/sim.yaml.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    robot = PythonLaunchDescriptionSource(str(Path(__file__).with_name("bringup.launch.py")))
    return LaunchDescription(
        [IncludeLaunchDescription(robot, launch_arguments={"profile": "sim"}.items())]
    )
