"""Which tiles `rlrc_ros.vla.weight_kernels.int8_product` should take on this GPU.

    python docs/results/gpu/int8_tiles.py > int8-tiles.txt

For the matrices of a decoder block of OpenVLA-7B, whole and with 90% of its inside gone, and for
the towers' widest: µs of a prompt times the matrix, rounding included, in a CUDA graph over several
such matrices. A prompt is OpenVLA's, or OpenVLA-OFT's with two images. The fastest tiles are
printed as (tokens, rows, columns, warps, stages), after them what cuBLAS takes in bfloat16.
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from tiles import BYTES, SHAPES, matrix, microseconds

from rlrc_ros.vla import weight_kernels

PROMPTS = (281, 592)
TILES = [
    (t, n, k, warps, stages)
    for t, n, k, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4)
    )
    if t * n <= 128 * 32 * warps and (t + n) * k * stages <= 220 << 10
]
TOWERS = {"tower's qkv": (3456, 1152), "tower's fc1": (4304, 1152), "tower's fc2": (1152, 4304)}


def main():
    print(torch.cuda.get_device_name(), torch.__version__)
    chosen = weight_kernels.int8_blocks
    decoder = {name: shape[:2] for name, shape in SHAPES.items() if name != "head"}
    shapes = decoder | TOWERS
    for tokens, (name, (rows, columns)) in itertools.product(PROMPTS, shapes.items()):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        count = max(2, min(20, int(BYTES / (rows * columns))))
        held = [matrix(rows, columns, "int8") for _ in range(count)]

        def work(held=held, x=x):
            for weight in held:
                weight_kernels.int8_product(x, weight)

        now = chosen(tokens, rows)
        found = []
        for tile in [now, *TILES]:
            weight_kernels.int8_blocks = lambda *_, tile=tile: tile
            found.append((microseconds(work, count), tile))
        used, best = found[0], sorted(found[1:])[:5]
        dense = [matrix(rows, columns, "bf16").data for _ in range(count)]
        cublas = microseconds(lambda d=dense, x=x: [F.linear(x, m) for m in d], count)
        line = f"{tokens} × {name:<18} now {used[0]:6.2f} {used[1]} | "
        line += "  ".join(f"{time:.2f} {tile}" for time, tile in best)
        print(f"{line} | cuBLAS {cublas:.2f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
