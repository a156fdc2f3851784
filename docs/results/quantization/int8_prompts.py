"""How far 8 bits change what a trained policy does: in its weights alone, and in prompts too.

    python docs/results/quantization/int8_prompts.py int8-prompts.json [--device cuda]

The shipped original tabletop policy acts in the graph engine, in bfloat16 on a GPU and in float32
on a CPU, on what the expert sees in scenes that neither has been trained on. Its LLM is dense, or
in int8 with prompts multiplied in floating point, or in int8 as the engine runs it, in integers.
What differs from the dense one in float32: tokens, whole actions, and metres, radians and opening.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from rlrc_ros.files import write_atomically
from rlrc_ros.vla import matrices
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.graph_engine import GraphEngine
from rlrc_ros.vla.policy import load_model, processor_of
from rlrc_ros.vla.processor import Observation
from training.envs.registry import make_environment

POLICY = Path("rlrc_ros/bundles/tabletop-original")
FIRST_SEED, EPISODES = 7_000_000, 12
NEVER = 1 << 30
KINDS = {
    "dense": (matrices.held, NEVER),
    "int8, weights": (matrices.rounded, NEVER),
    "int8": (matrices.rounded, matrices.ROUNDED_FROM),
}
"""How the LLM's matrices are held, and from how many tokens on they are rounded too."""


def observations() -> list[Observation]:
    """What the expert sees on its way."""
    camera = open_bundle(POLICY).config.cameras[0].name
    env = make_environment("tabletop", range(FIRST_SEED, FIRST_SEED + EPISODES), label=True)
    found = []
    for _ in range(EPISODES):
        seen, told = env.reset()
        ended = False
        while not ended:
            images = {camera: seen["image"]}
            found.append(Observation(images, told["instruction"], seen["proprioception"]))
            seen, _, terminated, truncated, told = env.step(told["expert_action"])
            ended = terminated or truncated
    return found


def decided(kind: str, device: torch.device, dtype: torch.dtype, seen: list[Observation]):
    """Bins (observations, D)."""
    hold, matrices.ROUNDED_FROM = KINDS[kind]
    bundle = open_bundle(POLICY)
    processor = processor_of(bundle.config, bundle.tokenizer())
    engine = GraphEngine(load_model(bundle, device, dtype), hold=hold, hold_rest=matrices.held)
    engine.prepare()
    return np.concatenate([engine.bins(processor(each, as_bytes=True)).numpy() for each in seen])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seen = observations()
    codec = ActionCodec(open_bundle(POLICY).config.action_codec)
    exact = decided("dense", device, torch.float32, seen)
    rows = []
    for kind in KINDS:
        bins = decided(kind, device, dtype, seen)
        off = np.abs(codec.decode(bins) - codec.decode(exact))
        row = {"kind": kind, "tokens_different": float(np.mean(bins != exact))}
        row["actions_different"] = float(np.mean((bins != exact).any(1)))
        row["bins_off_mean"] = float(np.mean(np.abs(bins - exact)))
        row["bins_off_p99"] = float(np.percentile(np.abs(bins - exact), 99))
        row["translation_off_mean_m"] = float(np.linalg.norm(off[:, :3], axis=1).mean())
        row["translation_off_p99_m"] = float(np.percentile(np.linalg.norm(off[:, :3], axis=1), 99))
        row["gripper_flips"] = float(np.mean(off[:, 6] > 0.5))
        rows.append(row)
        print(row, flush=True)
    facts = {"policy": POLICY.name, "observations": len(seen), "device": str(device)}
    facts |= {"dtype": str(dtype), "torch": torch.__version__, "rows": rows}
    write_atomically(arguments.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
