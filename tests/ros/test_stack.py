"""All the nodes together, as a robot profile lists them."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import twist_array
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from rlrc_ros.profile import load_profile
from rlrc_ros.trials.simulated import running_nodes
from tests.ros.conftest import a_tester


@pytest.fixture
def profile():
    """The simulated robot; its sensors may be late, as they are on a machine busy with tests."""
    profile = load_profile("sim")
    cameras = {"front": replace(profile.cameras["front"], max_age=0.5)}
    return replace(
        profile, cameras=cameras, joint_states=replace(profile.joint_states, max_age=0.5)
    )


def test_the_arm_stops_when_the_policy_node_is_killed(start, bundles, profile, tmp_path):
    policies = {"original": str(bundles["original"].path)}
    specs = bringup.nodes(profile, output_dir=str(tmp_path / "bags"), policies=policies)
    processes = {
        spec.executable: start([*spec.command(), "-r", "__ns:=/killed"])
        for spec in specs
        if spec.executable != "recorder_node"
    }
    with a_tester("killed") as ros:
        twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        poses = ros.collect(PoseStamped, "ee_pose", SENSOR_QOS)
        states = ros.collect(GuardStatus, "command_guard/status")
        commands = ros.collect(PolicyCommand, "policy_command")
        diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
        action = ActionClient(ros.node, RunEpisode, "policy/run_episode")
        assert ros.until(action.server_is_ready)
        assert ros.until(lambda: poses and states)

        def begin():
            """The node takes no goals before its policies are loaded."""
            goal = RunEpisode.Goal(instruction="put the red cube on the blue plate")
            goal.max_duration, goal.episode_id = 60.0, "killed"
            future = action.send_goal_async(goal)
            return ros.until(future.done) and future.result().accepted

        assert ros.until(begin)
        assert ros.until(lambda: any(twist_array(m.twist).any() for _, m in twists))
        commands.clear()
        assert ros.until(lambda: commands)
        before = states[-1][1]
        processes["policy_node"].send(signal.SIGKILL)
        processes["policy_node"].wait()

        assert ros.until(lambda: states[-1][1].liveliness_lost > before.liveliness_lost, 5.0)
        assert states[-1][1].stops_on_silence == before.stops_on_silence, "death is noticed first"
        assert states[-1][1].state in ("holding", "waiting")
        reason = "holding: a policy's process gives no sign of life"
        assert ros.until(lambda: reason in [s.message for _, d in diagnostics for s in d.status])
        assert ros.until(lambda: not twist_array(twists[-1][1].twist).any(), 5.0)
        ros.spin(0.5)  # the arm comes to rest
        twists.clear(), poses.clear()
        ros.spin(1.0)
        assert not any(twist_array(m.twist).any() for _, m in twists)
        points = [m.pose.position for _, m in poses]
        assert max(p.x for p in points) - min(p.x for p in points) < 1e-3
        assert max(p.z for p in points) - min(p.z for p in points) < 1e-3


def test_nodes_end_and_the_environment_is_as_before_where_one_cannot_start(
    ros_environment, monkeypatch, tmp_path
):
    monkeypatch.setenv("ROS_DOMAIN_ID", "101")
    recorder = bringup.NodeSpec("recorder_node", {"output_dir": str(tmp_path)})
    specs = [recorder, bringup.NodeSpec("absent_node")]
    with pytest.raises(UserError, match="absent_node"), running_nodes(specs, tmp_path / "logs"):
        pytest.fail("started")
    assert bringup.os.environ["ROS_DOMAIN_ID"] == "101"
    command = str(Path(recorder.command()[0]))
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(command.encode() in line and str(tmp_path).encode() in line for line in running)
