"""`rlrc compress` killed in every stage makes what it makes when nobody kills it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
environment: tabletop
seed: 0
model:
  tower: {kind: vit, width: 32, depth: 1, heads: 1, ffn: 64, patch: 32, image_size: 128,
          mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
  hidden_size: 64
  head_dim: 32
  layers: 4
  heads: 2
  kv_heads: 2
  ffn: 64
demonstrations:
  {episodes: 3, first_seed: 1000000, disturbed_share: 0.7, translation_noise: 0.006,
   rotation_noise: 0.03, gripper_flips: 0.03}
sft:
  {steps: 24, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 2, checkpoint_every: 4,
   corrections: [{at_step: 10, episodes: 2, first_seed: 2000000}]}
prune: {remove: 0.5, keep_layers: 2, calibration_samples: 16}
recovery: {steps: 24, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 2, checkpoint_every: 4}
rl:
  {seeds: [0], updates: 5, environments: 2, steps_per_update: 20, minibatch: 20, bc_batch: 8,
   critic_warmup: 2, learning_rate: 1.0e-3}
quantize: {method: bitsandbytes-nf4, parts: [llm]}
evaluate: {episodes: 2, first_seed: 0}
"""
BUNDLES = ["original", "pruned", "recovered", "rl-seed-0", "compressed"]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def start(directory, name):
    """`rlrc compress` in a process group of its own."""
    config = directory / "config.yaml"
    config.write_text(CONFIG)
    command = [Path(sys.executable).parent / "rlrc", "compress", config, "--out", directory / name]
    with (directory / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--device", "cpu", "--json"],
            stdout=log,
            stderr=log,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )


def progress(out, stage, counter):
    """How far the checkpoint of a stage is."""
    try:
        return json.loads((out / "work" / stage / "checkpoint" / "facts.json").read_text())[counter]
    except FileNotFoundError:
        return 0


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def plant(path):
    """Something half-written."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(b"half")


def between_checkpoints(path):
    """As if killed while one checkpoint took the other's place."""
    if path.exists():
        shutil.rmtree(path.with_name("checkpoint.old"), ignore_errors=True)
        path.rename(path.with_name("checkpoint.old"))


def tear(path):
    with path.open("a") as file:
        file.write('{"seed": 1, "fam')


# When to kill, how long after that (s), which bundle is not there yet, what a kill may leave behind
KILLS = {
    "demonstrations": (
        lambda out: (out / "demonstrations").is_dir(),
        0.0,
        "original",
        lambda out: (out / "demonstrations" / "shard-00000.partial").write_bytes(b"half"),
    ),
    "sft": (
        lambda out: progress(out, "original", "step") >= 4,
        0.0,
        "original",
        lambda out: plant(out / "work" / "original" / "checkpoint.partial"),
    ),
    "corrections": (
        lambda out: progress(out, "original", "step") >= 8,
        1.0,
        "work/original/corrections-0",
        lambda out: plant(out / "work" / "original" / "corrections-0.partial"),
    ),
    "sft with corrections": (
        lambda out: (out / "work" / "original" / "corrections-0").exists(),
        0.0,
        "original",
        lambda out: plant(out / "original.partial"),
    ),
    "prune": (
        lambda out: (out / "original").exists(),
        0.0,
        "recovered",
        lambda out: None if (out / "pruned").exists() else plant(out / "pruned.partial"),
    ),
    "recovery": (
        lambda out: progress(out, "recovered", "step") >= 8,
        0.0,
        "recovered",
        lambda out: between_checkpoints(out / "work" / "recovered" / "checkpoint"),
    ),
    "rl": (
        lambda out: progress(out, "rl-seed-0", "update") >= 3,
        0.0,
        "rl-seed-0",
        lambda out: plant(out / "rl-seed-0.partial"),
    ),
    "quantize": (
        lambda out: (out / "rl-seed-0").exists(),
        0.0,
        "evaluation/original.jsonl",
        # Killed after the bundle was whole and before its checkpoint was deleted.
        lambda out: plant(out / "work" / "rl-seed-0" / "checkpoint"),
    ),
    "evaluation": (
        lambda out: lines(out / "evaluation" / "pruned.jsonl") >= 2,
        0.0,
        "summary.json",
        lambda out: tear(out / "evaluation" / "pruned.jsonl"),
    ),
}


def run_and_kill(directory, name, stage):
    reached, delay, missing, leave = KILLS[stage]
    out = directory / name
    process = start(directory, name)
    deadline = time.monotonic() + 120
    while not reached(out):
        assert process.poll() is None, (stage, (directory / f"{name}.log").read_text()[-2000:])
        assert time.monotonic() < deadline, stage
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / missing).exists(), f"killed too late to be in {stage}"
    leave(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(killed once in every stage, never killed), as directories."""
    directory = tmp_path_factory.mktemp("compress")
    whole = start(directory, "whole")
    processes = [whole]
    try:
        for stage in KILLS:
            run_and_kill(directory, "killed", stage)
        processes.append(start(directory, "killed"))
        for process in processes:
            assert process.wait(200) == 0, [p.read_text()[-2000:] for p in directory.glob("*.log")]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return directory / "killed", directory / "whole"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_has_the_same_weights(runs, bundle):
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        killed, whole = ((run / bundle / file).read_bytes() for run in runs)
        assert killed == whole, file


def test_training_moved_the_weights(runs):
    """Or the weights would be the same whatever happened."""
    weights = {(runs[1] / bundle / "model.safetensors").read_bytes() for bundle in BUNDLES}
    assert len(weights) == len(BUNDLES)


@pytest.mark.parametrize("stage", ["original", "recovered", "rl-seed-0"])
def test_the_log_has_every_step_once_and_the_same_losses(runs, stage):
    logs = []
    for run in runs:
        with (run / "work" / stage / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        logs.append([{k: v for k, v in r.items() if not k.endswith("_s")} for r in rows])
    assert logs[0] == logs[1] and len(logs[0]) == (5 if stage == "rl-seed-0" else 24)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_evaluation_gives_the_same_episodes(runs, bundle):
    found = []
    for run in runs:
        rows = (run / "evaluation" / f"{bundle}.jsonl").read_text().splitlines()
        episodes = [json.loads(row) for row in rows[1:]]
        assert len(episodes) == 2 and all(e.pop("latency_ms") for e in episodes)
        found.append(episodes)
    assert found[0] == found[1]


def test_nothing_more_and_nothing_less_is_left(runs):
    killed, whole = (
        # TensorBoard's files are named after time and process.
        sorted(str(p.relative_to(run)) for p in run.rglob("*") if "tfevents" not in p.name)
        for run in runs
    )
    assert killed == whole
    assert not [name for name in killed if "partial" in name or ".old" in name]
    assert not [name for name in killed if "checkpoint" in name]


def test_json_is_all_that_is_on_standard_output(runs):
    """The log has both streams: its last line is the object."""
    last = (runs[1].parent / "whole.log").read_text().splitlines()[-1]
    stages = json.loads(last)["stages"]
    assert [stage["name"] for stage in stages] == BUNDLES
    assert stages == json.loads((runs[1] / "summary.json").read_text())["stages"]


def test_a_directory_of_another_run_is_refused(runs, capsys):
    from rlrc_ros.cli.main import main

    config = runs[1].parent / "other.yaml"
    config.write_text(CONFIG.replace("seed: 0", "seed: 1", 1))
    assert main(["compress", str(config), "--out", str(runs[1])]) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err
