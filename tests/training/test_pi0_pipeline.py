"""A small pi0, made here, through every stage of the pipeline."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from rlrc_ros.cli.main import main
from rlrc_ros.paths import config_file
from training import prune_pi0
from training.bundles import new_trainable
from training.config import load_config

TINY = """
environment: tabletop
seed: 0
model:
  tower: {kind: paligemma, width: 32, depth: 1, heads: 2, ffn: 32, patch: 32, image_size: 128,
          mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
  hidden_size: 32
  head_dim: 16
  layers: 3
  heads: 2
  kv_heads: 1
  ffn: 64
  expert: {hidden_size: 32, ffn: 64, chunk: 4, steps: 3}
demonstrations:
  {episodes: 2, first_seed: 1000000, disturbed_share: 0.5, translation_noise: 0.006,
   rotation_noise: 0.03, gripper_flips: 0.03}
sft: {steps: 4, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1}
prune:
  {remove: 0.2, granularity: width, calibration_samples: 4, calibration_batch: 4, part: expert,
   protect: 0}
recovery: {steps: 4, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1}
rl:
  {seeds: [0], updates: 2, environments: 2, steps_per_update: 5, minibatch: 10, bc_batch: 4,
   critic_warmup: 1}
quantize: {method: bitsandbytes-nf4, parts: [llm, expert]}
evaluate: {episodes: 1, first_seed: 0}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sft: {", "sft: {grounding: 1.0, ", "sft: 'grounding' is not there for a pi0 policy"),
        ("recovery: {", "recovery: {shift: 4, label_width: 2.0, ", "'label_width' is not there"),
        ("{remove: 0.2,", "{attention: groups, remove: 0.2,", "would remove key-value heads"),
        ("  expert:", "  chunk: 4\n  expert:", "'chunk' and 'expert' are two kinds of policy"),
        ("kind: paligemma", "kind: vit", "tower of kind 'paligemma' belong together"),
    ],
)
def test_a_pipeline_that_no_pi0_has_is_refused_at_once(tmp_path, capfd, old, new, said):
    config = tmp_path / "config.yaml"
    config.write_text(TINY.replace(old, new))
    assert main(["compress", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "run" / "demonstrations").exists()


def test_the_whole_pipeline_of_a_pi0(tmp_path, capfd):
    """`rlrc compress`, `rlrc rl` on what it recovered, and what comes out acts on the tabletop."""
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    out = tmp_path / "run"
    common = ["--device", "cpu", "--json"]

    def told(*arguments):
        capfd.readouterr()
        assert main([*map(str, arguments), *common]) == 0
        return json.loads(capfd.readouterr().out)

    stages = told("compress", config, "--out", out, "--skip-evaluation")["stages"]
    names = ["original", "pruned", "recovered", "rl-seed-0", "compressed"]
    assert [stage["name"] for stage in stages] == names
    facts = stages[-2]["provenance"]["stages"][-1]
    assert facts["flow"] == {"noise_level": 0.5, "replan_steps": 2}
    with (out / "work" / "rl-seed-0" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["environment_steps"]) for row in rows] == [20, 40]

    again = ("rl", config, "--policy", out / "recovered", "--out", tmp_path / "rl")
    bundle = told(*again, "--demonstrations", out / "demonstrations")
    assert bundle["flow"] == facts["flow"]
    made = [place / "model.safetensors" for place in (out / "rl-seed-0", tmp_path / "rl")]
    assert made[0].read_bytes() == made[1].read_bytes()

    tried = ("eval", "--policy", out / "compressed", "--env", "tabletop")
    assert told(*tried, "--episodes", "1", "--seed", "0")["episodes"] == 1


def test_the_packages_own_configuration_is_one_that_can_be_made_and_pruned():
    config = load_config(config_file("training", "pi0_tabletop"))
    made = new_trainable(config.model, np.zeros((2, 8), np.float32), torch.device("cpu"))
    plan = dataclasses.replace(config.prune, importance="magnitude")
    facts = prune_pi0.run(plan, made, None, seed=0)
    assert facts["removed_of_layers"] >= config.prune.remove
    assert made.config.action_codec.q99[0] == pytest.approx(0.03)  # the environment's limit
