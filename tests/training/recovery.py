"""PPO in tests: whole runs, killed ones, and one whose rollout is made up."""

import contextlib
import csv
import dataclasses

import numpy as np
import pytest
import torch

from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla.processor import word_tokenizer
from tests.training.conftest import batches_of, small_demonstrations, small_trainable
from training import rl
from training.actor_critic import TokenActions, TokenPolicy
from training.config import RlConfig
from training.envs.tabletop import TEXT_BYTES
from training.envs.vector import make_vector
from training.ranks import ALONE
from training.rl import RecoveryPPO
from training.rollout import Batcher, Decoder

CPU = torch.device("cpu")
STEPS = 12
CONFIG = RlConfig(
    seeds=(0,),
    updates=1,
    environments=1,
    steps_per_update=STEPS,
    minibatch=STEPS,
    learning_rate=1e-3,
    value_learning_rate=1e-3,
    critic_warmup=0,
    bc_coefficient=0.0,
    bc_batch=12,
)


def tabletop_policy(seed=0):
    made = small_trainable(((1, 1, 32),) * 2, seed, image_size=128)
    made.tokenizer = word_tokenizer([*VOCABULARY, "in", ":", "out"])
    return made


def tabletop_demonstrations():
    images = np.random.default_rng(5).integers(0, 256, (60, 128, 128, 3), dtype=np.uint8)
    texts = ["put the red cube on the blue plate", "stack the red cube on the cyan cube"]
    return dataclasses.replace(small_demonstrations(), images=images, instructions=texts)


class Stopped(Exception):
    pass


def run(config, trainable, batches, work, seed=0):
    """Train on the CPU; the stage's facts, and the rows of its log."""
    facts = rl.run(config, trainable, batches, seed=seed, device=CPU, work=work, latency=(0.0, 0.0))
    with (work / "log.csv").open() as file:
        return facts, list(csv.DictReader(file))


def weights(trainable):
    return {name: value.clone() for name, value in trainable.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@contextlib.contextmanager
def killed_before(update, monkeypatch):
    """What trains in here is killed when it has rolled out for an update; gives the PPO, listed."""
    train, killed = RecoveryPPO.train, []

    def die(self):
        if self.update_number == update:
            killed.append(self)
            raise Stopped
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryPPO, "train", die)
        with pytest.raises(Stopped):
            yield killed


def assert_goes_on_as_if_never_killed(train_in, make, directory, monkeypatch):
    """Two updates and a kill; then on from there, beginning with other weights.

    train_in(policy, work): gives what `run` gives.
    """
    whole = make()
    _, expected = train_in(whole, directory / "whole")
    with killed_before(2, monkeypatch):
        train_in(make(), directory / "broken")
    resumed = make(seed=5)
    _, rows = train_in(resumed, directory / "broken")
    assert same(weights(whole), weights(resumed))
    timeless = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in table]
        for table in (rows, expected)
    ]
    assert timeless[0] == timeless[1]


def recovery(config, work, ranks=ALONE):
    """Before the first update, with this process's share of a rollout that is always the same."""
    policy = tabletop_policy()
    venv = make_vector(lambda *_: range(0), 1, latency=(0.0, 0.0))
    algorithm = RecoveryPPO(
        TokenPolicy,
        TokenActions(venv, policy.codec),
        config,
        batches_of(tabletop_demonstrations(), policy),
        work,
        None,
        ranks,
        policy_kwargs={
            "model": policy.model,
            "decoder": Decoder(policy.model, 1),
            "batcher": Batcher(policy.processor, CPU),
            "value_learning_rate": config.value_learning_rate,
            "temperature": config.temperature,
        },
        seed=0,
        device=CPU,
    )
    work.mkdir(parents=True, exist_ok=True)
    algorithm.restore_state()
    fill(algorithm, ranks)
    algorithm._ended, algorithm._began, algorithm._rolled_out = [(True, 3)], 0.0, 1.0
    algorithm._simulated, algorithm._executed = 0.0, STEPS
    return algorithm


def fill(algorithm, ranks):
    rng = np.random.default_rng(3)
    made = {
        "image": rng.integers(0, 256, (STEPS, 3, 128, 128), dtype=np.uint8),
        "proprioception": rng.normal(size=(STEPS, 8)).astype(np.float32),
        "instruction": np.zeros((STEPS, TEXT_BYTES), np.uint8),
    }
    text = np.frombuffer(b"put the red cube on the blue plate", np.uint8)
    made["instruction"][:, : len(text)] = text
    numbers = {
        "actions": rng.integers(0, 256, (STEPS, 7)),
        "advantages": rng.normal(size=STEPS) ** 3,
        "returns": rng.uniform(size=STEPS),
        "values": np.zeros(STEPS),
    }
    mine = slice(ranks.number, None, ranks.count)
    buffer = algorithm.rollout_buffer
    buffer.reset()
    for name, value in made.items():
        buffer.observations[name][:, 0] = value[mine]
    for name, value in numbers.items():
        getattr(buffer, name)[:, 0] = value[mine]
    with torch.no_grad():
        seen = {name: torch.from_numpy(value[mine]) for name, value in made.items()}
        actions = torch.from_numpy(numbers["actions"][mine])
        rated = algorithm.policy.evaluate_actions(seen, actions)[1]
    # As if other weights had acted: some ratios are clipped.
    offset = rng.normal(size=STEPS)[mine] * 0.2
    buffer.log_probs[:, 0] = rated.numpy() + offset
    buffer.full = True
