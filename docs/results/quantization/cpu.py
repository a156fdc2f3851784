"""Which weight format is fastest at batch 1 on one CPU thread.

    .venv/bin/python docs/results/quantization/cpu.py cpu.json

First single matrices, at the shapes of config/training/tabletop.yaml and of a policy of 20 M
parameters, for one token and for a prompt of 85; then whole actions of both policies with random
weights, interleaved round by round. Times are those of the thread, in µs and ms, without what it
waited for other programs; the fastest round and the median.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlrc_ros.files import write_atomically
from rlrc_ros.timing import machine
from rlrc_ros.vla import quantization
from rlrc_ros.vla.config import (
    ArchitectureConfig,
    DecoderConfig,
    LayerWidths,
    QuantizationConfig,
    TowerConfig,
)
from rlrc_ros.vla.engine import UnrolledEngine
from rlrc_ros.vla.openvla import Inputs, OpenVLA

ROUNDS = 30
WARM_UP = 3
TOKENS = (1, 85)
MATRICES = {
    "tabletop": ((768, 256), (256, 256), (1408, 256), (256, 704)),
    "20M": ((1536, 512), (512, 512), (2816, 512), (512, 1408)),
}
"""(outputs, inputs) of fused qkv, o, fused gate and up, down."""
Call = Callable[[], Any]


def policy(hidden: int, layers: int, heads: int, head: int, ffn: int, tower: int) -> OpenVLA:
    """Random weights; 64 patches, proprioception, 7 action tokens of 256 bins."""
    torch.manual_seed(0)
    towers = TowerConfig(
        kind="vit",
        width=tower,
        depth=4,
        heads=6,
        ffn=4 * tower,
        patch=16,
        image_size=128,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    decoder = DecoderConfig(
        vocab_size=320,
        hidden_size=hidden,
        head_dim=head,
        layers=(LayerWidths(heads, heads, ffn),) * layers,
        max_positions=256,
    )
    architecture = ArchitectureConfig(towers=(towers,), decoder=decoder, proprioception=8)
    return OpenVLA(architecture, 256, 7).eval().requires_grad_(False)


POLICIES: dict[str, Callable[[], OpenVLA]] = {
    "tabletop": lambda: policy(256, 12, 8, 32, 704, 192),
    "20M": lambda: policy(512, 6, 8, 64, 1408, 192),
}


def matrix(outputs: int, inputs: int, tokens: int) -> dict[str, Call]:
    """The same product in every format."""
    weight = torch.randn(outputs, inputs) / inputs**0.5
    x = torch.randn(tokens, inputs)
    half, half_x = weight.bfloat16(), x.bfloat16()
    scale = weight.abs().amax(1)
    rounded = (weight * 127 / scale[:, None]).round().to(torch.int8)
    int8 = quantization.Int8Linear(rounded, scale, None)
    row_scale = (scale / 127).bfloat16()
    bnb = quantization.bitsandbytes().functional
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    four = torch._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
    )
    groups = torch.randn(inputs // 64, outputs, 2).bfloat16()
    return {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(half_x, half),
        "nf4 (bitsandbytes)": lambda: F.linear(x, bnb.dequantize_4bit(packed, state)),
        "int8 weights, int8 inputs (torch dynamic)": lambda: int8(x),
        "int8 weights only (torch int8pack, bf16)": lambda: torch._weight_int8pack_mm(
            half_x, rounded, row_scale
        ),
        "int4 weights only (torch int4pack, bf16)": lambda: torch._weight_int4pack_mm_for_cpu(
            half_x, four, 64, groups
        ),
    }


def whole(name: str) -> dict[str, Call]:
    """One action of a policy in every format that policies can be stored in."""
    calls = {}
    inputs = Inputs(
        torch.ones(1, 20, dtype=torch.long), None, torch.randn(1, 3, 128, 128), torch.randn(1, 8)
    )
    for kind in ("float32", "bfloat16", "nf4", "int8", "int8, all parts"):
        model = POLICIES[name]()
        if kind == "bfloat16":
            model = model.bfloat16()
        elif kind != "float32":
            parts: Any = ("llm", "vision", "projector") if "all" in kind else ("llm",)
            method: Any = "bitsandbytes-nf4" if kind == "nf4" else "bitsandbytes-int8"
            quantization.quantize(model, QuantizationConfig(method=method, parts=parts))
        engine, given = UnrolledEngine(model), inputs
        if kind == "bfloat16":
            given = inputs.to("cpu", torch.bfloat16)
        calls[kind] = lambda engine=engine, given=given: engine.bins(given)
    return calls


def interleaved(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each: the fastest round and the median; their order in a round is random."""
    names, order = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + ROUNDS):
        for name in order.sample(names, len(names)):
            start = time.thread_time()
            for _ in range(repeats):
                calls[name]()
            if number >= WARM_UP:
                times[name].append((time.thread_time() - start) / repeats)
    return {name: {"min": min(t), "median": float(np.median(t))} for name, t in times.items()}


def show(title: str, found: dict[str, dict[str, float]], unit: float) -> None:
    """One line a format, with its ratio to float32."""
    print(title)
    for name, t in found.items():
        ratio = found["float32"]["min"] / t["min"]
        print(
            f"  {name:<42}{t['min'] * unit:>9.1f} min{t['median'] * unit:>9.1f} p50{ratio:>7.2f}×"
        )


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(), "load_average": os.getloadavg()}
    results |= {"rounds": ROUNDS, "matrices": [], "actions": {}}
    with torch.inference_mode():
        for name, shapes in MATRICES.items():
            for tokens in TOKENS:
                # All matrices of a block, as a block's time is what counts.
                blocks = [matrix(*shape, tokens) for shape in shapes]
                block = {kind: _together([b[kind] for b in blocks]) for kind in blocks[0]}
                found = interleaved(block, 20 if tokens == 1 else 2)
                results["matrices"].append({"policy": name, "tokens": tokens, "seconds": found})
                show(f"{name}: a block's matrices, {tokens} tokens (µs)", found, 1e6)
        for name in POLICIES:
            parameters = sum(p.numel() for p in POLICIES[name]().parameters())
            found = interleaved(whole(name), 1)
            results["actions"][name] = {"parameters": parameters, "seconds": found}
            show(f"{name}: an action, {parameters / 1e6:.1f} M parameters (ms)", found, 1e3)
    write_atomically(Path(sys.argv[1]), json.dumps(results, indent=1) + "\n")


def _together(calls: list[Call]) -> Call:
    def run() -> list[Tensor]:
        return [call() for call in calls]

    return run


if __name__ == "__main__":
    main()
