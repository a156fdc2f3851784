import dataclasses

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from rlrc_ros.errors import UserError
from tests.training import recovery
from tests.training.conftest import batches_of
from tests.training.recovery import tabletop_demonstrations, tabletop_policy, weights
from training.actor_critic import TokenActions, TokenPolicy
from training.common import MetricsLog
from training.config import CoolingConfig, LoraConfig, RlConfig
from training.rl import RecoveryPPO, bc_coefficient
from training.rollout import Batcher, Decoder
from training.sft import bc_loss

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
def policy():
    return tabletop_policy


@pytest.fixture
def data():
    return tabletop_demonstrations()


def run(config, trainable, data, work, seed=0):
    return recovery.run(config, trainable, batches_of(data, trainable), work, seed)


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


def test_cooling_samples_and_learns_at_its_own_temperature_and_rate(policy, data, tmp_path):
    cool = CoolingConfig(at_update=1, temperature=0.05, learning_rate=1e-12)
    config = dataclasses.replace(CONFIG, critic_warmup=2, cooling=cool)
    trainable = policy()
    before = weights(trainable)
    _, rows = run(config, trainable, data, tmp_path)
    warm, cold, learning = (float(row["entropy"]) for row in rows)
    assert max(cold, learning) < 0.9 * warm
    # Rollout and learning agree about the temperature.
    assert all(float(row["kl"]) == pytest.approx(0, abs=1e-4) for row in rows)
    for name, value in weights(trainable).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)


def test_without_its_coefficient_the_bc_loss_changes_nothing(policy, data, tmp_path):
    plain = dataclasses.replace(CONFIG, bc_coefficient=0.0)
    first, second = policy(), policy()
    run(plain, first, data, tmp_path / "a")
    other = dataclasses.replace(data, actions=data.actions[::-1].copy())
    run(plain, second, other, tmp_path / "b")
    assert all(torch.equal(v, weights(second)[name]) for name, v in weights(first).items())


def test_a_large_bc_coefficient_follows_the_demonstrations(policy, data, tmp_path):
    trainable = policy()
    batches = batches_of(data, trainable)
    torch.manual_seed(0)
    before = bc_loss(trainable.model, batches.sample(60)).item()
    heavy = dataclasses.replace(CONFIG, bc_coefficient=100.0, bc_batch=32, epochs=4, updates=4)
    run(heavy, trainable, data, tmp_path)
    assert bc_loss(trainable.model, batches.sample(60)).item() < before - 0.2


def test_a_killed_run_goes_on_as_if_it_had_not_been(policy, data, tmp_path, monkeypatch):
    recovery.assert_goes_on_as_if_never_killed(
        lambda made, work: run(CONFIG, made, data, work), policy, tmp_path, monkeypatch
    )


def test_another_seed_is_another_run(policy, data, tmp_path):
    first, second = policy(), policy()
    run(CONFIG, first, data, tmp_path / "a", seed=0)
    run(CONFIG, second, data, tmp_path / "b", seed=1)
    assert not all(torch.equal(v, weights(second)[name]) for name, v in weights(first).items())


def test_values_and_log_probabilities_are_of_the_right_shape(policy):
    trainable = policy()
    from training.envs.vector import make_vector

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


def gradients(algorithm):
    """Of the whole rollout as one minibatch."""
    algorithm.policy.optimizer.zero_grad()
    (batch,) = algorithm.rollout_buffer.get(algorithm.batch_size)
    algorithm._add_gradients(batch, warming=False)
    learning = algorithm._learning.items()
    return {name: p.grad.clone() for name, p in learning if p.grad is not None}


def test_without_bc_an_update_is_that_of_stable_baselines3(tmp_path):
    """With its value loss: half the squared error, not clipped."""
    config = dataclasses.replace(
        recovery.CONFIG, value_clip=1e9, huber_delta=1e9, epochs=2, minibatch=6
    )
    found = []
    for name, train in (("ours", RecoveryPPO.train), ("stock", PPO.train)):
        algorithm = recovery.recovery(config, tmp_path / name)
        algorithm.vf_coef, algorithm.ent_coef = 0.5, 0.0
        algorithm.set_logger(Logger(None, []))
        start = {n: p.detach().clone() for n, p in algorithm._learning.items()}
        np.random.seed(0)  # noqa: NPY002 which the buffer shuffles with
        train(algorithm)
        found.append({n: p.detach() for n, p in algorithm._learning.items()})
    ours, stock = found
    moved = sum(float((stock[n] - x).square().sum()) for n, x in start.items())
    apart = sum(float((stock[n] - x).square().sum()) for n, x in ours.items())
    assert moved > 0 and apart < 1e-6 * moved


def test_a_large_bc_coefficient_gives_the_direction_of_sft(tmp_path):
    config = dataclasses.replace(recovery.CONFIG, bc_coefficient=1e6, bc_batch=32)
    algorithm = recovery.recovery(config, tmp_path)
    torch.manual_seed(4)
    found = gradients(algorithm)
    model = algorithm.policy.model
    model.zero_grad()
    torch.manual_seed(4)
    bc_loss(model, algorithm.demonstrations.sample(32)).backward()
    sft = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    ours = torch.cat(
        [found[f"model.{n}"].flatten() for n, p in model.named_parameters() if p.grad is not None]
    )
    assert torch.cosine_similarity(ours, sft, dim=0) > 0.9999
    plain = gradients(recovery.recovery(recovery.CONFIG, tmp_path / "plain"))
    other = torch.cat([plain[n].flatten() for n in found if n.startswith("model.") and n in plain])
    assert torch.cosine_similarity(other, sft, dim=0) < 0.5


def test_micro_batches_do_not_change_the_gradients(tmp_path):
    config = dataclasses.replace(recovery.CONFIG, bc_coefficient=0.5)
    found = []
    for size in (None, 5):
        torch.manual_seed(0)
        algorithm = recovery.recovery(
            dataclasses.replace(config, micro_batch=size), tmp_path / str(size)
        )
        found.append(gradients(algorithm))
    whole, parts = found
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_in_bfloat16_the_ratio_starts_at_one(policy, data, tmp_path):
    warm = dataclasses.replace(CONFIG, updates=2, critic_warmup=1, minibatch=12, bfloat16=True)
    trainable = policy()
    before = weights(trainable)
    facts, rows = run(warm, trainable, data, tmp_path)
    assert facts["bfloat16"] is True and "lora" not in facts
    assert [float(row["kl"]) for row in rows] == [0.0, 0.0]  # each looked at before its step
    after = weights(trainable)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not all(torch.equal(value, before[name]) for name, value in after.items())


def test_adapters_recover_a_policy_and_survive_a_kill(policy, data, tmp_path, monkeypatch):
    config = dataclasses.replace(
        CONFIG, updates=2, critic_warmup=0, lora=LoraConfig(rank=4), minibatch=12
    )

    def adapted():
        made = policy()
        made.parent = made  # some bundle
        return made

    whole = adapted()
    before = weights(whole)
    _, expected = run(config, whole, data, tmp_path / "whole")
    assert abs(float(expected[0]["kl"])) < 1e-6  # what acted were the adapters, folded in
    assert abs(float(expected[1]["kl"])) < 1e-6
    moved = {n for n, value in weights(whole).items() if not torch.equal(value, before[n])}
    assert moved and all("language_model.model.layers" in n and "_proj" in n for n in moved)
    with recovery.killed_before(1, monkeypatch):
        run(config, adapted(), data, tmp_path / "broken")
    resumed = adapted()
    run(config, resumed, data, tmp_path / "broken")
    assert all(torch.equal(v, weights(resumed)[name]) for name, v in weights(whole).items())
    with pytest.raises(UserError, match="rl: 'lora' adapts a trained policy"):
        run(config, policy(), data, tmp_path / "new")


def test_a_log_of_an_earlier_version_keeps_its_columns(tmp_path):
    (tmp_path / "log.csv").write_text("step,kl\n0,0.5\n1,0.25\n")
    MetricsLog(tmp_path / "log.csv", resume_at=1).write(step=1, kl=0.125, simulator_s=3.0)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,kl", "0,0.5", "1,0.125"]


def test_bc_follows_its_schedule():
    config = dataclasses.replace(CONFIG, updates=7, critic_warmup=2, bc_coefficient=1.0)
    assert [bc_coefficient(i, config) for i in range(7)] == [1.0] * 7
    config = dataclasses.replace(config, bc_final=0.2)
    found = [bc_coefficient(i, config) for i in range(7)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(UserError, match="'bc_final' is -1, and must be 0 or more"):
        dataclasses.replace(config, bc_final=-1)


def test_tensorboard_shows_what_the_table_says(policy, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, rows = run(dataclasses.replace(CONFIG, updates=2), policy(), data, tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    learning = ("kl", "clip_share", "explained_variance", "entropy", "bc_loss", "bc_coefficient")
    times = ("simulator_s", "inference_s", "learning_s", "environment_steps_per_s")
    for name in (*learning, *times, "success"):
        shown = [(event.step, event.value) for event in board.Scalars(f"rl/{name}")]
        expected = [(int(row["step"]), float(row[name])) for row in rows]
        assert shown == [
            (step, pytest.approx(value, rel=1e-4, nan_ok=True)) for step, value in expected
        ], name
    for row in rows:
        parts = float(row["simulator_s"]) + float(row["inference_s"])
        assert parts == pytest.approx(float(row["rollout_s"]), rel=1e-3)
