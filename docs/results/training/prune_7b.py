"""How long it takes to prune a policy of the shape of OpenVLA-7B, and what memory that takes.

    python docs/results/training/prune_7b.py prune_7b.json

Writes a bundle of that size with random weights to a temporary directory (15 GB) and calls
`rlrc prune` on it: Taylor's importance, measured on demonstrations of nothing, 90% of every layer
but the first and the last. The time is the whole command's, from reading the bundle to the pruned
one on disk.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import torch
import yaml
from lora_7b import TEXT, demonstrations, name_of, small

from rlrc_ros.cli.bench_shape import openvla_7b, random_model
from rlrc_ros.timing import machine
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.processor import word_tokenizer
from training.data.demonstrations import Episode, encode_png, write_shard

PRUNE = {
    "remove": 0.9 * 30 / 32,
    "granularity": "width",
    "importance": "taylor",
    "ffn_multiple": 64,
    "calibration_samples": 128,
    "calibration_batch": 8,
}


def write_policy(path, config, device):
    model = random_model(config, device, torch.bfloat16)
    tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    words = word_tokenizer(["in", ":", "out", *TEXT.split()])
    write_bundle(path, config, tensors, words, provenance(None, "random weights"))
    return sum(tensor.nbytes for tensor in tensors.values())


def write_demonstrations(path, size, count):
    data = demonstrations(size, count)
    path.mkdir()
    facts = {"seed": 0, "instruction": TEXT, "success": True, "steps": count}
    images = [encode_png(image) for image in data.images]
    arrays = (data.proprioception, data.actions, data.grounding)
    write_shard(path / "shard-00000.safetensors", [Episode(images, *arrays, facts)])


class GpuMemory(threading.Thread):
    """The most that was in use on the GPU, in bytes, by all processes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self):
        """Look, until it is over."""
        while not self.ended.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try it on a CPU")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    on_gpu = torch.cuda.is_available() and not arguments.small
    device = torch.device("cuda" if on_gpu else "cpu")
    config = small(openvla_7b()) if arguments.small else openvla_7b()
    config = dataclasses.replace(
        config, instruction_template="in: {instruction} out:", prompt_suffix_token=None
    )
    config = dataclasses.replace(config, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        stored = write_policy(place / "policy", config, device)
        write_demonstrations(place / "demonstrations", config.architecture.towers[0].image_size, 64)
        (place / "prune.yaml").write_text(yaml.safe_dump(pipeline(arguments.small)))
        command = [sys.executable, "-m", "rlrc_ros.cli.main", "prune", str(place / "prune.yaml")]
        command += ["--policy", str(place / "policy"), "--out", str(place / "pruned"), "--json"]
        command += ["--demonstrations", str(place / "demonstrations"), "--device", device.type]
        if on_gpu:
            torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info() if on_gpu else (0, 0)
        watch = GpuMemory()
        if on_gpu:
            watch.start()
        began = time.perf_counter()
        path = os.pathsep.join([str(Path(__file__).resolve().parents[3]), *sys.path])
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=-1, text=True)
        seconds = time.perf_counter() - began
        watch.ended.set()
        if done.returncode:
            sys.exit(done.returncode)
        facts = json.loads(done.stdout)
        pruned = sum(file.stat().st_size for file in (place / "pruned").iterdir())
    result = {
        "machine": machine() | {"device": name_of(device)},
        "torch": torch.__version__,
        "shape": "small" if arguments.small else "openvla-7b",
        "prune": pipeline(arguments.small)["prune"],
        "seconds": seconds,
        "peak_gpu_bytes": watch.peak - (before[1] - before[0]) if on_gpu else None,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "bundle_bytes": stored,
        "pruned_bundle_bytes": pruned,
        "facts": {key: value for key, value in facts.items() if key.startswith("removed")},
    }
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


def pipeline(tiny):
    """A configuration of the pipeline, of which only `prune` is used."""
    from rlrc_ros.paths import config_file

    whole = yaml.safe_load(config_file("training", "tiny").read_text())
    prune = PRUNE | ({"ffn_multiple": 32, "remove": 0.2} if tiny else {})
    return whole | {"prune": prune}


if __name__ == "__main__":
    main()
