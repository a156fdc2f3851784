"""The Gymnasium environment, and the expert in it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlrc_ros.errors import UserError
from rlrc_ros.sim.expert import expert_action, rollout
from rlrc_ros.sim.model import mujoco
from rlrc_ros.sim.tabletop import ACTION_HIGH, ACTION_LOW, CONTROL_RATE, TabletopEnv
from rlrc_ros.sim.tasks import FAMILIES


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv(latency=(0.0, 0.08))
    yield env
    env.close()


@pytest.mark.filterwarnings("ignore:.*alternative render modes")
def test_gymnasium_accepts_the_environment():
    env = TabletopEnv(image_size=64, render_mode="rgb_array")
    check_env(env)
    env.reset(seed=1)
    assert env.render().shape == (480, 640, 3)
    env.close()


def test_the_scene_depends_on_the_seed_alone(env):
    first, info = env.reset(seed=11)
    env.step(env.action_space.sample())
    again, info_again = env.reset(seed=11)
    assert info == info_again
    np.testing.assert_array_equal(first["image"], again["image"])
    np.testing.assert_array_equal(first["proprioception"], again["proprioception"])
    _, push = env.reset(seed=11, options={"family": "push"})
    assert push["scene"]["objects"] == info["scene"]["objects"]
    assert push["scene"]["instruction"].startswith("push")
    _, other = env.reset(seed=12)
    assert other["scene"]["objects"] != info["scene"]["objects"]
    drawn = [env.reset()[1]["scene"]["seed"] for _ in range(3)]
    assert len(set(drawn)) == 3


def test_an_action_is_metres_and_radians_a_step():
    env = TabletopEnv(image_size=32)
    env.reset(seed=1)
    start = env.world.ee_position()
    for _ in range(5):
        observation, *_ = env.step(np.array([0.01, -0.02, -0.005, 0, 0, 0.05, 1.0]))
    np.testing.assert_allclose(env.world.ee_position() - start, [0.05, -0.1, -0.025], atol=0.004)
    np.testing.assert_allclose(
        observation["proprioception"],
        [*env.world.joint_positions(), env.world.gripper_opening()],
        rtol=1e-6,
    )
    assert env.world.time == pytest.approx(5 / CONTROL_RATE)
    env.reset(seed=1)
    env.step(np.array([1.0, 0, 0, 0, 0, 0, 7.0]))
    assert 0.02 < env.world.ee_position()[0] - start[0] < 0.035, "it is clipped"
    with pytest.raises(UserError, match="finite"):
        env.step(np.full(7, np.nan))
    env.close()


def test_success_is_rewarded_once_and_ends_the_episode(env):
    env.reset(seed=10_000, options={"family": "put"})
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, info = env.step(expert_action(env.world))
        rewards.append(reward)
        assert not truncated
        assert info["success"] == terminated
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_an_episode_is_truncated():
    env = TabletopEnv(image_size=32, max_steps=3)
    env.reset(seed=0)
    ends = [env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.close()


def trajectory(latency, seed):
    env = TabletopEnv(image_size=16, latency=latency)
    env.reset(seed=seed)
    states = []
    for k in range(8):
        env.step(np.array([0.0, 0.03 * (-1) ** (k // 2), 0, 0, 0, 0, 1.0]))
        states.append(env.world.ee_position()[1])
    env.close()
    return np.array(states)


def test_latency_delays_commands_reproducibly():
    prompt, late = trajectory((0, 0), 3), trajectory((0.08, 0.08), 3)
    # At once 3 cm in the first step; after 80 ms of standing still a fifth of it.
    moved = prompt[0] - late[0]
    assert 0.018 < moved < 0.03
    np.testing.assert_array_equal(trajectory((0, 0.08), 3), trajectory((0, 0.08), 3))
    drawn = trajectory((0, 0.08), 3)
    assert (np.abs(drawn - prompt) > 1e-4).any()
    assert (np.abs(drawn - late) > 1e-4).any()


@pytest.mark.parametrize("latency", [(0.05, 0.01), (-0.1, 0.0), (0.0, 0.2)])
def test_a_latency_that_is_no_interval_within_a_step_is_refused(latency):
    with pytest.raises(UserError, match="latency"):
        TabletopEnv(latency=latency)


# The expert


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_solves_unseen_scenes_in_short_episodes(env, family):
    results = [rollout(env, seed, family) for seed in range(50_000, 50_020)]
    assert sum(success for success, _ in results) >= 19
    steps = [steps for _, steps in results]
    assert np.median(steps) <= 45
    assert np.percentile(steps, 90) <= 70


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_copes_with_noise(env, family):
    results = [rollout(env, seed, family, noise=True) for seed in range(60_000, 60_010)]
    assert sum(success for success, _ in results) >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_recovers_when_the_object_is_taken_away(env, family):
    for seed in range(70_000, 70_005):
        env.reset(seed=seed, options={"family": family})
        world, scene = env.world, env.world.scene
        i = scene.goal(scene.instruction).object
        start = np.array([*scene.objects[i].position, scene.objects[i].size / 2])
        taken = done = terminated = False
        while not done:
            _, _, terminated, truncated, _ = env.step(expert_action(world))
            done = terminated or truncated
            moved = world.object_positions()[i] - start
            if not taken and np.linalg.norm(moved) > 0.05:
                taken = True
                if family == "push":  # else: out of the fingers, back to where it was
                    start += moved + 0.04 * np.array([-moved[1], moved[0], 0]) / 0.05
                world.data.qpos[9 + 7 * i : 16 + 7 * i] = *start, 1, 0, 0, 0
                world.data.qvel[9 + 6 * i : 15 + 6 * i] = 0
                mujoco.mj_fwdPosition(world.model, world.data)
        assert taken
        assert terminated, seed


def test_the_expert_depends_on_nothing_but_the_state(env):
    # The same action whether asked once or many times, and within the action space.
    env.reset(seed=10_003)
    for _ in range(25):
        for text in env.world.scene.instructions:
            action = expert_action(env.world, text)
            assert action.dtype == np.float32
            assert (action >= ACTION_LOW).all()
            assert (action <= ACTION_HIGH).all()
        own = expert_action(env.world)
        np.testing.assert_array_equal(own, expert_action(env.world))
        env.step(own)


def test_following_another_instruction_does_not_satisfy_the_scenes_own(env):
    own = other = 0
    for seed in range(80_000, 80_012):
        _, info = env.reset(seed=seed)
        texts = [
            text for text in info["scene"]["instructions"] if text != env.world.scene.instruction
        ]
        text = texts[seed % len(texts)]
        for _ in range(60):
            _, _, terminated, _, _ = env.step(expert_action(env.world, text))
            if terminated or env.world.success_of(text):
                break
        own += terminated
        other += env.world.success_of(text)
    assert own <= 1
    assert other >= 9


def test_the_command_line_prints_a_table():
    done = subprocess.run(
        [sys.executable, "-m", "rlrc_ros.sim.expert", "--episodes", "2", "--family", "stack"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("family")
    assert lines[1].split()[:4] == ["stack", "2", "of", "2"]
    assert not done.stderr
