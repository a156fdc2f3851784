"""An episode with a policy and sensors of the test's own; no ROS."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rlrc_ros import execution
from rlrc_ros.chunks import ActionPlan
from rlrc_ros.errors import UserError
from rlrc_ros.execution import Episode, NotReady, PolicyStore

ACTION = np.arange(7.0)
PERIOD = 0.1


class Robot:
    """Looks, acts and hears commands; each part can be told to misbehave."""

    def __init__(self, max_duration=20.0, chunk=1, **plan):
        self.chunk, self.actions = chunk, None
        self.commands = []
        self.look_error = self.act_error = None
        self.age, self.looking, self.acting = 0.0, 0.0, threading.Event()
        self.acting.set()
        policy = SimpleNamespace(act=self._act)
        self.episode = Episode(
            "e1",
            "go",
            "A",
            policy,
            max_duration,
            self._look,
            self._command,
            time.time_ns,
            ActionPlan(PERIOD, **plan),
        )

    def _look(self):
        time.sleep(self.looking)
        if self.look_error:
            raise self.look_error
        return SimpleNamespace(), time.time_ns() - round(self.age * 1e9)

    def _act(self, observation):
        self.acting.wait(10.0)
        if self.act_error:
            raise self.act_error
        actions = np.stack([ACTION + i for i in range(self.chunk)])
        return SimpleNamespace(actions=actions if self.actions is None else self.actions)

    def _command(self, action, stamp_ns, step):
        self.commands.append((action, stamp_ns, step))

    def step(self):
        """One tick, and wait for the step that it starts."""
        self.episode.tick()
        deadline = time.monotonic() + 10.0
        while self.episode.busy and time.monotonic() < deadline:
            time.sleep(0.001)


@pytest.fixture
def robot():
    robot = Robot()
    yield robot
    robot.acting.set()
    robot.episode.close()


def impatient(monkeypatch, seconds=0.0):
    monkeypatch.setattr(execution, "OBSERVATION_PATIENCE", seconds)
    monkeypatch.setattr(execution, "FIRST_OBSERVATION_PATIENCE", seconds)


def ended(robot):
    return robot.episode.termination_reason, robot.episode.message


def test_every_step_commands_an_action_with_its_stamp_and_number(robot):
    for _ in range(3):
        robot.step()
    assert [step for _, _, step in robot.commands] == [0, 1, 2]
    for action, stamp_ns, _ in robot.commands:
        assert np.array_equal(action, ACTION) and abs(time.time_ns() - stamp_ns) < 5e9
    statistics = robot.episode.statistics
    assert statistics.steps == 3 and not statistics.skipped_steps
    assert len(statistics.totals_ms) == 3 and set(statistics.last_ms) == {
        "preprocess", "inference", "total"
    }  # fmt: skip


def test_a_chunk_is_commanded_step_by_step_and_its_second_half_while_the_policy_looks_again():
    robot = Robot(chunk=4)
    for _ in range(3):
        robot.step()
    # The policy looked again when the second was commanded: its action 1 is for the third step,
    # where the first chunk has 2.
    assert [action[0] for action, *_ in robot.commands] == pytest.approx([0, 1, 1.8])
    assert len(robot.episode.statistics.totals_ms) == 2
    robot.acting.clear()
    for _ in range(2):
        robot.episode.tick()
    assert [action[0] for action, *_ in robot.commands[3:]] == pytest.approx([2.6, 3])
    assert not robot.episode.statistics.deadline_misses
    for _ in range(2):
        robot.episode.tick()
    assert [step for *_, step in robot.commands] == list(range(5))
    assert robot.episode.statistics.deadline_misses == 2, "the chunk is used up"
    robot.acting.set()
    robot.episode.close()


def test_actions_that_a_chunk_came_too_late_for_are_left_out():
    robot = Robot(chunk=8)
    robot.age = 2.9 * PERIOD
    robot.step()
    assert robot.commands[0][0][0] == 3
    robot.episode.close()


def test_a_chunk_that_nothing_takes_over_from_is_not_commanded_until_it_is_stale(monkeypatch):
    robot = Robot(chunk=8)
    robot.step()
    robot.acting.clear()
    monkeypatch.setattr(execution, "OLDEST_ACTION", 0.05)
    time.sleep(0.1)
    for _ in range(4):
        robot.episode.tick()
    assert len(robot.commands) == 1
    robot.acting.set()
    robot.episode.close()


def test_the_first_step_is_left_out_of_the_percentiles():
    statistics = execution.Statistics(totals_ms=[1000.0])
    assert statistics.percentile(50) == 0.0
    statistics.totals_ms += [1.0, 3.0]
    assert statistics.percentile(50) == 2.0 and statistics.percentile(100) == 3.0


def test_the_rate_is_of_the_last_second():
    now = time.monotonic()
    statistics = execution.Statistics(times=[now - 3.0, now - 2.0, now - 0.4, now - 0.2])
    assert statistics.rate() == 2.0


def test_the_clock_starts_with_the_first_tick():
    robot = Robot(max_duration=0.2)
    time.sleep(0.3)
    assert robot.episode.elapsed == 0.0
    robot.step()
    assert not robot.episode.ended and len(robot.commands) == 1
    time.sleep(0.25)
    robot.step()
    assert ended(robot) == ("timeout", "after 0.2 s") and len(robot.commands) == 1
    robot.episode.close()


def test_a_slow_policy_misses_deadlines_and_its_late_command_is_never_sent(robot):
    robot.acting.clear()
    robot.episode.tick()
    for _ in range(3):
        robot.episode.tick()
    assert robot.episode.statistics.deadline_misses == 3
    robot.episode.end("operator_stop")
    robot.acting.set()
    robot.episode.close()
    assert not robot.commands and robot.episode.statistics.steps == 0


def test_no_command_comes_once_it_has_ended(robot):
    robot.step()
    robot.episode.end("operator_stop", "enough")
    robot.episode.end("timeout", "later")
    for _ in range(3):
        robot.step()
    assert len(robot.commands) == 1
    assert ended(robot) == ("operator_stop", "enough"), "the first reason stands"


def test_an_action_for_a_scene_long_gone_is_not_sent(robot, monkeypatch):
    robot.age = execution.OLDEST_ACTION + 0.5
    robot.step()
    assert not robot.commands and not robot.episode.ended
    assert robot.episode.statistics.skipped_steps == 1
    assert "its action is for a scene 1.5 s ago, 1 s are allowed" in (
        robot.episode.statistics.skip_reason
    )
    robot.age = 0.0
    robot.step()
    assert len(robot.commands) == 1 and not robot.episode.statistics.skip_reason
    impatient(monkeypatch)
    robot.age = execution.OLDEST_ACTION + 0.5
    robot.step()
    assert robot.episode.termination_reason == "policy_error" and len(robot.commands) == 1


def test_missing_observations_are_skipped_and_end_the_episode_in_the_end(robot, monkeypatch):
    robot.look_error = NotReady("nothing has come on /image")
    robot.step()
    assert not robot.episode.ended and robot.episode.statistics.skipped_steps == 1
    assert robot.episode.statistics.skip_reason == "nothing has come on /image"
    impatient(monkeypatch)
    robot.step()
    assert ended(robot) == ("observation_lost", "nothing has come on /image")
    assert not robot.commands


def test_a_gap_that_closes_in_time_is_forgiven(robot, monkeypatch):
    impatient(monkeypatch, 5.0)
    robot.step()
    robot.look_error = NotReady("too old")
    robot.step()
    robot.look_error = None
    robot.step()
    statistics = robot.episode.statistics
    assert not robot.episode.ended and len(robot.commands) == 2
    assert (statistics.steps, statistics.skipped_steps, statistics.skip_reason) == (2, 1, "")


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [
        ("look_error", UserError("camera 'front': no"), "observation: camera 'front': no"),
        ("look_error", KeyError("joint1"), "observation: 'joint1'"),
        ("act_error", UserError("not finite"), "UserError: not finite"),
        ("act_error", RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
)
def test_an_error_ends_the_episode_and_commands_nothing(robot, part, error, said):
    setattr(robot, part, error)
    robot.step()
    robot.step()
    assert ended(robot) == ("policy_error", said) and not robot.commands


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (np.full((1, 7), np.nan), "UserError: the policy gave an action that is not finite"),
        (np.full((2, 7), np.inf), "UserError: the policy gave an action that is not finite"),
        (np.zeros(7), "UserError: the policy gave actions of shape (7,) instead of (T, 7)"),
        (np.zeros((0, 7)), "UserError: the policy gave actions of shape (0, 7) instead of (T, 7)"),
    ],
)
def test_actions_that_are_none_end_the_episode(robot, actions, said):
    robot.actions = actions
    robot.step()
    assert ended(robot) == ("policy_error", said) and not robot.commands


def test_an_episode_that_was_held_up_does_not_go_on(robot, monkeypatch):
    monkeypatch.setattr(execution, "LONGEST_STALL", 0.2)
    robot.step()
    time.sleep(0.4)
    robot.step()
    reason, message = ended(robot)
    assert reason == "policy_error" and message.startswith("the node was held up for 0.")
    assert len(robot.commands) == 1


def test_a_step_that_was_held_up_says_so_and_not_that_its_observation_is_old(robot, monkeypatch):
    monkeypatch.setattr(execution, "LONGEST_STALL", 0.2)
    impatient(monkeypatch)
    robot.look_error, robot.looking = NotReady("camera 'front' is 3.2 s old"), 0.4
    robot.step()
    assert ended(robot)[0] == "policy_error" and "the node was held up for 0." in ended(robot)[1]


def test_a_policy_that_cannot_be_loaded_changes_nothing():
    def load(path):
        if path == "bad":
            raise UserError("damaged")
        return SimpleNamespace(path=path)

    store = PolicyStore(load)
    first = store.add("A", "a")
    second = store.add("B", "b")
    with pytest.raises(UserError, match="damaged"):
        store.add("A", "bad")
    assert store.get("A") is first and store.active == "B"
    assert store.activate("A") is first and store.active == "A"
    with pytest.raises(UserError, match="no policy is loaded under the label 'C'; loaded: A, B"):
        store.activate("C")
    assert store.active == "A" and store.get("B") is second and store.active == "A"
    store.clear()
    with pytest.raises(UserError, match="loaded: none"):
        store.get("A")
    assert not store.active and not store.resident
