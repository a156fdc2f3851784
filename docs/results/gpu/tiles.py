"""Which tiles `rlrc_ros.vla.weight_kernels.gemv` should take on this GPU.

    python docs/results/gpu/tiles.py > tiles.txt

For the matrices of a decoder block of OpenVLA-7B, whole and with 90% of its inside gone: µs of one
row times the matrix, in a CUDA graph over several such matrices, so that weights come from memory.
The fastest tiles are printed as (rows, columns, warps), after them what cuBLAS takes.
"""

import itertools
import sys

import torch
import torch.nn.functional as F

from rlrc_ros.vla import weight_kernels
from rlrc_ros.vla.matrices import NF4_LEVELS, Matrix

SHAPES = {
    "qkv": (12288, 4096, "norm"),
    "out": (4096, 4096, "residual"),
    "gate and up": (22016, 4096, "gated"),
    "down": (4096, 11008, "residual"),
    "qkv −90%": (1152, 4096, "norm"),
    "out −90%": (4096, 384, "residual"),
    "gate and up −90%": (2176, 4096, "gated"),
    "down −90%": (4096, 1088, "residual"),
    "head": (256, 4096, "norm"),
}
TILES = list(itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (4, 8)))
BYTES = 3e8
"""Of all matrices together: several times what the GPU's cache holds."""
REPETITIONS = 15


FORMATS = ("bf16", "int8", "nf4")


def matrix(rows, columns, kind):
    if kind == "bf16":
        return Matrix(torch.randn(rows, columns, device="cuda").bfloat16(), (rows, columns))
    if kind == "int8":
        data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
        return Matrix(data, (rows, columns), torch.rand(rows, device="cuda"))
    data = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda")
    scales = torch.rand(rows * columns // 64, device="cuda")
    return Matrix(data, (rows, columns), scales, torch.tensor(NF4_LEVELS, device="cuda"))


def microseconds(work, count):
    """Median of one of `count` calls that `work` makes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return sorted(times)[len(times) // 2]


def main():
    print(torch.cuda.get_device_name(), torch.__version__)
    chosen = weight_kernels.gemv_blocks
    for (name, (rows, columns, kind)), stored in itertools.product(SHAPES.items(), FORMATS):
        x = torch.randn(columns, device="cuda").bfloat16()
        out = torch.zeros(rows // 2 if kind == "gated" else rows, device="cuda").bfloat16()
        options = {"residual": True}
        if kind != "residual":
            options = {"gain": torch.ones_like(x), "eps": 1e-6, "gated": kind == "gated"}
        first = matrix(rows, columns, stored)
        count = max(2, min(40, int(BYTES / first.nbytes)))
        held = [first, *(matrix(rows, columns, stored) for _ in range(count - 1))]

        def work(held=held, x=x, out=out, options=options):
            for weight in held:
                weight_kernels.gemv(x, weight, out, **options)

        now = chosen(len(out), columns, stored == "nf4", kind == "gated")
        found = []
        for tile in [now, *TILES]:
            if tile[0] * tile[1] > 512 * 32 * tile[2] or tile[1] > 2 * columns:
                continue  # does not fit the registers, or is mostly empty
            weight_kernels.gemv_blocks = lambda *_, tile=tile: tile
            found.append((microseconds(work, count), tile))
        used, best = found[0], sorted(found[1:])[:5]
        line = f"{name:<18}{stored:<5} now {used[0]:6.2f} {used[1]} | "
        line += "  ".join(f"{time:.2f} {tile}" for time, tile in best)
        if stored == "bf16":
            row = x[None]
            cublas = microseconds(lambda h=held, r=row: [F.linear(r, m.data) for m in h], count)
            line += f" | cuBLAS {cublas:.2f}"
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
