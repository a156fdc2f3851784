"""Blinded trials over the real nodes."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import GetParameters, ListParameters
from rlrc.msg import GuardStatus, PolicyCommand, PolicyStatus
from rlrc.srv import ListPolicies, LoadPolicy

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import command_arrays
from rlrc_ros.messages.stamps import to_stamp
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.verify import verify
from rlrc_ros.trials.client import RobotClient
from rlrc_ros.trials.plan import Draft, DraftTask, Start, lock
from rlrc_ros.trials.runner import run_current, trial_nodes
from rlrc_ros.trials.session import LOGS, TrialSession, read_trial
from rlrc_ros.trials.simulated import run_rest, running_nodes
from tests.ros.conftest import BIN, a_tester


@pytest.fixture
def profile():
    """The simulated robot; its sensors may be late, as they are on a machine busy with tests."""
    profile = load_profile("sim")
    cameras = {"front": dataclasses.replace(profile.cameras["front"], max_age=0.5)}
    joints = dataclasses.replace(profile.joint_states, max_age=0.5)
    return dataclasses.replace(profile, cameras=cameras, joint_states=joints)


@pytest.fixture
def plan(bundles):
    starts = tuple(Start(seed=seed) for seed in (7, 8))
    draft = Draft(
        name="test",
        robot="sim",
        margin=0.2,
        max_duration=1.5,
        arms={f"{name}-arm": str(bundle.path) for name, bundle in bundles.items()},
        tasks=(DraftTask(name="any", rubric="as instructed", starts=starts),),
        pairs=2,
    )
    return lock(draft, Path())


def test_nothing_tells_the_policies_apart_until_they_are_unblinded(
    ros_environment, plan, profile, tmp_path
):
    directory = tmp_path / "trial"
    told = []
    with TrialSession.create(directory, plan) as session:
        specs = trial_nodes(session, profile)
        nodes = running_nodes(specs, directory / LOGS)
        with nodes as alive, RobotClient() as robot, a_tester() as ros:
            topics = {
                "policy/status": PolicyStatus,
                "policy_command": PolicyCommand,
                "command_guard/status": GuardStatus,
                "/diagnostics": DiagnosticArray,
                "/rosout": Log,
            }
            seen = {name: ros.collect(kind, name) for name, kind in topics.items()}
            robot.wait_until_ready(alive)
            run_rest(session, robot, lambda trial: (told.append(trial), ros.spin(0.2)))
            reachable = [repr(message) for some in seen.values() for _, message in some]
            for name in ("policy", "recorder", "command_guard", "sim_arm"):
                found = ros.call(ListParameters, f"{name}/list_parameters").result.names
                values = ros.call(GetParameters, f"{name}/get_parameters", names=found).values
                reachable.append(repr((found, values)))
            listed = ros.call(ListPolicies, "policy/list_policies").policies
            reachable.append(repr(listed))
            assert {(p.parameters, p.weight_bytes, p.bundle_hash) for p in listed} == {(0, 0, "")}
            refused = ros.call(LoadPolicy, "policy/load_policy", policy="x", label="step-0001")
            assert not refused.success and "only its own policies" in refused.message
            children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
            for child in " ".join(path.read_text() for path in children).split():
                reachable.append(Path(f"/proc/{child}/cmdline").read_text())
            ros.spin(0.1)
        assert session.state == "complete" and len(told) == 4

        statuses = [message for _, message in seen["policy/status"]]
        running = [status for status in statuses if status.state == "running"]
        assert {status.policy_label for status in running} <= {f"step-{i:04}" for i in (1, 2, 3, 4)}
        measured = ("total_ms", "total_ms_p50", "inference_ms", "observation_age")
        assert running and not any(getattr(s, name) for s in statuses for name in measured)
        names = [w for name, arm in plan.arms.items() for w in (name, arm.policy, arm.hash)]
        names += [arm.hash[:12] for arm in plan.arms.values()]
        for text in reachable:
            assert not any(name in text for name in names), text[:300]
        files = [p for p in directory.rglob("*") if p.is_file() and p.name != "plan.yaml"]
        assert sum(path.suffix == ".mcap" for path in files) == 4
        for path in files:
            assert not any(name in str(path) for name in names)
            content = path.read_bytes()
            assert not any(name.encode() in content for name in names), path

        session.unblind()
        records = session.records()
    assert {record.arm for record in records} == set(plan.arms)
    hashes = set()
    for record in records:
        assert (record.termination_reason, record.outcome) == ("timeout", "failure")
        assert record.steps >= 3 and record.guard["accepted"] >= 3 and record.latency_ms_p50 > 0
        bag = directory / record.bag_uri
        report = verify(bag)
        assert report.ok and not report.losses, (report.problems, report.losses)
        episode = report.episode
        assert (episode.instruction, episode.outcome) == (record.instruction, "failure")
        assert episode.termination_reason == "timeout"
        assert episode.metadata["arm"] == record.arm
        hashes.add(episode.bundle_hash)
        rates = {topic.topic: topic.rate for topic in report.topics}
        assert rates["/joint_states"] > 20 and rates["/camera/front/image_raw"] > 10
        commands = [m for _, m, _ in read_messages(bag, ["/policy_command"])]
        assert {m.policy_label for m in commands} == {episode.policy_label}
        assert {m.episode_id for m in commands} == {record.episode_id}
        assert not command_arrays(commands[-1]).twist.any(), "the last command is a stop"
        assert episode.message_counts["/ee_command"] > 10
    assert hashes == {arm.hash for arm in plan.arms.values()}
    for log in (directory / LOGS).glob("*.log"):
        assert "Traceback" not in log.read_text(), log


def test_a_trial_whose_process_is_killed_goes_on_at_the_same_step(
    ros_environment, plan, profile, tmp_path
):
    directory = tmp_path / "trial"
    plan = dataclasses.replace(plan, max_duration=2.5)
    with TrialSession.create(directory, plan) as session:
        specs = trial_nodes(session, profile)
    with running_nodes(specs, directory / LOGS):
        command = [BIN / "rlrc", "trial", "run", directory, "--attach", "--unattended"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not (trials := read_trial(directory).trials):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        # The episode may run on for a second in the policy node; the next process ends it first.
        with TrialSession.open(directory) as session, RobotClient() as robot:
            assert session.trials[0].episode_id == trials[0].episode_id
            assert session.trials[0].termination_reason == "interrupted"
            assert session.current().index == 0
            robot.wait_until_ready(lambda: None)
            again = run_current(session, robot)
            assert (again.step, again.termination_reason) == (0, "timeout")
            session.label(again.number, again.judged)
            stop_at = time.monotonic() + 0.3
            stopped = run_current(session, robot, lambda: time.monotonic() > stop_at)
            assert stopped.termination_reason == "operator_stop"
            session.label(stopped.number, "failure")
            finished = run_current(session, robot, should_finish=lambda: True)
            assert finished.termination_reason == "finished"
            session.label(finished.number, "success")
            session.unblind("enough")
            assert [r.outcome for r in session.records()] == ["failure", "failure", "success"]
    bags = {json.loads(p.read_text())["episode_id"] for p in directory.glob("bags/*/episode.json")}
    assert bags >= {trial.episode_id for trial in read_trial(directory).trials[1:]}


def test_a_person_at_a_terminal_is_led_through_a_trial(ros_environment, plan, profile, tmp_path):
    directory = tmp_path / "trial"
    plan = dataclasses.replace(plan, max_duration=60.0, exclusions=("a cable came loose",))
    with TrialSession.create(directory, plan) as session:
        specs = trial_nodes(session, profile)
    ours, theirs = pty.openpty()
    output = tmp_path / "output"
    command = [BIN / "rlrc", "trial", "run", directory, "--attach", "--operator", "ann"]

    def says(words, times=1):
        deadline = time.monotonic() + 300
        while output.read_text().count(words) < times:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)

    def type_(keys):
        os.write(ours, keys.encode())

    with running_nodes(specs, directory / LOGS), output.open("w") as file:
        process = subprocess.Popen(command, stdin=theirs, stderr=file, stdout=file)
        with process:
            says("[enter] start")
            type_("\n")
            says("[space] stop the arm")
            type_("d")
            says("finished after")
            type_("p\n40\nnearly\n")
            says("[enter] start", 2)
            type_("c\ns\nlooked again\n\n")
            says("[space] stop the arm", 2)
            type_(" ")
            says("operator_stop after")
            type_("x\n1\n\n")
            says("[enter] start", 4)
            type_("\n")
            says("[space] stop the arm", 3)
            type_("e")
            says("guard_stop after")
            type_("f\nhit the table\n")
            says("the arm is stopped (emergency stop): [r] release it")
            type_("\n")
            says("[r] release it", 2)
            type_("r\n")
            says("[enter] start", 5)
            type_("q\n")
            assert process.wait(60) == 0
    first, second, third = read_trial(directory).trials
    labels = [(label.outcome, label.score, label.operator) for label in first.labels]
    assert labels == [("partial", 40.0, "ann"), ("success", None, "ann")]
    assert (first.labels[0].notes, first.labels[1].reason) == ("nearly", "looked again")
    assert (second.termination_reason, second.excluded) == ("operator_stop", "a cable came loose")
    assert (third.termination_reason, third.outcome) == ("guard_stop", "failure")
    assert read_trial(directory).current().index == 2
    assert not any(name in output.read_text() for name in plan.arms)


def test_a_bundle_that_is_not_there_ends_in_one_line(ros_environment, plan, profile, tmp_path):
    with TrialSession.create(tmp_path / "trial", plan) as session:
        specs = trial_nodes(session, profile)
        (tmp_path / "trial" / "sealed.json").unlink()
        nodes = running_nodes(specs, tmp_path / "logs")
        with pytest.raises(UserError) as error, nodes as alive, RobotClient() as robot:
            robot.wait_until_ready(alive)
    message = str(error.value)
    assert message.startswith("policy_node has ended (2): ") and "\n" not in message
    assert "sealed.json: there is no such file" in message


def test_clocks_that_differ_are_said(ros):
    publisher = ros.node.create_publisher(PolicyStatus, "policy/status", 10)

    def publish():
        status = PolicyStatus(state="idle")
        status.header.stamp = to_stamp(time.time_ns() + 5 * 10**9)
        publisher.publish(status)

    timer = ros.node.create_timer(0.05, publish)
    with RobotClient() as robot:
        robot._alive = lambda: ros.executor.spin_once(timeout_sec=0)
        with pytest.raises(UserError, match=r"clock is \+[45]\.\d s off this one's.*chrony"):
            robot._check_clock()
    ros.node.destroy_timer(timer)
