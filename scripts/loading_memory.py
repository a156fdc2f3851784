#!/usr/bin/env python3
"""How much host memory loading an OpenVLA checkpoint takes, against the bytes of the loaded model.

    python scripts/loading_memory.py [--megabytes 600] [--shards 3] [--oft] [--out FILE]

Makes a checkpoint of about that size with random weights, loads it in a process of its own, and
prints the peak of that process's resident memory beyond what it had with everything imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlrc_ros.files import write_atomically
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.config import (
    ActionHeadConfig,
    ArchitectureConfig,
    DecoderConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.openvla import OpenVLA
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.policy import load_model

FFN = 2752
MEAN = (0.5, 0.5, 0.5)


def main() -> None:
    """Make, load, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--oft", action="store_true", help="of OpenVLA-OFT, its parts pickled")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(_load(arguments.load, getattr(torch, arguments.dtype))))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint"
        _write(path, arguments.megabytes, arguments.shards, arguments.oft)
        command = [sys.executable, __file__, "--load", str(path), "--dtype", arguments.dtype]
        facts = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    options = {"shards": arguments.shards, "dtype": arguments.dtype, "oft": arguments.oft}
    text = json.dumps({**options, **facts}, indent=1)
    if arguments.out:
        write_atomically(arguments.out, text + "\n")
    print(text)


def _write(path: Path, megabytes: int, shards: int, oft: bool) -> None:
    """A checkpoint in float32, its layers as many as make it that large."""
    hidden, vocabulary = 1024, 32064
    layer = 4 * hidden**2 + 3 * hidden * FFN
    layers = max(1, (megabytes * 250_000 - 2 * vocabulary * hidden) // layer)
    tower = {"patch": 14, "image_size": 224, "mean": MEAN, "std": (0.5,) * 3, "depth": 2}
    config = ArchitectureConfig(
        towers=(
            TowerConfig(kind="dinov2", width=128, heads=2, ffn=512, **tower),  # type: ignore[arg-type]
            TowerConfig(kind="siglip", width=144, heads=2, ffn=512, **tower),  # type: ignore[arg-type]
        ),
        decoder=DecoderConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            head_dim=128,
            layers=(LayerWidths(8, 8, FFN),) * layers,
            pad_to_multiple_of=64,
        ),
    )
    model = OpenVLA(config, 256, 7)
    path.mkdir()
    if oft:
        head = ActionHeadConfig(chunk=8, dimensions=7)
        model = OpenVLAOFT(replace(config, proprioception=8, action_head=head), 256)
        for name in ("action_head", "proprio_projector"):
            part = model.get_submodule(name)
            torch.save(part.state_dict(), path / f"{name}--1_checkpoint.pt")
            delattr(model, name)
    tensors = model.state_dict()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, path / file)
        index |= dict.fromkeys(names[i::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    statistics = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}
    statistics["proprio"] = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
    upstream: dict[str, Any] = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"],
        "text_config": {"num_attention_heads": 8},
        "norm_stats": {"random": statistics},
    }
    (path / "config.json").write_text(json.dumps(upstream))
    images = {"means": [MEAN, MEAN], "stds": [(0.5,) * 3] * 2}
    (path / "preprocessor_config.json").write_text(json.dumps(images))


def _load(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    before = _peak()
    model = load_model(open_bundle(path), dtype=dtype)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    taken = _peak() - before
    return {
        "checkpoint_bytes": sum(
            file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".pt")
        ),
        "model_bytes": held,
        "peak_bytes": taken,
        "peak_against_model": round(taken / held, 3),
    }


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes; what forked it does not count."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
