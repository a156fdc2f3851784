import csv
import dataclasses

import numpy as np
import pytest
import torch

from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla.processor import word_tokenizer
from tests.training.conftest import batches_of
from training import rl
from training.config import RlConfig
from training.rl import RecoveryPPO, TokenPolicy
from training.rollout import Batcher, Decoder

CPU = torch.device("cpu")
CONFIG = RlConfig(
    seeds=(0,),
    updates=3,
    environments=1,
    steps_per_update=12,
    minibatch=6,
    learning_rate=1e-3,
    critic_warmup=1,
    bc_coefficient=0.5,
    bc_batch=8,
)


@pytest.fixture
def policy(trainable):
    def make(seed=0):
        made = trainable(((1, 1, 32),) * 2, seed, image_size=128)
        made.tokenizer = word_tokenizer([*VOCABULARY, "in", ":", "out"])
        return made

    return make


@pytest.fixture
def data(demonstrations):
    images = np.zeros((60, 128, 128, 3), np.uint8)
    texts = ["put the red cube on the blue plate", "stack the red cube on the cyan cube"]
    return dataclasses.replace(demonstrations, images=images, instructions=texts)


def run(config, trainable, data, work, seed=0):
    batches = batches_of(data, trainable)
    facts = rl.run(config, trainable, batches, seed=seed, device=CPU, work=work, latency=(0.0, 0.0))
    with (work / "log.csv").open() as file:
        return facts, list(csv.DictReader(file))


def weights(trainable):
    return {name: value.clone() for name, value in trainable.model.state_dict().items()}


def test_critic_warm_up_moves_no_weight_of_the_actor(policy, data, tmp_path):
    trainable = policy()
    before = weights(trainable)
    _, rows = run(dataclasses.replace(CONFIG, critic_warmup=3), trainable, data, tmp_path)
    assert [row["critic_warmup"] for row in rows] == ["1"] * 3
    assert all(torch.equal(value, before[name]) for name, value in weights(trainable).items())
    assert all(float(row["kl"]) == pytest.approx(0, abs=1e-6) for row in rows)


def test_after_the_warm_up_the_actor_moves(policy, data, tmp_path):
    trainable = policy()
    before = weights(trainable)
    _, rows = run(CONFIG, trainable, data, tmp_path)
    assert [row["critic_warmup"] for row in rows] == ["1", "0", "0"]
    assert not all(torch.equal(value, before[name]) for name, value in weights(trainable).items())
    assert float(rows[1]["bc_loss"]) > 0 and float(rows[0]["bc_loss"]) == 0
    for name in ("kl", "clip_share", "entropy", "success", "value_loss"):
        assert np.isfinite(float(rows[2][name])), name


def test_the_ratio_starts_at_one(policy, data, tmp_path):
    """Log-probabilities with the KV cache and teacher-forced ones are the same."""
    trainable = policy()
    _, rows = run(
        dataclasses.replace(CONFIG, updates=1, critic_warmup=1), trainable, data, tmp_path
    )
    assert float(rows[0]["clip_share"]) == 0
    assert abs(float(rows[0]["kl"])) < 1e-6


def test_without_its_coefficient_the_bc_loss_changes_nothing(policy, data, tmp_path):
    plain = dataclasses.replace(CONFIG, bc_coefficient=0.0)
    first, second = policy(), policy()
    run(plain, first, data, tmp_path / "a")
    other = dataclasses.replace(data, actions=data.actions[::-1].copy())
    run(plain, second, other, tmp_path / "b")
    assert all(torch.equal(v, weights(second)[name]) for name, v in weights(first).items())


def test_a_large_bc_coefficient_follows_the_demonstrations(policy, data, tmp_path):
    from training.sft import bc_loss

    trainable = policy()
    batches = batches_of(data, trainable)
    torch.manual_seed(0)
    before = bc_loss(trainable.model, batches.sample(60)).item()
    heavy = dataclasses.replace(CONFIG, bc_coefficient=100.0, bc_batch=32, epochs=4, updates=4)
    run(heavy, trainable, data, tmp_path)
    assert bc_loss(trainable.model, batches.sample(60)).item() < before - 0.2


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_it_had_not_been(policy, data, tmp_path, monkeypatch):
    whole = policy()
    _, expected = run(CONFIG, whole, data, tmp_path / "whole")

    train = RecoveryPPO.train

    def die(self):
        if self.update_number == 2:
            raise Killed
        train(self)

    monkeypatch.setattr(RecoveryPPO, "train", die)
    with pytest.raises(Killed):
        run(CONFIG, policy(), data, tmp_path / "broken")
    monkeypatch.undo()
    resumed = policy(seed=5)
    _, rows = run(CONFIG, resumed, data, tmp_path / "broken")
    assert all(torch.equal(v, weights(resumed)[name]) for name, v in weights(whole).items())
    timeless = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in table]
        for table in (rows, expected)
    ]
    assert timeless[0] == timeless[1]


def test_another_seed_is_another_run(policy, data, tmp_path):
    first, second = policy(), policy()
    run(CONFIG, first, data, tmp_path / "a", seed=0)
    run(CONFIG, second, data, tmp_path / "b", seed=1)
    assert not all(torch.equal(v, weights(second)[name]) for name, v in weights(first).items())


def test_values_and_log_probabilities_are_of_the_right_shape(policy):
    trainable = policy()
    from training.envs.vector import make_vector
    from training.rl import TokenActions

    venv = TokenActions(make_vector(lambda *_: range(5), 1, latency=(0.0, 0.0)), trainable.codec)
    actor_critic = TokenPolicy(
        venv.observation_space,
        venv.action_space,
        lambda _: 1e-4,
        model=trainable.model,
        decoder=Decoder(trainable.model, 1),
        batcher=Batcher(trainable.processor, CPU),
        value_learning_rate=1e-3,
        temperature=1.0,
    )
    seen = venv.reset()
    tensors = {name: torch.as_tensor(value) for name, value in seen.items()}
    tensors["image"] = tensors["image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        bins, values, log_probability = actor_critic(tensors)
        again, evaluated, entropy = actor_critic.evaluate_actions(tensors, bins)
    assert bins.shape == (1, 7) and values.shape == log_probability.shape == entropy.shape == (1,)
    torch.testing.assert_close(evaluated, log_probability, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close(actor_critic.predict_values(tensors), values)
    assert 0 < entropy <= 7 * np.log(256) + 1e-3
    venv.close()
