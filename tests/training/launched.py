"""What `test_ranks.py` starts two processes of, or does in one: the weights have to be the same.

torchrun --nproc_per_node 2 -m tests.training.launched DIRECTORY
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rlrc_ros.cli.main import main as cli
from rlrc_ros.paths import config_file
from tests.training import recovery
from tests.training.conftest import batches_of, small_demonstrations, small_trainable
from training import rl as ppo
from training.config import CorrectionsConfig, LoraConfig, SftConfig
from training.data.demonstrations import Episode, encode_png, write_shard
from training.ranks import Ranks, join
from training.rl import RecoveryPPO
from training.sft import Trainer

CPU = torch.device("cpu")
SFT = SftConfig(
    steps=6,
    batch_size=12,
    learning_rate=1e-3,
    warmup_steps=1,
    average=0.5,
    grounding=0.5,
    checkpoint_every=3,
    micro_batch=4,
    corrections=(CorrectionsConfig(at_step=2, episodes=1, first_seed=0),),
)
SHARDED = dataclasses.replace(SFT, corrections=(), gradient_checkpointing=True)
LORA = dataclasses.replace(SFT, lora=LoraConfig(rank=4, targets=("decoder", "vision")))


class Killed(Exception):
    pass


class Mortal(Trainer):
    """Dies after the checkpoint and the corrections."""

    def _update(self):
        if self._step == 4:
            raise Killed
        return super()._update()


def write_corrections(place, size=64):
    data = small_demonstrations()
    frames = [encode_png(np.resize(255 - image, (size, size, 3))) for image in data.images[:20]]
    arrays = (data.proprioception[20:40], data.actions[20:40], data.grounding[20:40])
    place.mkdir(parents=True)
    episode = Episode(frames, *arrays, {"instruction": data.instructions[1]})
    write_shard(place / "shard-00000.safetensors", [episode])


def train(config, work, ranks, kind=Trainer, batches=batches_of):
    """SFT; the corrections of a round are written by the first process alone."""
    policy = small_trainable()
    data = batches(small_demonstrations(), policy)

    def correct(number, model):
        place = work / f"corrections-{number}"
        if ranks.first and not place.exists():
            assert not model.training
            write_corrections(place)
        data.take(place, ranks)

    torch.manual_seed(1)
    # Another process has no such directory: what it needs it is sent.
    own = work if ranks.first else work / f"of-{ranks.number}"
    kind(policy.model, data, config, CPU, own, correct, ranks=ranks).run()
    return policy.model.state_dict()


def resumed(config, work, ranks):
    """Killed on the way, and gone on with by processes that had drawn something else."""
    try:
        train(config, work, ranks, Mortal)
    except Killed:
        torch.manual_seed(77 + ranks.number)
        return train(config, work, ranks)


def update(work, ranks):
    """One update of PPO with this process's part of a rollout and of demonstrations."""
    config = dataclasses.replace(
        recovery.CONFIG,
        environments=ranks.count,
        steps_per_update=recovery.STEPS // ranks.count,
        bc_coefficient=0.5,
        max_grad_norm=0.1,
    )
    algorithm = recovery.recovery(config, work, ranks)
    torch.manual_seed(9)
    shown = algorithm.demonstrations.sample(12)
    algorithm.demonstrations.sample = lambda _: shown[ranks.number :: ranks.count]
    algorithm.train()
    return {name: p.detach() for name, p in algorithm._learning.items()}


def rl(work, ranks, die_at=None):
    """PPO in the simulator, one environment for each process; dies in an update, or ends."""
    config = dataclasses.replace(
        recovery.CONFIG,
        environments=2,
        updates=2,
        steps_per_update=6,
        minibatch=6,
        bc_coefficient=0.5,
    )
    policy = recovery.tabletop_policy()
    data = batches_of(recovery.tabletop_demonstrations(), policy)
    seen, train_once = [], RecoveryPPO.train

    def train(self):
        if self.update_number == die_at:
            raise Killed
        seen.append(self.rollout_buffer.actions.copy())
        train_once(self)

    RecoveryPPO.train = train
    try:
        ppo.run(
            config, policy, data, seed=0, device=CPU, work=work, latency=(0.0, 0.0), ranks=ranks
        )
    except Killed:
        return None
    finally:
        RecoveryPPO.train = train_once
    return {**policy.model.state_dict(), "actions": torch.from_numpy(seen[0]).contiguous()}


def main(out):
    ranks = join("cpu")
    found = {"whole": train(SFT, out / "whole", ranks), "lora": train(LORA, out / "lora", ranks)}
    found["resumed"] = resumed(LORA, out / "resumed", ranks)
    found["update"] = update(out / "update", ranks)
    found["rl"] = rl(out / "rl", ranks)
    rl(out / "rl-resumed", ranks, die_at=1)
    found["rl-resumed"] = rl(out / "rl-resumed", ranks)
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` sets it
    found["sharded"] = resumed(SHARDED, out / "sharded", Ranks(ranks._accelerator))
    del os.environ["ACCELERATE_USE_FSDP"]
    for name, weights in found.items():
        save_file(weights, out / f"{name}-{ranks.number}.safetensors")
    sft_by_command(out / "cli", ranks)


def sft_by_command(place, ranks):
    """A new policy of the smallest kind from images of nothing."""
    text = config_file("training", "tiny").read_text()
    config, demonstrations = place / "config.yaml", place / "demonstrations"
    if ranks.first:
        changes = ("steps: 40", "steps: 2\n  micro_batch: 2"), ("batch_size: 32", "batch_size: 8")
        rounds = "  corrections:\n    - {at_step: 20, episodes: 2, first_seed: 2000000}\n"
        for old, new in (*changes, (rounds, "")):
            text = text.replace(old, new)
        write_corrections(demonstrations, size=128)
        config.write_text(text)
    ranks.wait()
    arguments = ["--demonstrations", str(demonstrations), "--out", str(place / "bundle")]
    status = cli(["sft", str(config), *arguments, "--device", "cpu", "--json"])
    assert status == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
