"""Two real processes over gloo, compared with one that does the work of both."""

import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rlrc_ros.errors import UserError
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.openvla import Inputs
from tests.training.conftest import small_trainable
from tests.training.launched import LORA, SFT, SHARDED, train, update
from tests.training.recovery import tabletop_policy
from tests.training.test_flow import trainable as pi0
from training import flow
from training.data.batches import Batch, DemonstrationBatches
from training.ranks import ALONE, SPACING, Ranks, refuse_launch


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The directory in which two processes have left what they did."""
    out = tmp_path_factory.mktemp("launched")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={port}", "-m", "tests.training.launched", str(out)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "stdout.txt").write_text(done.stdout)
    return out


def both(launched, name):
    return [load_file(launched / f"{name}-{number}.safetensors") for number in (0, 1)]


class Streams(DemonstrationBatches):
    """Draws what two processes with generators of their own would draw."""

    def sample(self, size, *arguments):
        if not hasattr(self, "_states"):
            second = torch.Generator().manual_seed((torch.initial_seed() + SPACING) % 2**32)
            self._states = [torch.get_rng_state(), second.get_state()]
        found = []
        for i in range(2):
            torch.set_rng_state(self._states[i])
            found.append(super().sample(size // 2, *arguments))
            self._states[i] = torch.get_rng_state()
        return joined(*found)


def joined(first, second):
    inputs = Inputs(
        torch.cat([first.inputs.input_ids, second.inputs.input_ids]),
        None,  # the prompts have the same length
        torch.cat([first.inputs.pixel_values, second.inputs.pixel_values]),
        torch.cat([first.inputs.proprioception, second.inputs.proprioception]),
    )
    bins = torch.cat([first.bins, second.bins])
    return Batch(inputs, bins, torch.cat([first.grounding, second.grounding]))


def streams_of(data, policy):
    made = Streams(policy.processor, policy.codec, torch.device("cpu"))
    made.add(data)
    return made


def distance(found, expected, start):
    """As a share of how far training has moved the weights."""
    apart = sum(float((found[n] - x).square().sum()) for n, x in expected.items())
    moved = sum(float((start[n] - x).square().sum()) for n, x in expected.items())
    return (apart / moved) ** 0.5


@pytest.mark.parametrize(("name", "config"), [("whole", SFT), ("lora", LORA), ("sharded", SHARDED)])
def test_two_processes_train_as_one_with_the_samples_of_both(launched, tmp_path, name, config):
    first, second = both(launched, name)
    assert all(torch.equal(second[n], value) for n, value in first.items())
    config = dataclasses.replace(config, micro_batch=None)
    expected = train(config, tmp_path, ALONE, batches=streams_of)
    start = small_trainable().model.state_dict()
    assert distance(first, expected, start) < 1e-3
    other = train(config, tmp_path / "other", ALONE)  # samples of its own
    assert distance(other, expected, start) > 0.05


def test_killed_processes_go_on_as_if_they_had_not_been(launched):
    (resumed, _), (whole, _) = both(launched, "resumed"), both(launched, "lora")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_an_update_of_ppo_is_that_of_one_process_with_both_rollouts(launched, tmp_path):
    first, second = both(launched, "update")
    assert all(torch.equal(second[n], value) for n, value in first.items())
    expected = update(tmp_path, ALONE)
    start = {f"model.{n}": p.detach() for n, p in tabletop_policy().model.named_parameters()}
    actor = {name: expected[name] for name in start if name in expected}
    assert distance(first, actor, start) < 1e-3


def test_processes_roll_out_on_their_own_and_learn_together(launched):
    first, second = both(launched, "rl")
    assert not torch.equal(first.pop("actions"), second.pop("actions"))
    assert all(torch.equal(second[n], value) for n, value in first.items())
    resumed, _ = both(launched, "rl-resumed")
    assert all(torch.equal(resumed[name], value) for name, value in first.items())
    with (launched / "rl" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["environment_steps"]) for row in rows] == [12, 24]


def test_the_first_process_alone_writes(launched):
    assert sorted(path.name for path in (launched / "lora").iterdir()) == [
        *("checkpoint", "corrections-0", "log.csv", "of-1")
    ]
    assert not list((launched / "lora" / "of-1").iterdir())
    rows = (launched / "lora" / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + LORA.steps


def test_the_command_line_makes_one_bundle_of_both(launched):
    bundle = open_bundle(launched / "cli" / "bundle")
    made = json.loads((launched / "stdout.txt").read_text())  # of one process alone
    assert made["hash"] == bundle.hash
    assert made["processes"] == 2 and made["micro_batch"] == 2
    assert (launched / "cli" / "bundle-work" / "log.csv").exists()
    assert not (launched / "cli" / "bundle-work" / "checkpoint").exists()


def test_corrections_take_a_whole_policy(tmp_path):
    parts = Ranks()
    parts.sharded = True
    with pytest.raises(UserError, match="'corrections' take a whole policy; launch without FSDP"):
        train(SFT, tmp_path, parts)


def test_the_weights_of_a_pi0_are_not_shared_out(tmp_path):
    parts = Ranks()
    parts.sharded = True
    where = {"seed": 0, "device": torch.device("cpu"), "work": tmp_path, "ranks": parts}
    with pytest.raises(UserError, match="pi0 policy cannot be shared out; launch without FSDP"):
        flow.run(dataclasses.replace(SHARDED, grounding=0.0), pi0(), None, **where)


def test_a_batch_that_cannot_be_divided_is_refused():
    two = Ranks()
    two.count = 2
    with pytest.raises(UserError, match="'batch_size' is 13, and cannot be divided among 2"):
        two.share_of(13, "sft: 'batch_size'")


def test_another_number_of_processes_does_not_go_on(tmp_path):
    with pytest.raises(UserError, match="of a run of 2 processes, and now there are 1"):
        ALONE.require(2, tmp_path)


def test_what_one_process_does_is_not_launched(monkeypatch):
    refuse_launch("prune")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="prune is done by one process"):
        refuse_launch("prune")
