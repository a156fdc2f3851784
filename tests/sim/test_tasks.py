"""When an instruction is satisfied, and when it only looks so."""

import numpy as np
import pytest

from rlrc_ros.sim import rotations
from rlrc_ros.sim.expert import expert_action
from rlrc_ros.sim.model import mujoco
from rlrc_ros.sim.tasks import PLATE_THICKNESS
from rlrc_ros.sim.world import World

SEED = 10_000


@pytest.fixture(scope="module")
def world():
    world = World()
    yield world
    world.close()


def lay(world, i, x, y, bottom, turn=(0.0, 0.0, 0.0), settle=0.5):
    """Lay object i down somewhere, its underside at a height, and let it come to rest."""
    pose = world.data.qpos[9 + 7 * i : 16 + 7 * i]
    pose[:3] = x, y, bottom + world.scene.objects[i].size / 2 + 0.0005
    pose[3:] = rotations.from_vector(np.array(turn))
    world.data.qvel[9 + 6 * i : 15 + 6 * i] = 0
    mujoco.mj_fwdPosition(world.model, world.data)
    world.advance(settle)


def instruction(world, family):
    return next(text for text, goal in world.scene.goals.items() if goal.family == family)


def others(world, text):
    return [other for other in world.scene.instructions if other != text]


def test_nothing_is_satisfied_at_first(world):
    for seed in range(150):
        scene = world.reset(seed)
        world.advance(0.05)
        satisfied = [text for text in scene.instructions if world.success_of(text)]
        assert not satisfied, (seed, satisfied)


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
def test_put_wants_this_object_at_rest_on_this_plate(world, seed):
    scene = world.reset(seed, "put")
    goal = scene.goal(scene.instruction)
    x, y = scene.targets[goal.target].position
    radius = scene.targets[goal.target].size

    lay(world, goal.object, x, y, PLATE_THICKNESS)
    assert world.success()
    assert not any(world.success_of(text) for text in others(world, scene.instruction))

    lay(world, goal.object, x, y, PLATE_THICKNESS + 0.1, settle=0.02)
    assert not world.success(), "it is still in the air"
    lay(world, goal.object, x - radius - 0.03, y, 0.0)
    assert not world.success(), "it is beside the plate"

    world.reset(seed, "put")
    wrong = (goal.object + 1) % 3
    lay(world, wrong, x, y, PLATE_THICKNESS)
    assert not world.success(), "that is another object"


def test_put_accepts_an_object_on_any_face_but_not_on_edge(world):
    scene = world.reset(SEED, "put")
    goal = scene.goal(scene.instruction)
    x, y = scene.targets[goal.target].position
    lay(world, goal.object, x, y, PLATE_THICKNESS, turn=(np.pi / 2, 0, 0))
    assert world.success()
    # Leaning over the rim, it is neither flat nor at the plate's height.
    lay(world, goal.object, x, y, 0.02, turn=(0.6, 0, 0), settle=0.0)
    assert not world.success()


@pytest.mark.parametrize("family", ["put", "stack"])
def test_an_object_still_held_is_not_placed(world, family):
    scene = world.reset(SEED, family)
    i = scene.goal(scene.instruction).object
    before_release = False
    for _ in range(80):
        action = expert_action(world).astype(float)
        if action[6] == 1.0 and world.object_positions()[i, 2] > 0.024 and world.time > 1.5:
            before_release = True
            break
        world.set_twist(action[:6] * 10)
        world.set_gripper(action[6])
        world.advance(0.1)
    assert before_release, "the expert got as far as letting go"
    world.set_twist(np.zeros(6))
    world.set_gripper(0.0)
    world.advance(1.0)
    assert world.table_state().touched[i]
    assert not world.success()
    world.set_gripper(1.0)
    world.advance(0.6)
    assert world.success()


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
def test_push_wants_this_object_well_inside_this_square(world, seed):
    scene = world.reset(seed, "push")
    goal = scene.goal(scene.instruction)
    square = scene.targets[goal.target]
    x, y = square.position
    lay(world, goal.object, x, y, 0.0)
    assert world.success()
    assert not any(world.success_of(text) for text in others(world, scene.instruction))
    lay(world, goal.object, x + square.size - 0.005, y, 0.0)
    assert not world.success(), "it lies over the border"
    lay(world, goal.object, x, y, 0.0)
    world.data.qvel[9 + 6 * goal.object] = 0.2
    assert not world.success(), "it is only passing through"

    world.reset(seed, "push")
    lay(world, (goal.object + 1) % 3, x, y, 0.0)
    assert not world.success(), "that is another object"


def test_what_was_lifted_was_not_pushed(world):
    scene = world.reset(SEED, "push")
    goal = scene.goal(scene.instruction)
    x, y = scene.targets[goal.target].position
    lay(world, goal.object, *scene.objects[goal.object].position, 0.05)
    lay(world, goal.object, x, y, 0.0)
    assert not world.success()
    world.reset(SEED, "push")
    lay(world, goal.object, x, y, 0.0)
    assert world.success(), "the next episode starts afresh"


def test_what_fell_over_was_not_pushed(world):
    scene = world.reset(SEED, "push")
    goal = scene.goal(scene.instruction)
    x, y = scene.targets[goal.target].position
    lay(world, goal.object, x, y, 0.0, turn=(np.pi / 2, 0, 0))
    assert not world.success()


def test_a_carried_object_does_not_count_as_pushed(world):
    # The expert for put lifts; drop what it carries into a square.
    scene = world.reset(SEED, "put")
    i = scene.goal(scene.instruction).object
    for _ in range(60):
        if world.object_positions()[i, 2] > 0.07:
            break
        action = expert_action(world).astype(float)
        world.set_twist(action[:6] * 10)
        world.set_gripper(action[6])
        world.advance(0.1)
    j = next(j for j, target in enumerate(scene.targets) if target.shape == "square")
    lay(world, i, *scene.targets[j].position, 0.0)
    text = next(
        text
        for text, goal in scene.goals.items()
        if goal.family == "push" and goal.object == i and goal.target == j
    )
    state = world.table_state()
    assert np.hypot(*(state.position[i, :2] - scene.targets[j].position)) < 0.02
    assert not world.success_of(text)


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
def test_stack_wants_this_cube_on_that_cube(world, seed):
    scene = world.reset(seed, "stack")
    goal = scene.goal(scene.instruction)
    base = scene.objects[goal.target]
    x, y = base.position
    lay(world, goal.object, x, y, base.size)
    assert world.success()
    assert not any(world.success_of(text) for text in others(world, scene.instruction))
    lay(world, goal.object, x + 0.021, y, base.size, settle=0.1)
    assert not world.success(), "it is too far off"
    world.reset(seed, "stack")
    lay(world, goal.object, x + base.size + 0.01, y, 0.0)
    assert not world.success(), "it is beside the other"

    world.reset(seed, "stack")
    x, y = scene.objects[goal.object].position
    lay(world, goal.target, x, y, scene.objects[goal.object].size)
    assert not world.success(), "the wrong one is on top"
