"""The recorder alone, for what others do with the arm: teleoperation, another policy runner.

    ros2 launch rlrc record.launch.py profile:=my_arm.yaml output_dir:=demonstrations

Then call `/recorder/start` (rlrc/srv/StartRecording: an episode_id and an instruction) and
`/recorder/stop` (rlrc/srv/StopRecording).
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import OpaqueFunction
from launch_ros.actions import Node

from rlrc_ros import bringup, launching


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    names = ("profile", "output_dir", "record_topics", "use_sim_time", "enclave")
    return LaunchDescription(
        [
            *launching.arguments(*names),
            OpaqueFunction(function=_nodes),
        ]
    )


def _nodes(context: LaunchContext) -> list[Node]:
    nodes = bringup.nodes(
        launching.profile(context),
        output_dir=launching.argument(context, "output_dir"),
        record_topics=launching.words(launching.argument(context, "record_topics")),
        use_sim_time=launching.argument(context, "use_sim_time") == "true",
        enclave=launching.argument(context, "enclave"),
    )
    return launching.actions([spec for spec in nodes if spec.executable == "recorder_node"])
