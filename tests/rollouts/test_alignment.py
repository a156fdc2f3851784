import shutil

import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.alignment import AlignedEpisode
from tests.conftest import bundle_config
from tests.rollouts.episodes import INSTRUCTION, START, contract, image, record_episode


def check(steps, expected, rate=10.0):
    assert len(steps) == len(expected)
    for step, (picture, state, speed) in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.observation.images["front"], image(0, picture)[0])
        np.testing.assert_array_equal(
            step.observation.proprioception, np.append(np.arange(7) + 0.01 * state, 0.5)
        )
        assert step.observation.instruction == INSTRUCTION
        wanted = np.array([speed, 0, -speed, 0, 0, 2 * speed]) / rate
        np.testing.assert_allclose(step.action, np.append(wanted, 1.0), rtol=1e-12)


def test_each_step_is_what_the_policy_saw_and_did(tmp_path):
    bag, expected = record_episode(tmp_path)
    episode = AlignedEpisode(bag, contract())
    check(list(episode.steps()), expected)
    assert (episode.policy_label, episode.missed, episode.lost.total()) == ("A", 0, 0)


def test_topics_are_found_in_the_namespace_of_the_commands(tmp_path):
    bag, expected = record_episode(tmp_path, namespace="/left_arm")
    check(list(AlignedEpisode(bag, contract()).steps()), expected)


def test_a_command_that_names_no_observation_gets_what_was_there_when_it_was_issued(tmp_path):
    bag, _ = record_episode(tmp_path, named=False, steps=3)
    steps = list(AlignedEpisode(bag, contract()).steps())
    issued = [START + 145_000_000 + step * 100_000_000 for step in range(3)]
    for step, now in zip(steps, issued, strict=True):
        assert 0 <= now - max(step.stamps.values()) < 20_000_000, (
            "the newest joint state before the command"
        )


def test_a_policy_without_proprioception_needs_no_joint_states(tmp_path):
    bag, expected = record_episode(tmp_path)
    architecture = bundle_config().architecture
    architecture = type(architecture)(towers=architecture.towers, decoder=architecture.decoder)
    blind = contract(architecture=architecture, proprioception=None)
    steps = list(AlignedEpisode(bag, blind).steps())
    assert len(steps) == len(expected)
    assert all(step.observation.proprioception is None for step in steps)


def test_commands_at_twice_the_rate_are_thinned_and_actions_are_of_the_new_period(tmp_path):
    bag, expected = record_episode(tmp_path, steps=10, rate=20.0)
    check(list(AlignedEpisode(bag, contract()).steps()), expected[::2])


def test_at_a_higher_rate_every_step_stays_and_the_empty_periods_are_counted(tmp_path):
    bag, expected = record_episode(tmp_path, steps=4)
    episode = AlignedEpisode(bag, contract(control_rate=20.0))
    check(list(episode.steps()), expected, rate=20.0)
    assert episode.missed == 3


def test_missed_periods_are_counted_and_the_steps_around_them_stay(tmp_path):
    bag, expected = record_episode(tmp_path, steps=8, skip=(3, 4))
    episode = AlignedEpisode(bag, contract())
    check(list(episode.steps()), expected)
    assert episode.missed == 2


def test_a_killed_policys_last_command_is_kept(tmp_path):
    bag, expected = record_episode(tmp_path, stop=False)
    check(list(AlignedEpisode(bag, contract()).steps()), expected)


def test_steps_whose_messages_the_recorder_dropped_are_lost_and_said(tmp_path):
    _, expected = record_episode(tmp_path / "whole", steps=3)
    bag, _ = record_episode(tmp_path / "holes", steps=3, dropped=(expected[1][0],))
    aligned = AlignedEpisode(bag, contract())
    check(list(aligned.steps()), [expected[0], expected[2]])
    assert dict(aligned.lost) == {"the bag lacks the message of 'front' that the policy saw": 1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"instruction": " "}, "names no instruction"),
        ({"steps": 1, "skip": (0,)}, "holds no command of a policy in its episode"),
    ],
)
def test_what_cannot_be_training_data_is_said(tmp_path, changes, problem):
    bag, _ = record_episode(tmp_path, **changes)
    with pytest.raises(UserError, match=problem):
        AlignedEpisode(bag, contract())


def test_a_bag_without_the_robots_topics_is_named(tmp_path, an_episode):
    bag = shutil.copytree(an_episode[0], tmp_path / "e1")
    robot = contract()
    camera = robot.profile.cameras["front"]
    object.__setattr__(camera, "topic", "/other/image")
    with pytest.raises(UserError, match=r"has no topic /other/image \('front'\)"):
        AlignedEpisode(bag, robot)
