import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrc_ros.sim.expert import expert_action
from rlrc_ros.sim.tabletop import TabletopEnv
from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla.processor import Processor, word_tokenizer
from training.common import render_on
from training.config import CorrectionsConfig, load_config
from training.data.collect import collect_corrections, collect_demonstrations
from training.data.demonstrations import read
from training.rollout import Actor

CONFIG = Path(__file__).parents[2] / "config" / "training" / "tiny.yaml"


@pytest.fixture
def actor(trainable):
    """A random policy in two environments."""
    policy = trainable(image_size=128)
    # The test's words are not the simulator's: give the policy those.
    words = word_tokenizer([*VOCABULARY, "in", ":", "out"])
    processor = Processor(policy.config, words)
    return Actor(policy.model, processor, policy.codec, torch.device("cpu"), 2)


def test_demonstrations_are_successes_and_labelled_by_the_expert(tmp_path):
    config = dataclasses.replace(load_config(CONFIG).demonstrations, episodes=3, latency=(0.0, 0.0))
    collect_demonstrations(tmp_path, config, workers=1)
    data = read(tmp_path)
    assert all(facts["success"] for facts in data.episodes)
    first = data.episodes[0]
    env = TabletopEnv()
    seen, _ = env.reset(seed=first["seed"])
    np.testing.assert_array_equal(data.images[0], seen["image"])
    np.testing.assert_array_equal(data.proprioception[0], seen["proprioception"])
    np.testing.assert_allclose(data.actions[0], expert_action(env.world), atol=1e-7)
    np.testing.assert_allclose(data.grounding[0], env.world.grounding(), atol=1e-6)
    assert data.instructions[data.prompts[0]] == env.world.scene.instruction == first["instruction"]


def test_workers_draw_on_the_gpus_in_turn(monkeypatch):
    def chosen(number, gpus):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        render_on(number)
        return os.environ.get("MUJOCO_EGL_DEVICE_ID")

    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "")  # so that it is put back afterwards
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    assert chosen(5, 0) is None and chosen(5, 1) is None
    assert chosen(5, 4) == "1"
    assert chosen(2, 4) == "1"  # somebody has said which


def test_recording_again_changes_nothing(tmp_path):
    config = dataclasses.replace(load_config(CONFIG).demonstrations, episodes=2)
    collect_demonstrations(tmp_path, config, workers=1)
    shard = next(tmp_path.glob("shard-*"))
    content, made = shard.read_bytes(), shard.stat().st_mtime_ns
    collect_demonstrations(tmp_path, config, workers=1)
    assert shard.stat().st_mtime_ns == made
    shard.unlink()
    collect_demonstrations(tmp_path, config, workers=1)
    assert shard.read_bytes() == content


def test_corrections_record_where_the_policy_went(tmp_path, actor):
    wanted = CorrectionsConfig(at_step=0, episodes=3, first_seed=40, max_steps=50)
    rate = collect_corrections(tmp_path / "out", actor, wanted, (0.0, 0.0))
    data = read(tmp_path / "out")
    assert rate == np.mean([facts["success"] for facts in data.episodes])
    assert sorted(facts["seed"] for facts in data.episodes) == [40, 41, 42]
    assert max(facts["steps"] for facts in data.episodes) == 50
    # A random policy does not act like the expert, whose labels are kept.
    env = TabletopEnv()
    facts = data.episodes[0]
    env.reset(seed=facts["seed"])
    np.testing.assert_allclose(data.actions[0], expert_action(env.world), atol=1e-7)
    assert len(data) == sum(facts["steps"] for facts in data.episodes)


def test_the_expert_takes_over_and_shows_the_way_out(tmp_path, actor):
    wanted = {"at_step": 0, "episodes": 4, "first_seed": 40, "max_steps": 120}
    alone = tmp_path / "alone"
    assert collect_corrections(alone, actor, CorrectionsConfig(**wanted), (0.0, 0.0)) == 0
    config = CorrectionsConfig(**wanted, takeover=(3, 9))
    assert collect_corrections(tmp_path / "out", actor, config, (0.0, 0.0)) == 0
    lost, data = read(alone), read(tmp_path / "out")
    assert data.episodes and all(facts["success"] for facts in data.episodes)
    # The first steps are the policy's, the ones after that are not.
    first, rescued = beginnings(lost), beginnings(data)
    for seed in rescued:
        same = first[seed] == rescued[seed]
        assert same[:4].all() and not same.all()


def beginnings(data, steps=12):
    """The proprioception of every episode's first steps."""
    starts = np.cumsum([0, *(facts["steps"] for facts in data.episodes)])[:-1]
    told = zip(data.episodes, starts, strict=True)
    return {facts["seed"]: data.proprioception[i : i + steps] for facts, i in told}


def test_the_command_line_records(tmp_path):
    words = [
        "-m",
        "training.data.collect",
        "--out",
        tmp_path,
        "--config",
        CONFIG,
        "--episodes",
        "1",
    ]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read(tmp_path).episodes) == 1
