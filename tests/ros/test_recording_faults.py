"""What breaks while an episode is recorded: the arm stops, it is said why, the bag is kept."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from rlrc_ros import bringup
from rlrc_ros.messages.command import command_arrays, twist_array
from rlrc_ros.nodes.common import COMMAND_QOS
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.episode import read_episode
from rlrc_ros.rollouts.repair import INTERRUPTED, repair
from rlrc_ros.rollouts.verify import verify
from tests.ros.conftest import a_tester
from tests.ros.policy_robot import CLIENT, INSTRUCTION
from tests.ros.test_recorder import TALKER, Recorder, sent


class Stack:
    """The simulated robot's nodes, each of which can be killed and started again."""

    def __init__(self, ros, start, bundle, directory, namespace="", environment=None):
        self.ros, self._start, self._namespace = ros, start, namespace
        self._environment = environment
        profile = load_profile("sim")
        camera = replace(profile.cameras["front"], max_age=0.5)
        joints = replace(profile.joint_states, max_age=0.5)
        profile = replace(profile, cameras={"front": camera}, joint_states=joints)
        self.bags = directory / "bags"
        specs = bringup.nodes(
            profile, output_dir=str(self.bags), policies={"original": str(bundle.path)}
        )
        self.specs = {spec.executable: spec for spec in specs}
        self.processes = {name: self.start(name) for name in self.specs}
        self.twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        self.commands = ros.collect(PolicyCommand, "policy_command")
        self._diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
        self._action = ActionClient(ros.node, RunEpisode, "policy/run_episode")

    def start(self, name):
        words = [*self.specs[name].command(), "-r", f"__ns:=/{self._namespace}"]
        return self._start(words, environment=self._environment)

    def send(self, name, number):
        self.processes[name].send(number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def restart(self, name):
        self.processes[name] = self.start(name)

    def begin(self, episode_id, seconds=60.0):
        """A recorded episode in which the arm has moved for 1 s; the future of its result.

        Asked for again until the recorder has been found and the policy takes the goal.
        """
        goal = RunEpisode.Goal(instruction=INSTRUCTION, max_duration=seconds, record=True)
        goal.episode_id = episode_id
        self.twists.clear(), self.commands.clear()
        ready = self.ros.until(self._action.server_is_ready, 60.0)
        assert ready, f"the policy node does not start; {self.state()}"
        outcome = []

        def begun():
            if any(twist_array(m.twist).any() for _, m in self.twists):
                return True
            if not outcome or outcome[-1].done():
                sent = self._action.send_goal_async(goal)
                if self.ros.until(sent.done, 5.0) and sent.result().accepted:
                    outcome.append(sent.result().get_result_async())
            return False

        assert self.ros.until(begun, 40.0), f"the arm does not move; {self.state()}"
        self.ros.spin(1.0)
        return outcome[-1]

    def result(self, future):
        assert self.ros.until(future.done, 30.0), f"the episode does not end; {self.state()}"
        return future.result().result

    def state(self):
        """Of each process, whether it runs and what it said last."""
        return "; ".join(
            f"{name}: {process.popen.poll()}, {process.output.splitlines()[-1:]}"
            for name, process in self.processes.items()
        )

    def stopped(self):
        """The policy's last command and the guard's say stop."""

        def stands():
            said = self.commands and not command_arrays(self.commands[-1][1]).twist.any()
            return said and not twist_array(self.twists[-1][1].twist).any()

        return self.ros.until(stands)

    def diagnosed(self, name, words):
        """Whether a node's diagnostics come to say so."""

        def said():
            statuses = [s for _, m in self._diagnostics for s in m.status]
            return any(s.name.endswith(name) and words in s.message for s in statuses)

        return self.ros.until(said)


@pytest.fixture(scope="module")
def stack(ros_environment, start_shared, bundles, tmp_path_factory):
    with a_tester("faults") as ros:
        directory = tmp_path_factory.mktemp("stack")
        yield Stack(ros, start_shared, bundles["original"], directory, "faults")


@pytest.mark.parametrize("seconds", [0.0, 8.0])
def test_an_episode_ends_when_its_recorder_freezes_and_its_bag_is_closed_when_it_thaws(
    stack, seconds
):
    """After 5 s it is out of the graph, and what it was asked is lost."""
    episode_id = f"frozen_{seconds:.0f}"
    result = stack.begin(episode_id)
    stack.send("recorder_node", signal.SIGSTOP)
    try:
        assert stack.stopped()
        stack.ros.spin(seconds)
    finally:
        stack.send("recorder_node", signal.SIGCONT)
    reason = stack.result(result).termination_reason
    # Frozen while it holds its port's lock, it holds up whoever sends it observations.
    assert reason in ("recording_lost", "observation_lost")
    bag = stack.bags / episode_id
    assert stack.ros.until(bag.is_dir), f"the bag is not closed; {stack.state()}"
    report = verify(bag)
    assert report.ok and report.episode.termination_reason == reason


def test_an_arm_that_freezes_ends_the_episode_and_nothing_recorded_is_lost(stack):
    result = stack.begin("still")
    stack.send("sim_arm_node", signal.SIGSTOP)
    try:
        assert stack.stopped()
        assert stack.result(result).termination_reason in ("observation_lost", "guard_stop")
    finally:
        stack.send("sim_arm_node", signal.SIGCONT)
    report = verify(stack.bags / "still")
    assert report.ok and not report.episode.recording_error
    topics = {topic.topic: topic for topic in report.topics}
    assert topics["/faults/joint_states"].messages > 10
    assert topics["/faults/joint_states"].silence_at_end > 0.5
    assert stack.result(stack.begin("moving", 3.0)).termination_reason == "timeout"
    report = verify(stack.bags / "moving")
    assert report.ok and report.episode.robot_profile["name"] == "sim"


@pytest.fixture
def recording_to_small_disk(stack, small_disk):
    def move(output_dir):
        stack.processes["recorder_node"].stop()
        stack.specs["recorder_node"].parameters["output_dir"] = str(output_dir)
        stack.restart("recorder_node")

    (small_disk / "ballast").write_bytes(bytes(13 << 20))
    move(small_disk)
    yield small_disk
    move(stack.bags)


def test_a_full_disk_ends_the_episode_and_says_so(stack, recording_to_small_disk):
    result = stack.begin("full")
    assert stack.stopped()
    result = stack.result(result)
    assert result.termination_reason == "recording_lost"
    assert "No space left on device" in result.message
    assert stack.diagnosed("recorder", "No space left on device")
    report = verify(recording_to_small_disk / "full")
    assert report.ok and report.losses == ["recording ended early: No space left on device"]
    assert report.episode.termination_reason == "recording_lost"


def test_an_episode_ends_when_its_recorder_dies(stack):
    result = stack.begin("dead")
    stack.send("recorder_node", signal.SIGKILL)
    assert stack.stopped()
    result = stack.result(result)
    assert result.termination_reason == "recording_lost"
    assert "without a word that it records dead" in result.message
    bag = Path(repair(stack.bags / "dead.partial").uri)
    report = verify(bag)
    assert report.ok and report.episode.termination_reason == INTERRUPTED
    assert report.episode.instruction == INSTRUCTION and report.messages > 10
    # At once: the dead one is still in the graph, and looks as if it would answer.
    stack.restart("recorder_node")
    assert stack.ros.until(lambda: "bags go to" in stack.processes["recorder_node"].output)
    result = stack.result(stack.begin("alive", 1.0))
    assert (result.termination_reason, result.message) == ("timeout", "after 1 s")
    assert verify(stack.bags / "alive").ok
    assert "recorder/start did not answer" not in stack.processes["policy_node"].output


ARM, GUARD, RECORDER, POLICY = (
    *("sim_arm_node", "command_guard_node"),
    *("recorder_node", "policy_node"),
)


@pytest.mark.parametrize(
    ("number", "names"),
    [
        (signal.SIGKILL, (POLICY, RECORDER)),
        (signal.SIGKILL, (POLICY, ARM)),
        (signal.SIGKILL, (GUARD, RECORDER)),
        (signal.SIGKILL, (GUARD, ARM)),
        (signal.SIGKILL, (ARM, RECORDER)),
        (signal.SIGSTOP, (POLICY, RECORDER)),
        (signal.SIGSTOP, (POLICY, ARM)),
        (signal.SIGSTOP, (GUARD, ARM)),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "+".join(value),
)
def test_two_nodes_that_fail_at_once_leave_a_stop_a_reason_and_a_bag(stack, number, names):
    """Policy and guard together: `test_faults.py`."""
    episode_id = f"{number.name}_{'_'.join(names)}"
    result = stack.begin(episode_id, 60.0)
    killed = number == signal.SIGKILL
    for name in names:
        stack.send(name, number)
    if GUARD in names:  # nobody commands the arm, and the controller's timeout stops it
        stack.ros.spin(0.2)
        stack.twists.clear()
    else:
        assert stack.ros.until(lambda: not twist_array(stack.twists[-1][1].twist).any())
    if POLICY not in names:
        stack.result(result)
    elif not killed:
        stack.ros.spin(1.5)
    for name in names if not killed else ():
        stack.send(name, signal.SIGCONT)
    if not killed or POLICY not in names:
        reason = stack.result(result).termination_reason
        assert reason in ("observation_lost", "recording_lost", "guard_stop", "policy_error")
        assert stack.diagnosed("policy", f"{episode_id}: {reason}")
    bag = stack.bags / episode_id
    if killed and RECORDER in names:
        assert stack.ros.until(bag.with_name(f"{episode_id}.partial").is_dir)
        repair(f"{bag}.partial")
    assert stack.ros.until(bag.is_dir), "the bag is not closed"
    report = verify(bag)
    assert report.ok and report.messages > 10
    if killed and names == (POLICY, ARM):
        assert report.episode.termination_reason == "client_lost"
    stray = [message for _, message in stack.twists if twist_array(message.twist).any()]
    # A process may be frozen while it is sending one, which goes out when it thaws.
    assert GUARD not in names or len(stray) <= (not killed)
    for name in names if killed else ():
        stack.restart(name)


def test_a_trial_hears_that_the_policy_node_has_been_started_anew(stack, start):
    client = start([sys.executable, "-c", CLIENT, "anew", "--ros-args", "-r", "__ns:=/faults"])
    stack.twists.clear()
    assert stack.ros.until(lambda: any(twist_array(m.twist).any() for _, m in stack.twists))
    stack.send(POLICY, signal.SIGKILL)
    stack.restart(POLICY)
    assert stack.ros.until(lambda: client.popen.poll() is not None), client.output
    assert client.output.splitlines()[-1].endswith(
        "the policy node knows of no such episode: it has been started anew"
    )


def test_ctrl_c_on_all_of_them_leaves_a_result_and_a_bag_that_says_so(stack):
    result = stack.begin("interrupted")
    for name in (RECORDER, POLICY):
        stack.send(name, signal.SIGINT)
    assert stack.result(result).termination_reason == "node_deactivated"
    assert [stack.processes[name].wait() for name in (RECORDER, POLICY)] == [0, 0]
    report = verify(stack.bags / "interrupted")
    assert report.ok and report.episode.termination_reason == "node_deactivated"
    assert stack.stopped()
    for name in (RECORDER, POLICY):
        stack.restart(name)


def test_a_policy_node_that_is_told_to_end_does_not_wait_for_a_frozen_recorder(stack):
    result = stack.begin("hurried")
    stack.send(RECORDER, signal.SIGSTOP)
    stack.send(POLICY, signal.SIGINT)
    result = stack.result(result)
    assert result.termination_reason == "node_deactivated"
    assert "recorder/stop did not answer within 1.5 s" in result.message
    assert stack.processes[POLICY].wait() == 0 and stack.stopped()
    stack.send(RECORDER, signal.SIGCONT)
    assert stack.ros.until((stack.bags / "hurried").is_dir), "the bag is not closed"
    assert verify(stack.bags / "hurried").ok
    stack.restart(POLICY)


@pytest.fixture
def clock(tmp_path):
    """(environment, set): a process with it has a system clock that `set` puts off by s."""
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    offset.write_text("0")

    def set_(seconds):
        new = tmp_path / "offset.new"
        new.write_text(str(seconds))
        new.rename(offset)

    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}, set_


def test_recording_goes_on_when_the_clock_is_set(ros, start, tmp_path, clock):
    environment, set_clock = clock
    recorder = Recorder(ros, start, tmp_path / "bags", environment, preroll=0.0)
    talker = start([sys.executable, TALKER, 2, 5.0])
    heard = ros.collect(JointState, "joint_states")
    diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
    ros.published("joint_states")
    uri = Path(recorder.start().uri)
    for seconds, positions in ((1000, 100), (-500, 320)):
        assert ros.until(lambda n=positions: heard and heard[-1][1].position[0] > n)
        set_clock(seconds)
    _, joints = sent(ros, talker)
    words = "the clock jumped by -1500 s"
    assert ros.until(lambda: any(words in s.message for _, m in diagnostics for s in m.status))
    assert recorder.stop().success
    report = verify(uri)
    assert report.ok, report.problems
    jumps = [round(jump.seconds) for jump in read_episode(uri).clock_jumps]
    assert jumps == [1000, -1500]
    assert len(report.losses) == 2 and "the clock jumped by +1000" in report.losses[0]
    positions = [m.position[0] for _, m, _ in read_messages(uri, ["/joint_states"])]
    assert sorted(positions) == list(range(joints)), "a message is lost"


def test_an_episode_goes_on_when_the_clock_is_set(ros_environment, start, bundles, tmp_path, clock):
    """Of all nodes at once, as where somebody sets the computer's."""
    environment, set_clock = clock
    with a_tester("clocked") as ros:
        stack = Stack(ros, start, bundles["original"], tmp_path, "clocked", environment)
        result = stack.begin("clocked")
        for seconds in (1000, -500):
            set_clock(seconds)
            ros.spin(1.0)
            stack.twists.clear(), stack.commands.clear()
            assert ros.until(lambda: any(twist_array(m.twist).any() for _, m in stack.twists))
            assert not result.done()
        assert ros.call(Trigger, "policy/finish_episode").success
        assert stack.result(result).termination_reason == "finished"
    episode = read_episode(stack.bags / "clocked")
    assert [round(jump.seconds) for jump in episode.clock_jumps] == [1000, -1500]
    assert verify(stack.bags / "clocked").ok


DISCOVERY_SERVER = """<?xml version="1.0" encoding="UTF-8"?>
<dds xmlns="http://www.eprosima.com"><profiles>
  <participant profile_name="server" is_default_profile="true"><rtps>
    <!-- what ROS_DISCOVERY_SERVER takes its first server to be called -->
    <prefix>44.53.00.5f.45.50.52.4f.53.49.4d.41</prefix>
    <builtin>
      <discovery_config><discoveryProtocol>SERVER</discoveryProtocol></discovery_config>
      <metatrafficUnicastLocatorList>
        <locator><udpv4><address>127.0.0.1</address><port>{port}</port></udpv4></locator>
      </metatrafficUnicastLocatorList>
    </builtin>
  </rtps></participant>
</profiles></dds>
"""
SERVE = "import rclpy, time; rclpy.init(); node = rclpy.create_node('server'); time.sleep(100)"


ALONE = "RLRC_TEST_ALONE"


def test_nodes_that_find_each_other_ten_seconds_late():
    """In a process of its own: one that had a discovery server once finds nobody without it."""
    name = test_alone_nodes_that_find_each_other_ten_seconds_late.__name__
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", f"{__file__}::{name}"]
    environment = os.environ | {ALONE: "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.skipif(ALONE not in os.environ, reason="run by the test before it")
def test_alone_nodes_that_find_each_other_ten_seconds_late(
    ros_environment, start, tmp_path, monkeypatch
):
    """They find nobody before a discovery server, and that is late."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    profiles = tmp_path / "server.xml"
    profiles.write_text(DISCOVERY_SERVER.format(port=port))
    monkeypatch.setenv("ROS_DISCOVERY_SERVER", f"127.0.0.1:{port}")
    # Or the server tells a node only of the topics that it names itself.
    monkeypatch.setenv("ROS_SUPER_CLIENT", "TRUE")
    with a_tester() as ros:
        recorder = Recorder(ros, start, tmp_path / "bags")
        start("command_guard_node")
        talker = start([sys.executable, TALKER, 2, 2.0])
        heard = ros.collect(JointState, "joint_states")
        statuses = ros.collect(GuardStatus, "command_guard/status")
        twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        ros.spin(10.0)
        assert not heard and not statuses and not ros.node.count_publishers("joint_states")
        names = [name for name in bringup.TRANSPORT_ENVIRONMENT if name.endswith("_PROFILES_FILE")]
        environment = dict.fromkeys(names, str(profiles))
        environment |= {"ROS_DISCOVERY_SERVER": "", "ROS_SUPER_CLIENT": ""}
        start([sys.executable, "-c", SERVE], environment=environment)
        ros.published("joint_states")
        uri = Path(recorder.start().uri)
        _, joints = sent(ros, talker)
        assert ros.until(lambda: len(heard) == joints and statuses)
        assert recorder.stop().success
        counts = read_episode(uri).message_counts
        assert counts["/joint_states"] == joints
        assert counts["/command_guard/status"] > 10 and verify(uri).ok
        assert statuses[-1][1].state == "waiting" and not twists


@contextlib.contextmanager
def enclaves(tmp_path):
    """A keystore of an enclave `/`, as far as it can be made without sros2: no valid signatures."""
    directory = tmp_path / "keystore" / "enclaves"
    directory.mkdir(parents=True)
    names = ("identity_ca.cert", "cert", "key", "permissions_ca.cert")
    for name in (*(f"{name}.pem" for name in names), "governance.p7s", "permissions.p7s"):
        (directory / name).write_text("nothing that anybody signed")
    yield {
        "ROS_SECURITY_ENABLE": "true",
        "ROS_SECURITY_STRATEGY": "Enforce",
        "ROS_SECURITY_KEYSTORE": str(tmp_path / "keystore"),
    }


def test_a_node_that_cannot_be_secured_as_it_is_told_does_not_run(start, tmp_path):
    with enclaves(tmp_path) as environment:
        for executable in ("recorder_node", "command_guard_node"):
            process = start(executable, environment=environment)
            assert process.wait(90.0) == 2
            assert "Traceback" not in process.output
            assert f"{executable}: error creating node" in process.output
