"""Many environments with one policy: every scene has its episode, whoever is late."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.envs.vector import Scenes, make_vector, none_yet
from training.rollout import roll

STEPS = 4


class Still:
    """A policy that does what is nearest to nothing."""

    def __init__(self, environments):
        self.environments = environments

    def act(self, observation):
        assert len(observation["image"]) == self.environments
        return np.zeros((self.environments, 7))


def episodes(environments, seeds):
    """What was seen in each scene: {seed: (steps, 8) proprioception}."""
    venv = make_vector(none_yet, environments, "tabletop", max_steps=STEPS)
    seen, ended = defaultdict(list), []
    for step in roll(Still(environments), venv, seeds):
        for i in step.which:
            assert step.infos[i]["seed"] == step.told[i]["seed"]
            seen[step.told[i]["seed"]].append(step.observation["proprioception"][i].copy())
        ended += [step.infos[i]["seed"] for i in step.ended]
    assert sorted(ended) == sorted(seeds)
    return {seed: np.stack(rows) for seed, rows in seen.items()}


@pytest.mark.parametrize("environments", [3, 8])
def test_every_scene_has_its_episode_as_if_it_were_alone(environments):
    seeds = range(100, 107)
    together, alone = episodes(environments, seeds), episodes(1, seeds)
    assert together.keys() == alone.keys() == set(seeds)
    for seed in seeds:
        assert together[seed].shape == (STEPS, 8)
        np.testing.assert_array_equal(together[seed], alone[seed])


@given(st.lists(st.integers(), unique=True), st.integers(1, 5), st.data())
def test_scenes_are_dealt_out_once_each(seeds, environments, data):
    scenes = Scenes(seeds, environments)
    order = data.draw(st.lists(st.integers(0, environments - 1), min_size=len(seeds)))
    order += [0] * len(seeds)
    taken = [scene for environment in order for scene in scenes.take(environment)]
    assert sorted(taken) == sorted(seeds)
    assert scenes.take(0) == []


def test_an_environment_takes_its_own_scenes_in_a_row_and_then_others():
    scenes = Scenes(list(range(6)), 2)
    assert [scenes.take(0) for _ in range(5)] == [[0], [1], [2], [5], [4]]
    assert [scenes.take(1), scenes.take(1)] == [[3], []]
