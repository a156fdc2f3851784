"""Scenes: reproducible, valid, and the same for every family."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.sim.scene import WORKSPACE_X, WORKSPACE_Y, sample_scene
from rlrc_ros.sim.tasks import COLOURS, FAMILIES, VOCABULARY

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=200)
def test_a_scene_is_valid(seed):
    scene = sample_scene(seed)
    assert scene == sample_scene(seed)
    things = [*scene.objects, *scene.targets]
    assert {thing.colour for thing in things} == set(COLOURS)
    assert [thing.shape for thing in scene.objects].count("cube") >= 2
    assert {target.shape for target in scene.targets} == {"plate", "square"}
    for thing in things:
        assert np.abs(np.subtract(thing.rgb, COLOURS[thing.colour])).max() <= 0.06
        x, y = thing.position
        assert WORKSPACE_X[0] <= x <= WORKSPACE_X[1]
        assert WORKSPACE_Y[0] <= y <= WORKSPACE_Y[1]


def corners(thing):
    """Of a cube on the table; of a cylinder, points of its rim."""
    if thing.shape == "cube":
        angles = thing.yaw + np.radians([45, 135, 225, 315])
        radius = thing.size / np.sqrt(2)
    else:
        angles = np.linspace(0, 2 * np.pi, 32)
        radius = thing.size / 2
    return np.array(thing.position) + radius * np.column_stack([np.cos(angles), np.sin(angles)])


@given(seeds)
@settings(max_examples=200)
def test_nothing_overlaps(seed):
    scene = sample_scene(seed)
    for i, thing in enumerate(scene.objects):
        for other in scene.objects[:i]:
            assert np.hypot(*np.subtract(thing.position, other.position)) > 0.1
        for target in scene.targets:
            away = np.abs(corners(thing) - target.position)
            outside = np.hypot(*away.T) if target.shape == "plate" else away.max(axis=1)
            assert (outside > target.size).all()
    for i, target in enumerate(scene.targets):
        for other in scene.targets[:i]:
            apart = np.abs(np.subtract(target.position, other.position))
            if target.shape == other.shape == "plate":
                assert np.hypot(*apart) > target.size + other.size
            elif target.shape == other.shape == "square":
                assert apart.max() > target.size + other.size
            else:
                square, plate = sorted([target, other], key=lambda t: t.shape == "plate")
                gap = np.hypot(*np.maximum(apart - square.size, 0))
                assert gap > plate.size


@given(seeds)
@settings(max_examples=100)
def test_only_the_instruction_depends_on_the_family(seed):
    scenes = [sample_scene(seed, family) for family in FAMILIES]
    for scene, family in zip(scenes, FAMILIES, strict=True):
        assert scene.family == family
        assert scene.goal(scene.instruction).family == family
        assert replace(scene, family="", instruction="") == replace(
            scenes[0], family="", instruction=""
        )


@given(seeds)
@settings(max_examples=100)
def test_instructions_are_plain_words_and_mean_what_they_say(seed):
    scene = sample_scene(seed)
    assert scene.instruction in scene.instructions
    assert len(set(scene.instructions)) == len(scene.instructions)
    for text in scene.instructions:
        words = text.split(" ")
        assert set(words) <= set(VOCABULARY)
        goal = scene.goal(text)
        thing = scene.objects[goal.object]
        below = (scene.objects if goal.family == "stack" else scene.targets)[goal.target]
        assert words[0] == goal.family
        assert words[2:4] == [thing.colour, thing.shape]
        assert words[-2:] == [below.colour, below.shape]


def test_json_keeps_a_scene_exactly():
    scene = sample_scene(7)
    stored = json.loads(json.dumps(scene.to_dict()))
    assert tuple(stored["objects"][2]["position"]) == scene.objects[2].position
    assert stored["camera_turn"] == list(scene.camera_turn)
    assert stored["instructions"] == list(scene.instructions)


def test_families_colours_and_shapes_are_all_drawn():
    scenes = [sample_scene(seed) for seed in range(300)]
    assert min(Counter(scene.family for scene in scenes).values()) > 70
    pushed = Counter(
        scene.objects[scene.goal(scene.instruction).object].shape
        for scene in scenes
        if scene.family == "push"
    )
    assert pushed["cylinder"] > 5
    assert min(Counter(scene.objects[0].colour for scene in scenes).values()) > 20


@pytest.mark.parametrize("seed, family", [(1, "pour"), (-1, None)])
def test_a_scene_that_cannot_be_is_refused(seed, family):
    with pytest.raises(UserError, match=r"pour.*put, push, stack|negative"):
        sample_scene(seed, family)


def test_an_instruction_of_another_scene_is_refused():
    with pytest.raises(UserError, match="put the pink cube on the plate"):
        sample_scene(1).goal("put the pink cube on the plate")
