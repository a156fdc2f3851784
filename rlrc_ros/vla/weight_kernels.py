"""Triton kernels over weights: one row or many times a matrix, and matrices unpacked.

Weights are dense, int8 or NF4 (`rlrc_ros.vla.matrices.Matrix`). Sums are in float32, or of products
of int8 in int32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrc_ros.vla import matrices


@functools.cache
def _starts_early(device: torch.device) -> bool:
    if device.type != "cuda" or not hasattr(tl.extra.cuda, "gdc_wait"):
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def early(x: Tensor) -> dict[str, Any]:
    """Options of a launch that may start before the kernel before it has ended.

    Such a kernel waits for that one's results where it needs them. Programmatic dependent launch:
    NVIDIA GPUs from Hopper on, and Triton from 3.4 on.
    """
    return {"EARLY": True, "launch_pdl": True} if _starts_early(x.device) else {"EARLY": False}


def _pick_levels() -> str:
    """PTX: four bytes' ($4) upper values as bfloat16 levels ($0, $1), their lower ones ($2, $3).

    `prmt` picks four bytes out of eight by the three lowest bits of each half-byte of its selector,
    so a half-byte is an index into half of the 16 levels, and its fourth bit says which half.
    """
    bits = torch.tensor(matrices.NF4_LEVELS).bfloat16().view(torch.int16).tolist()

    def table(shift: int, start: int) -> str:
        picked = [bits[start + i] >> shift & 255 for i in range(4)]
        return hex(sum(byte << 8 * i for i, byte in enumerate(picked)))

    lines = [".reg .b32 s, t, a, b;", ".reg .b32 table<8>;", ".reg .b32 byte<4>;"]
    for i, (shift, start) in enumerate(
        (shift, start) for shift in (8, 0) for start in (0, 4, 8, 12)
    ):
        lines.append(f"mov.b32 table{i}, {table(shift, start)};")
    lines += ["and.b32 s, $4, 0x77777777;", "shr.b32 t, $4, 1;"]
    lines += ["and.b32 t, t, 0x44444444;", "or.b32 t, t, 0x32103210;"]
    for half in (0, 1):
        if half:
            lines += ["shr.b32 s, s, 16;", "shr.b32 t, t, 16;"]
        for part in (0, 1):  # the upper byte of each level, then the lower one
            first = 4 * part
            lines.append(f"prmt.b32 a, table{first}, table{first + 1}, s;")
            lines.append(f"prmt.b32 b, table{first + 2}, table{first + 3}, s;")
            lines.append(f"prmt.b32 byte{2 * half + part}, a, b, t;")
    for out, (half, order) in enumerate(
        [(0, "0x7351"), (1, "0x7351"), (0, "0x6240"), (1, "0x6240")]
    ):
        lines.append(f"prmt.b32 ${out}, byte{2 * half + 1}, byte{2 * half}, {order};")
    return "{ " + " ".join(lines) + " }"


PICK_LEVELS = tl.constexpr(_pick_levels())


@triton.jit
def _gemv_kernel(
    x_ptr, gain_ptr, weight_ptr, scale_ptr, out_ptr, rows, columns, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, INT8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < rows
    k = tl.arange(0, BLOCK_K)
    # The first tile is on its way before the kernel that makes x has ended.
    w = _dense_tile(weight_ptr, n, n_ok, k, columns)
    if GATED:
        v = _dense_tile(weight_ptr, n + rows, n_ok, k, columns)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gated = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for _ in range(0, columns, BLOCK_K):
        ok = k < columns
        x = tl.load(x_ptr + k, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            square += x * x
            x *= tl.load(gain_ptr + k, mask=ok, other=0.0).to(tl.float32)
        k += BLOCK_K
        after = _dense_tile(weight_ptr, n, n_ok, k, columns)
        total += w.to(tl.float32) * x[None, :]
        w = after
        if GATED:
            after = _dense_tile(weight_ptr, n + rows, n_ok, k, columns)
            gated += v.to(tl.float32) * x[None, :]
            v = after
    y = tl.sum(total, 1)
    z = tl.sum(gated, 1)
    if INT8:
        y *= tl.load(scale_ptr + n, mask=n_ok, other=0.0)
        if GATED:
            z *= tl.load(scale_ptr + n + rows, mask=n_ok, other=0.0)
    _finish(y, z, tl.sum(square, 0) / columns + eps, out_ptr, n, n_ok, NORM, GATED, RESIDUAL)


@triton.jit
def _gemv_nf4_kernel(
    x_ptr, gain_ptr, weight_ptr, scale_ptr, level_ptr, out_ptr, rows, columns, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same over NF4: a tile is some rows' next BLOCK_G blocks of 32 bytes with one scale."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < rows
    g = tl.arange(0, BLOCK_G)
    blocks = columns // 64
    w, w_scale = _nf4_tile(weight_ptr, scale_ptr, n, n_ok, g, blocks)
    if GATED:
        v, v_scale = _nf4_tile(weight_ptr, scale_ptr, n + rows, n_ok, g, blocks)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    gated = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    square = tl.zeros([BLOCK_G, 64], tl.float32)
    for _ in range(0, blocks, BLOCK_G):
        k = g[:, None] * 64 + tl.arange(0, 64)[None, :]
        ok = (g < blocks)[:, None]
        x = tl.load(x_ptr + k, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            square += x * x
            x *= tl.load(gain_ptr + k, mask=ok, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [BLOCK_G, 32, 2]))
        g += BLOCK_G
        after, after_scale = _nf4_tile(weight_ptr, scale_ptr, n, n_ok, g, blocks)
        total += _nf4_products(w, w_scale, even, odd, level_ptr, EXACT)
        w, w_scale = after, after_scale
        if GATED:
            after, after_scale = _nf4_tile(weight_ptr, scale_ptr, n + rows, n_ok, g, blocks)
            gated += _nf4_products(v, v_scale, even, odd, level_ptr, EXACT)
            v, v_scale = after, after_scale
    y = tl.sum(total, 1)
    z = tl.sum(gated, 1)
    mean = tl.sum(tl.sum(square, 1), 0) / columns + eps
    _finish(y, z, mean, out_ptr, n, n_ok, NORM, GATED, RESIDUAL)


@triton.jit
def _dense_tile(weight_ptr, n, n_ok, k, columns):
    both = n_ok[:, None] & (k < columns)[None, :]
    place = weight_ptr + n[:, None] * columns + k[None, :]
    # Read once and not again: nothing else should make room for it.
    return tl.load(place, mask=both, other=0, eviction_policy="evict_first")


@triton.jit
def _nf4_tile(weight_ptr, scale_ptr, n, n_ok, g, blocks):
    """Bytes (BLOCK_N, BLOCK_G, 32) and their scales (BLOCK_N, BLOCK_G)."""
    both = n_ok[:, None] & (g < blocks)[None, :]
    block = n[:, None] * blocks + g[None, :]
    place = weight_ptr + block[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    tile = tl.load(place, mask=both[:, :, None], other=0, eviction_policy="evict_first")
    return tile, tl.load(scale_ptr + block, mask=both, other=0.0)


@triton.jit
def _nf4_products(tile, scale, even, odd, level_ptr, EXACT: tl.constexpr):
    """A tile's part of each row's sum, yet to be added up: (BLOCK_N, BLOCK_G)."""
    high, low = _nf4_levels(tile, level_ptr, EXACT)
    return tl.sum(high * even[None, :, :] + low * odd[None, :, :], 2) * scale


@triton.jit
def _nf4_levels(tile, level_ptr, EXACT: tl.constexpr):
    """Of each byte the upper and the lower value, float32, before scaling.

    Looking up is what costs time. Unless it is to be exact, both bytes of a bfloat16 are picked out
    of registers by byte permutation, four bytes of the tile at a time.
    """
    if EXACT:
        high = tl.load(level_ptr + (tile >> 4).to(tl.int32))
        low = tl.load(level_ptr + (tile & 15).to(tl.int32))
    else:
        upper, lower = tl.inline_asm_elementwise(
            asm=PICK_LEVELS,
            constraints="=r,=r,=r,=r,r",
            args=[tile],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        high = upper.to(tl.float32)
        low = lower.to(tl.float32)
    return high, low


@triton.jit
def _finish(
    y, z, mean_square, out_ptr, n, n_ok,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    if NORM:
        factor = 1.0 / tl.sqrt(mean_square)
        y *= factor
        z *= factor
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * z
    if RESIDUAL:
        y += tl.load(out_ptr + n, mask=n_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n_ok)


def gemv(
    x: Tensor,
    weight: Any,
    out: Tensor,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: bool = False,
) -> Tensor:
    """One row times a matrix, into `out`.

    Args:
        x: (K,).
        weight: the matrix, (N, K); dense, int8, or NF4 in blocks of 64.
        out: (N,), or (N / 2,) if gated.
        gain: (K,); if given, x goes through an RMS norm with it first.
        eps: of the norm.
        gated: the upper half of the rows gates the lower: silu(upper) · lower.
        residual: add to what `out` holds.
    """
    rows, columns = weight.shape
    rows = rows // 2 if gated else rows
    nf4 = weight.levels is not None
    block_n, block_k, warps = gemv_blocks(rows, columns, nf4, gated)
    options = early(x) | {
        "NORM": gain is not None, "GATED": gated, "RESIDUAL": residual, "BLOCK_N": block_n,
        "num_warps": warps,
    }  # fmt: skip
    grid, gain = (triton.cdiv(rows, block_n),), x if gain is None else gain
    if not nf4:
        int8 = weight.scales is not None
        scales = weight.scales if int8 else weight.data
        _gemv_kernel[grid](
            x, gain, weight.data, scales, out, rows, columns, eps,
            INT8=int8, BLOCK_K=block_k, **options,
        )  # fmt: skip
        return out
    exact = x.dtype == torch.float32 or x.device.type != "cuda"
    _gemv_nf4_kernel[grid](
        x, gain, weight.data, weight.scales, weight.levels, out, rows, columns, eps,
        EXACT=exact, BLOCK_G=block_k // 64, **options,
    )  # fmt: skip
    return out


def gemv_blocks(rows: int, columns: int, nf4: bool, gated: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile of `gemv`, and warps: what was fastest on an H200.

    Few rows take long ones, so that enough is under way at once.
    """
    warps = 4
    if columns <= 512:
        block_n, block_k = (8 if nf4 else 16), 512
    elif rows <= 512:
        block_n, block_k, warps = 2, 4096, 8
    elif rows < 4096:
        block_n, block_k = (2 if gated else 4), (1024 if gated and not nf4 else 2048)
    elif gated or (nf4 and rows >= 8192):
        block_n, block_k = (8 if nf4 else 4), 512
    else:
        block_n, block_k, warps = 8, 1024, (8 if nf4 else 4)
    return block_n, max(64, min(block_k, triton.next_power_of_2(columns))), warps


@triton.jit
def _unpack_int8_kernel(
    data_ptr, scale_ptr, out_ptr, columns, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = k < columns
    values = tl.load(data_ptr + row * columns + k, mask=ok, other=0).to(tl.float32)
    values *= tl.load(scale_ptr + row)
    if EARLY:  # weights are always there, room for the result is when its last reader has ended
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + row * columns + k, values.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _unpack_nf4_kernel(
    packed_ptr, scale_ptr, level_ptr, out_ptr, blocks,
    EXACT: tl.constexpr, BLOCK_G: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    ok = (g < blocks)[:, None]
    packed = tl.load(packed_ptr + g[:, None] * 32 + tl.arange(0, 32)[None, :], mask=ok, other=0)
    scale = tl.load(scale_ptr + g, mask=g < blocks, other=0.0)[:, None]
    high, low = _nf4_levels(packed, level_ptr, EXACT)
    kind = out_ptr.dtype.element_ty
    both = tl.interleave((high * scale).to(kind), (low * scale).to(kind))
    if EARLY:  # see above
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + g[:, None] * 64 + tl.arange(0, 64)[None, :], both, mask=ok)


def unpack(weight: Any, dtype: torch.dtype) -> Tensor:
    """A matrix in int8, or in NF4 in blocks of 64, as a dense one."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    if weight.levels is None:
        rows, columns = weight.shape
        _unpack_int8_kernel[(rows, triton.cdiv(columns, 2048))](
            weight.data, weight.scales, out, columns, BLOCK=2048, **early(out)
        )
        return out
    blocks, exact = out.numel() // 64, dtype == torch.float32 or out.device.type != "cuda"
    _unpack_nf4_kernel[(triton.cdiv(blocks, 64),)](
        weight.data, weight.scales, weight.levels, out, blocks,
        EXACT=exact, BLOCK_G=64, **early(out),
    )  # fmt: skip
    return out


@triton.jit
def _round_rows_kernel(
    x_ptr, out_ptr, scale_ptr, columns, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    ok = k < columns
    x = tl.load(x_ptr + row * columns + k, mask=ok, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / 127.0, 1e-12)
    y = x / scale
    y = tl.where(y < 0, y - 0.5, y + 0.5)  # the conversion cuts off
    tl.store(out_ptr + row * columns + k, y.to(tl.int8), mask=ok)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _int8_product_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, tokens, rows, columns,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs that share rows of weights follow one another: these are read from memory once."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t_ok, n_ok = t < tokens, n < rows
    x_place = x_ptr + t[:, None] * columns + k[None, :]
    w_place = weight_ptr + n[None, :].to(tl.int64) * columns + k[:, None]
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, columns, BLOCK_K):
        if WHOLE:  # BLOCK_K divides the columns
            x = tl.load(x_place, mask=t_ok[:, None], other=0)
            w = tl.load(w_place, mask=n_ok[None, :], other=0)
        else:
            x = tl.load(x_place, mask=t_ok[:, None] & (k < columns - start)[None, :], other=0)
            w = tl.load(w_place, mask=n_ok[None, :] & (k < columns - start)[:, None], other=0)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        x_place += BLOCK_K
        w_place += BLOCK_K
    y = sums.to(tl.float32) * tl.load(x_scale_ptr + t, mask=t_ok, other=0.0)[:, None]
    y *= tl.load(scale_ptr + n, mask=n_ok, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    place, ok = out_ptr + t[:, None] * rows + n[None, :], t_ok[:, None] & n_ok[None, :]
    if RESIDUAL:
        y += tl.load(place, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, y.to(out_ptr.dtype.element_ty), mask=ok)


def int8_product(
    x: Tensor, weight: Any, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """(T, K) times an int8 matrix, (N, K), in int8: rows of x are rounded, each at its own scale.

    What bitsandbytes' int8 does (Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2), without
    that paper's outliers.

    Args:
        x: (T, K).
        weight: a `Matrix` in int8.
        bias: (N,), added.
        out: (T, N) that the product is added to, in place; a new one if not given.

    Returns:
        (T, N).
    """
    (rows, columns), tokens = weight.shape, len(x)
    rounded = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, device=x.device)
    _round_rows_kernel[(tokens,)](
        x, rounded, scales, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8, **early(x)
    )
    y = x.new_empty(tokens, rows) if out is None else out
    block_t, block_n, block_k, warps, stages = int8_blocks(tokens, rows)
    _int8_product_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(rows, block_n))](
        rounded, scales, weight.data, weight.scales, x if bias is None else bias, y, tokens, rows,
        columns, BIAS=bias is not None, RESIDUAL=out is not None, WHOLE=columns % block_k == 0,
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        **early(x),
    )  # fmt: skip
    return y


def int8_blocks(tokens: int, rows: int) -> tuple[int, int, int, int, int]:
    """Tokens, rows and columns of a tile of `int8_product`, warps and stages: fastest on an H200.

    Of the small tiles one of its 132 processors holds two, or three with a stage less: what that
    lets run at once takes it.
    """
    tiles = triton.cdiv(tokens, 64) * triton.cdiv(rows, 128)
    if tiles >= 6 * 132:
        return 128, 128, 128, 8, 3
    return 64, 128, 128, 4, 3 if 2 * 132 < tiles <= 3 * 132 else 4
