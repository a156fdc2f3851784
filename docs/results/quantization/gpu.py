"""Which weight format is fastest at batch 1 on this GPU.

    python docs/results/quantization/gpu.py gpu.json

The matrices of a decoder block of OpenVLA-7B, whole and with 90% of its inside gone, for one token
and for a prompt of 280, in bfloat16 and in every format that is importable here: the graph engine's
own bfloat16 and NF4, bitsandbytes' NF4 and int8, torch's own int4 and int8 kernels, and torchao's
weight-only int4 and int8 (compiled, as they are meant to be; `pip install torchao`). Eight blocks
follow one another in one CUDA graph, so that weights come from memory and launches cost nothing. A
format that does not run says why.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.files import write_atomically

BLOCKS = 8
ROUNDS = 50
WARM_UP = 3
SHAPES = {
    "full": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "−90%": ((1152, 4096), (4096, 384), (2176, 4096), (4096, 1088)),
}
"""(outputs, inputs) of fused qkv, o, fused gate and up, down; the head size is 128."""
Matrix = Callable[[Tensor], Tensor]


def bfloat16(weight: Tensor) -> Matrix:
    """What the others are compared with."""
    return lambda x: F.linear(x, weight)


def bitsandbytes_nf4(weight: Tensor) -> Matrix:
    """NF4 with double quantization."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def bitsandbytes_int8(weight: Tensor) -> Matrix:
    """As `rlrc_ros.vla.quantization` runs int8 on a GPU."""
    from rlrc_ros.vla.quantization import Int8Linear, bitsandbytes

    rounded, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.half())
    return Int8Linear(rounded, scale, None)


def engine_nf4(weight: Tensor) -> Matrix:
    """NF4 as the graph engine has it: its own kernel for one token, unpacked for a prompt."""
    from rlrc_ros.vla import kernels, matrices

    matrix = matrices.packed([SimpleNamespace(weight=weight)], weight.dtype)

    def multiply(x: Tensor) -> Tensor:
        if len(x) > 1:
            return matrices.times(x, matrix, kernels)
        return kernels.gemv(x[0], matrix, x.new_empty(len(weight)))[None]

    return multiply


def engine_bfloat16(weight: Tensor) -> Matrix:
    """bfloat16 as the graph engine has it."""
    from rlrc_ros.vla import kernels, matrices

    matrix = matrices.Matrix(weight, tuple(weight.shape))

    def multiply(x: Tensor) -> Tensor:
        if len(x) > 1:
            return F.linear(x, weight)
        return kernels.gemv(x[0], matrix, x.new_empty(len(weight)))[None]

    return multiply


def torch_int4(weight: Tensor) -> Matrix:
    """The int4 kernel in torch itself (tinygemm), groups of 64 inputs."""
    outputs, inputs = weight.shape
    groups = weight.float().reshape(outputs, inputs // 64, 64)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low).clamp(min=1e-6) / 15
    levels = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    levels = levels.reshape(outputs, inputs).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], 8)
    # The kernel takes 8 for zero: w = (level − 8) · scale + middle.
    scales = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch._weight_int4pack_mm(x, packed, 64, scales)


def torch_int8(weight: Tensor) -> Matrix:
    """The int8 kernel in torch itself, one scale a row."""
    scale = weight.float().abs().amax(1) / 127
    rounded, scales = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, rounded, scales)


def _torchao(weight: Tensor, config: Any) -> Matrix:
    from torchao.quantization import quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, config)
    return lambda x: _compiled()(x, linear.weight)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """One for all matrices, so that each shape is compiled once."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(F.linear, dynamic=False)


def torchao_int4(weight: Tensor) -> Matrix:
    """Torchao's weight-only int4, groups of 64."""
    from torchao.quantization import Int4WeightOnlyConfig

    return _torchao(weight, Int4WeightOnlyConfig(group_size=64))


def torchao_int8(weight: Tensor) -> Matrix:
    """Torchao's weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(weight, Int8WeightOnlyConfig())


FORMATS = (
    *(
        bfloat16,
        engine_bfloat16,
        engine_nf4,
        bitsandbytes_nf4,
        bitsandbytes_int8,
        torch_int4,
        torch_int8,
    ),
    *(torchao_int4, torchao_int8),
)


def time_of(kind: Callable[[Tensor], Matrix], shapes: Any, tokens: int) -> dict[str, Any]:
    """µs of one block, fastest and median, and the relative error of its products."""
    torch.manual_seed(0)
    pairs, errors = [], []
    for _ in range(BLOCKS):
        for outputs, inputs in shapes:
            weight = torch.randn(outputs, inputs, device="cuda").bfloat16() / inputs**0.5
            x = torch.randn(tokens, inputs, device="cuda").bfloat16()
            run, exact = kind(weight), F.linear(x, weight).float()
            errors.append(float((run(x).float() - exact).norm() / exact.norm()))
            pairs.append((run, x))
            del weight
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for run, x in pairs:
                run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(x) for run, x in pairs]
    times = []
    for _ in range(WARM_UP + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / BLOCKS)
    del kept
    times = sorted(times[WARM_UP:])
    return {"min_us": times[0], "median_us": times[len(times) // 2], "error": max(errors)}


def main() -> None:
    """Measure, print, write."""
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["rows"] = []
    with torch.inference_mode():
        for shape, matrices in SHAPES.items():
            for tokens in (1, 280):
                reference = None
                print(f"{shape} block, {tokens} tokens")
                for kind in FORMATS:
                    row: dict[str, Any] = {
                        "shape": shape,
                        "tokens": tokens,
                        "format": kind.__name__,
                    }
                    try:
                        row |= time_of(kind, matrices, tokens)
                        reference = reference or row["median_us"]
                        told = f"{row['median_us']:>9.1f} µs{reference / row['median_us']:>7.2f}×"
                        told += f"  error {row['error']:.3f}"
                    except Exception as error:
                        row["failed"] = told = f"{type(error).__name__}: {error}".splitlines()[0]
                    results["rows"].append(row)
                    write_atomically(Path(sys.argv[1]), json.dumps(results, indent=1) + "\n")
                    print(f"  {kind.__name__:<20}{told}", flush=True)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
