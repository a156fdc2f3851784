"""Triton kernels of the graph engine: what cuBLAS and PyTorch do in several launches, in one.

A decode step multiplies one row by every matrix, so it costs the reading of the matrices and the
launches. Here a layer is five launches: norm and projection, rotation and attention, projection and
residual, norm and gated projection, projection and residual. All sums are in float32.
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


@triton.jit
def _decode_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    out_ptr,
    heads,
    kv_heads,
    capacity,
    scale,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    group = heads // kv_heads
    kv = head // group
    position = tl.load(position_ptr).to(tl.int32)
    d = tl.arange(0, HALF)
    size = 2 * HALF
    cos = tl.load(cos_ptr + position * size + d).to(tl.float32)
    sin = tl.load(sin_ptr + position * size + d).to(tl.float32)

    a = tl.load(qkv_ptr + head * size + d).to(tl.float32)
    b = tl.load(qkv_ptr + head * size + HALF + d).to(tl.float32)
    q1 = (a * cos - b * sin) * scale
    q2 = (b * cos + a * sin) * scale
    a = tl.load(qkv_ptr + (heads + kv) * size + d).to(tl.float32)
    b = tl.load(qkv_ptr + (heads + kv) * size + HALF + d).to(tl.float32)
    k1 = (a * cos - b * sin).to(key_ptr.dtype.element_ty)
    k2 = (b * cos + a * sin).to(key_ptr.dtype.element_ty)
    v1 = tl.load(qkv_ptr + (heads + kv_heads + kv) * size + d)
    v2 = tl.load(qkv_ptr + (heads + kv_heads + kv) * size + HALF + d)
    if head % group == 0:  # the others of the group have the same ones at hand
        place = (kv * capacity + position) * size + d
        tl.store(key_ptr + place, k1)
        tl.store(key_ptr + place + HALF, k2)
        tl.store(value_ptr + place, v1)
        tl.store(value_ptr + place + HALF, v2)

    largest = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), 0)
    weight = tl.exp(largest - largest)  # 1, of the type that the loop goes on with
    sum1 = v1.to(tl.float32)
    sum2 = v2.to(tl.float32)
    for start in range(0, position, BLOCK):
        t = start + tl.arange(0, BLOCK)
        seen = t < position
        place = (kv * capacity + t)[:, None] * size + d[None, :]
        k = tl.load(key_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        score = tl.sum(k * q1[None, :], 1)
        k = tl.load(key_ptr + place + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
        score = tl.where(seen, score + tl.sum(k * q2[None, :], 1), -float("inf"))
        new = tl.maximum(largest, tl.max(score, 0))
        fade = tl.exp(largest - new)
        p = tl.exp(score - new)
        weight = weight * fade + tl.sum(p, 0)
        v = tl.load(value_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        sum1 = sum1 * fade + tl.sum(p[:, None] * v, 0)
        v = tl.load(value_ptr + place + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
        sum2 = sum2 * fade + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(out_ptr + head * size + d, (sum1 / weight).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + head * size + HALF + d, (sum2 / weight).to(out_ptr.dtype.element_ty))


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, position: Tensor, heads: int
) -> Tensor:
    """Rotate one token's query and key, keep its key and value, attend to all so far.

    Args:
        qkv: ((heads + 2 kv_heads) · head_dim,).
        cos: (capacity, head_dim) float32, as is sin.
        sin: of the rotary embedding (Su et al., arXiv 2104.09864).
        cache: (2, kv_heads, capacity, head_dim), keys and values.
        position: the token's, (1,) int64.
        heads: how many queries there are.

    Returns:
        (heads · head_dim,).
    """
    _, kv_heads, capacity, size = cache.shape
    out = torch.empty(heads * size, dtype=qkv.dtype, device=qkv.device)
    block, warps = attention_blocks(capacity)
    _decode_attention_kernel[(heads,)](
        qkv,
        cos,
        sin,
        cache[0],
        cache[1],
        position,
        out,
        heads,
        kv_heads,
        capacity,
        size**-0.5,
        HALF=size // 2,
        BLOCK=block,
        num_warps=warps,
        **early(qkv),
    )
    return out


def attention_blocks(capacity: int) -> tuple[int, int]:
    """Places that a program of `decode_attention` looks at together, and its warps."""
    return min(512, max(64, triton.next_power_of_2(capacity))), 8


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, query_ptr, key_ptr, value_ptr, heads, kv_heads, tokens, capacity,
    HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, HALF)
    size = 2 * HALF
    place = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * size + d
    a = tl.load(place)
    b = tl.load(place + HALF)
    if head < heads + kv_heads:
        cos = tl.load(cos_ptr + token * size + d).to(tl.float32)
        sin = tl.load(sin_ptr + token * size + d).to(tl.float32)
        x = a.to(tl.float32)
        y = b.to(tl.float32)
        first = (x * cos - y * sin).to(a.dtype)
        second = (y * cos + x * sin).to(a.dtype)
        if head < heads:
            to = query_ptr + (head * tokens + token) * size + d
            tl.store(to, first)
            tl.store(to + HALF, second)
        else:
            to = key_ptr + ((head - heads) * capacity + token) * size + d
            tl.store(to, first)
            tl.store(to + HALF, second)
    else:
        to = value_ptr + ((head - heads - kv_heads) * capacity + token) * size + d
        tl.store(to, a)
        tl.store(to + HALF, b)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, heads: int) -> Tensor:
    """Rotate queries and keys of a prompt; keys and values go to the cache's beginning.

    (T, (heads + 2 kv_heads) · head_dim) -> queries (heads, T, head_dim). `cache` may be a part of a
    longer one: its places from some on.
    """
    kv_heads, size = cache.shape[1], cache.shape[3]
    tokens, capacity = len(qkv), cache.stride(1) // size
    query = torch.empty(heads, tokens, size, dtype=qkv.dtype, device=qkv.device)
    _rope_kernel[(tokens, heads + 2 * kv_heads)](
        qkv, cos, sin, query, cache[0], cache[1], heads, kv_heads, tokens, capacity,
        HALF=size // 2, num_warps=1, **early(qkv),
    )  # fmt: skip
    return query


@triton.jit
def _attend_kernel(
    qkv_ptr, cos_ptr, sin_ptr, seen_ptr, out_ptr, heads, kv_heads, tokens, scale,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    kv = head // (heads // kv_heads)
    seen = tl.load(seen_ptr).to(tl.int32)
    size = 2 * HALF
    row = (heads + 2 * kv_heads) * size
    d = tl.arange(0, HALF)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = (m < tokens)[:, None]
    place = qkv_ptr + m[:, None] * row + head * size + d[None, :]
    a = tl.load(place, mask=m_ok, other=0.0)
    b = tl.load(place + HALF, mask=m_ok, other=0.0)
    dtype = a.dtype
    turn = m[:, None] * size + d[None, :]
    cos = tl.load(cos_ptr + turn, mask=m_ok, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=m_ok, other=0.0)
    q1 = (a.to(tl.float32) * cos - b.to(tl.float32) * sin).to(dtype)
    q2 = (b.to(tl.float32) * cos + a.to(tl.float32) * sin).to(dtype)

    largest = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sum1 = tl.zeros([BLOCK_M, HALF], tl.float32)
    sum2 = tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(0, seen, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_ok = (n < seen)[:, None]
        key = qkv_ptr + n[:, None] * row + (heads + kv) * size + d[None, :]
        x = tl.load(key, mask=n_ok, other=0.0).to(tl.float32)
        y = tl.load(key + HALF, mask=n_ok, other=0.0).to(tl.float32)
        angle = n[:, None] * size + d[None, :]
        c = tl.load(cos_ptr + angle, mask=n_ok, other=0.0)
        s = tl.load(sin_ptr + angle, mask=n_ok, other=0.0)
        k1 = (x * c - y * s).to(dtype)
        k2 = (y * c + x * s).to(dtype)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score += tl.dot(q2, tl.trans(k2), input_precision="ieee")
        score = tl.where((n < seen)[None, :], score * scale, -float("inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        fade = tl.exp(largest - new)
        p = tl.exp(score - new[:, None])
        weight = weight * fade + tl.sum(p, 1)
        value = key + kv_heads * size
        v = tl.load(value, mask=n_ok, other=0.0)
        sum1 = sum1 * fade[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        v = tl.load(value + HALF, mask=n_ok, other=0.0)
        sum2 = sum2 * fade[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        largest = new
    to = out_ptr + m[:, None] * (heads * size) + head * size + d[None, :]
    tl.store(to, (sum1 / weight[:, None]).to(dtype), mask=m_ok)
    tl.store(to + HALF, (sum2 / weight[:, None]).to(dtype), mask=m_ok)


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, heads: int, kv_heads: int
) -> Tensor:
    """Rotate queries and keys, and let every token attend to the first `seen`, later ones too.

    Args:
        qkv: (T, (heads + 2 kv_heads) · head_dim).
        cos: (T or more, head_dim) float32, as is sin.
        sin: of the rotary embedding.
        seen: how many tokens are no padding, (1,) int64, at least 1.
        heads: how many queries a token has.
        kv_heads: how many keys.

    Returns:
        (T, heads · head_dim).
    """
    tokens, size = len(qkv), qkv.shape[1] // (heads + 2 * kv_heads)
    out = torch.empty(tokens, heads * size, dtype=qkv.dtype, device=qkv.device)
    # Few heads are few programs, so these are made smaller, and load ahead: nothing else hides it.
    block, stages = (64, 1) if heads * triton.cdiv(tokens, 64) >= 128 else (32, 2)
    _attend_kernel[(triton.cdiv(tokens, block), heads)](
        qkv, cos, sin, seen, out, heads, kv_heads, tokens, size**-0.5,
        HALF=size // 2, BLOCK_M=block, BLOCK_N=64, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, factor_ptr, gain_ptr, bias_ptr, out_ptr, width, eps,
    ADD: tl.constexpr, FACTOR: tl.constexpr, CENTRE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    ok = k < width
    x = tl.load(x_ptr + row * width + k, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + row * width + k, mask=ok, other=0.0).to(tl.float32)
        if FACTOR:
            delta *= tl.load(factor_ptr + k, mask=ok, other=0.0).to(tl.float32)
        x += delta
        tl.store(x_ptr + row * width + k, x.to(x_ptr.dtype.element_ty), mask=ok)
    if CENTRE:
        x = tl.where(ok, x - tl.sum(x, 0) / width, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    y *= tl.load(gain_ptr + k, mask=ok, other=0.0).to(tl.float32)
    if CENTRE:
        y += tl.load(bias_ptr + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + k, y.to(out_ptr.dtype.element_ty), mask=ok)


def norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    bias: Tensor | None = None,
    delta: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """(T, W) -> (T, W): an RMS norm, or with a bias a layer norm.

    delta: first added to x in place, times `factor` (W,) if given.
    """
    out = torch.empty_like(x)
    _norm_kernel[(len(x),)](
        x,
        x if delta is None else delta,
        x if factor is None else factor,
        gain,
        gain if bias is None else bias,
        out,
        x.shape[1],
        eps,
        ADD=delta is not None,
        FACTOR=factor is not None,
        CENTRE=bias is not None,
        BLOCK=triton.next_power_of_2(x.shape[1]),
        **early(x),
    )
    return out


@triton.jit
def _gate_kernel(
    x_ptr, out_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = k < width
    gate = tl.load(x_ptr + 2 * row * width + k, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + (2 * row + 1) * width + k, mask=ok, other=0.0).to(tl.float32)
    inner = gate
    if GELU:  # 1 + tanh(z) is 2 · sigmoid(2z), and 2 · √(2 / π) = 1.5957691216
        inner = 1.5957691216 * (gate + 0.044715 * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out_ptr + row * width + k, y.to(out_ptr.dtype.element_ty), mask=ok)


def gate(x: Tensor, gelu: bool = False) -> Tensor:
    """(T, 2W) -> (T, W): silu of the first half times the second; or GELU's tanh form of it."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    grid = (tokens, triton.cdiv(width, 1024))
    _gate_kernel[grid](x, out, width, GELU=gelu, BLOCK=1024, **early(x))
    return out


@triton.jit
def _unpack_kernel(
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
    if EARLY:  # weights are always there, room for the result is when its last reader has ended
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + g[:, None] * 64 + tl.arange(0, 64)[None, :], both, mask=ok)


def unpack(weight: Any, dtype: torch.dtype) -> Tensor:
    """A matrix in int8, or in NF4 in blocks of 64, as a dense one."""
    if weight.levels is None:
        return matrices.unpack(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    blocks, exact = out.numel() // 64, dtype == torch.float32 or out.device.type != "cuda"
    _unpack_kernel[(triton.cdiv(blocks, 64),)](
        weight.data, weight.scales, weight.levels, out, blocks,
        EXACT=exact, BLOCK_G=64, **early(out),
    )  # fmt: skip
    return out
