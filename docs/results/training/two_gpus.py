"""What a second GPU brings: samples per second of SFT, environment steps per second of PPO.

    python docs/results/training/two_gpus.py two_gpus.json

Starts itself alone and with two processes under `accelerate launch` (with `--small` under
`torchrun`, on a CPU). SFT is of a policy of 100 M parameters on demonstrations of nothing; PPO is
of the tabletop's policy in its simulator, with as many environments and as large a minibatch for
each process. Numbers are read from the trainers' own logs, after compiling. Alone, the trainer
takes its steps as one CUDA graph, which with several processes it does not.
"""

import argparse
import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rlrc_ros.paths import config_file
from rlrc_ros.timing import machine
from training import rl, sft
from training.bundles import new_trainable
from training.config import RlConfig, SftConfig, load_config
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import Demonstrations
from training.ranks import join

TEXT = "put the red cube on the blue plate"
SFT_BATCH, RL_ENVIRONMENTS = 256, 16
"""Of each process."""


def model_of(size):
    """The tabletop's shape, or one of about 100 M parameters behind the same images."""
    base = load_config(config_file("training", "tiny" if size == "tiny" else "tabletop")).model
    if size != "100m":
        return base
    tower = dataclasses.replace(base.tower, width=384, depth=12, heads=6, ffn=1536)
    shape = {"hidden_size": 768, "head_dim": 64, "layers": 12, "heads": 12, "kv_heads": 12}
    return dataclasses.replace(base, tower=tower, ffn=2048, **shape)


def made_up(size, device, count=512):
    rng = np.random.default_rng(0)
    pixels = size.tower.image_size
    data = Demonstrations(
        images=rng.integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8),
        proprioception=rng.normal(size=(count, 8)).astype(np.float32),
        actions=rng.uniform(-0.02, 0.02, (count, 7)).astype(np.float32),
        grounding=rng.normal(size=(count, 4)).astype(np.float32),
        prompts=np.zeros(count, np.int64),
        instructions=[TEXT],
        episodes=[{"steps": count, "instruction": TEXT}],
    )
    torch.manual_seed(0)
    policy = new_trainable(size, data.proprioception, device)
    batches = DemonstrationBatches(policy.processor, policy.codec, device)
    batches.add(data)
    return policy, batches


def work(task, small, per_process):
    """What one of the processes does; the first one prints."""
    ranks = join("cpu" if small else None)
    device = torch.device("cpu" if small else "cuda")
    size = "tiny" if small else "100m" if task == "sft" else "tabletop"
    policy, batches = made_up(model_of(size), device)
    parameters = sum(p.numel() for p in policy.model.parameters())
    total = per_process * ranks.count
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        common = {"seed": 0, "device": device, "work": place, "latency": (0.0, 0.08)}
        if task == "sft":
            steps = 10 if small else 200
            config = SftConfig(steps=steps, batch_size=total, learning_rate=1e-4, warmup_steps=5)
            sft.run(config, policy, batches, **common, ranks=ranks)
        else:
            length = 6 if small else 64
            config = RlConfig(
                seeds=(0,),
                updates=3 if small else 6,
                environments=total,
                steps_per_update=length,
                minibatch=total * length // 2,
                critic_warmup=1,
                bc_batch=total * length // 4,
            )
            rl.run(config, policy, batches, **common, ranks=ranks)
        if ranks.first:
            with (place / "log.csv").open() as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    if ranks.first:
        found = {"task": task, "processes": ranks.count, "parameters": parameters, "total": total}
        names = ["samples_per_s"]
        if task == "rl":
            names = ["environment_steps_per_s", "simulator_s", "inference_s", "learning_s"]
        late = rows[len(rows) // 2 :]
        found |= {name: float(np.median([row[name] for row in late])) for name in names}
        print("RESULT " + json.dumps(found), flush=True)
    ranks.leave()


def start(task, processes, small, per_process):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable]
    if processes > 1 and small:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += [f"--master_port={port}"]
    elif processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
        launcher += [f"--num_processes={processes}", f"--main_process_port={port}"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[3]), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(here), os.devnull, "--task", task, "--per-process", str(per_process)]
    began = time.perf_counter()
    done = subprocess.run(
        command + ["--small"] * small,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not rows:
        return {"task": task, "processes": processes, "failed": done.returncode}
    row = json.loads(rows[0]) | {"seconds": time.perf_counter() - began}
    print(row, file=sys.stderr, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny policies, to try it on a CPU")
    parser.add_argument("--task", choices=["sft", "rl"], help=argparse.SUPPRESS)
    parser.add_argument("--per-process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        work(arguments.task, arguments.small, arguments.per_process)
        return
    sizes = {"sft": 8, "rl": 2} if arguments.small else {"sft": SFT_BATCH, "rl": RL_ENVIRONMENTS}
    rows = [start(t, n, arguments.small, sizes[t]) for t in ("sft", "rl") for n in (1, 2)]
    device = "cpu"
    if torch.cuda.is_available() and not arguments.small:
        device = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    result = {
        "machine": machine() | {"device": device},
        "torch": torch.__version__,
        "rows": rows,
        "ratios": {},
    }
    for task, name in (("sft", "samples_per_s"), ("rl", "environment_steps_per_s")):
        one, two = (row.get(name) for row in rows if row["task"] == task)
        result["ratios"][task] = two / one if one and two else None
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
