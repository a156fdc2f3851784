"""Whether a product in Triton, with what follows it in the same kernel, beats cuBLAS.

    python docs/results/gpu/products.py > products.txt

The matrices of OpenVLA-OFT's towers and of whole and narrow decoder layers; µs in a CUDA graph over
four such matrices. Each kind is compared with cuBLAS and the kernel after it; `res` adds to a
residual, which cuBLAS is not asked to do here. Tiles are (rows, columns, depth, warps, stages).
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from tiles import microseconds

SHAPES = (
    (522, 3072, 1024, "bias"),
    (522, 1024, 1024, "res"),
    (522, 4096, 1024, "gelu"),
    (522, 1024, 4096, "res"),
    (512, 3456, 1152, "bias"),
    (512, 1152, 1152, "res"),
    (512, 4304, 1152, "gelu"),
    (512, 1152, 4304, "res"),
    (608, 1152, 4096, "plain"),
    (608, 4096, 384, "plus"),
    (608, 1088, 4096, "gated"),
    (608, 4096, 1088, "plus"),
    (608, 12288, 4096, "plain"),
    (608, 11008, 4096, "gated"),
    (608, 4096, 11008, "plus"),
)


@triton.jit
def kernel(
    x_ptr, w_ptr, bias_ptr, factor_ptr, out_ptr, M, N, K,
    BIAS: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    mo = tl.where(m < M, m, 0)
    no = tl.where(n < N, n, 0)
    x = x_ptr + mo[:, None] * K + k[None, :]
    w = w_ptr + no[None, :] * K + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for done in range(0, K, BK):
        a = tl.load(x, mask=(k < K - done)[None, :], other=0.0)
        b = tl.load(w, mask=(k < K - done)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        if GATED:
            c = tl.load(w + N * K, mask=(k < K - done)[:, None], other=0.0)
            up = tl.dot(a, c, up)
        x += BK
        w += BK
    ok = (m < M)[:, None] & (n < N)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + no).to(tl.float32)[None, :]
    if GELU:
        total = total * 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    if FACTOR:
        total *= tl.load(factor_ptr + no).to(tl.float32)[None, :]
    place = out_ptr + m[:, None] * N + n[None, :]
    if RESIDUAL:
        total += tl.load(place, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=ok)


def product(x, w, out, kind, bias, factor, tile):
    (rows, depth), columns = x.shape, out.shape[1]
    bm, bn, bk, warps, stages = tile
    kernel[(triton.cdiv(rows, bm) * triton.cdiv(columns, bn),)](
        x, w, bias, factor, out, rows, columns, depth,
        BIAS=kind in ("bias", "gelu", "res"), GELU=kind == "gelu", GATED=kind == "gated",
        RESIDUAL=kind in ("res", "plus"), FACTOR=kind == "res", BM=bm, BN=bn, BK=bk,
        num_warps=warps, num_stages=stages, launch_pdl=True,
    )  # fmt: skip
    return out


def reference(x, w, out, kind, bias):
    if kind == "plus":
        return out.addmm_(x, w.T)
    y = F.linear(x, w, bias if kind in ("bias", "gelu", "res") else None)
    if kind == "gated":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(y) if kind == "gelu" else y


def candidates():
    for bm, bn, bk, warps, stages in itertools.product(
        (64, 128), (32, 64, 128, 256), (64, 128), (4, 8), (3, 4)
    ):
        fits = (bm + bn) * bk * 2 * stages <= 220 << 10 and bm * bn <= 128 * 128
        if fits and warps != {64 * 64: 8, 128 * 128: 4}.get(max(bm * bn, 64 * 64)):
            yield bm, bn, bk, warps, stages


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.05


def compare(rows, columns, depth, kind):
    x, bias, factor = random(rows, depth), random(columns), random(columns)
    weights = [random(columns * (2 if kind == "gated" else 1), depth) for _ in range(4)]
    out = random(rows, columns)

    def timed(call, *arguments):
        def work():
            for w in weights:
                call(x, w, out, kind, bias, *arguments)

        return microseconds(work, len(weights))

    theirs = timed(reference)
    found = []
    for tile in candidates():
        with contextlib.suppress(Exception):  # where it does not fit the GPU
            found.append((round(timed(product, factor, tile), 1), tile))
    print(f"{rows}x{columns}x{depth} {kind}: cuBLAS {theirs:.1f} us; best", sorted(found)[:3])


if __name__ == "__main__":
    for shape in SHAPES:
        compare(*shape)
