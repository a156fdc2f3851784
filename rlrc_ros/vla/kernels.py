"""Triton kernels of the graph engine: what cuBLAS and PyTorch do in several launches, in one.

A decode step multiplies one row by every matrix, so it costs the reading of the matrices and the
launches. Here a layer is five launches: norm and projection, rotation and attention, projection and
residual, norm and gated projection, projection and residual. All sums are in float32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrc_ros.vla.weight_kernels import early, gemv, int8_product, unpack

__all__ = [
    "attend",
    "decode_attention",
    "gate",
    "gemv",
    "int8_product",
    "norm",
    "rope",
    "unpack",
]


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
    row = tl.program_id(1)
    group = heads // kv_heads
    kv = head // group
    position = tl.load(position_ptr + row).to(tl.int32)
    d = tl.arange(0, HALF)
    size = 2 * HALF
    qkv_ptr += row * (heads + 2 * kv_heads) * size
    out_ptr += row * heads * size
    key_ptr += row * kv_heads * capacity * size
    value_ptr += row * kv_heads * capacity * size
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

    Of one sequence, or of B.

    Args:
        qkv: ((heads + 2 kv_heads) · head_dim,), or (B, that many).
        cos: (capacity, head_dim) float32, as is sin.
        sin: of the rotary embedding (Su et al., arXiv 2104.09864).
        cache: (2, kv_heads, capacity, head_dim) or (2, B, kv_heads, capacity, head_dim), keys and
            values.
        position: the token's in each sequence, (1,) or (B,) int64, one of each.
        heads: how many queries there are.

    Returns:
        (heads · head_dim,), or (B, that many).
    """
    kv_heads, capacity, size = cache.shape[-3:]
    out = qkv.new_empty(*qkv.shape[:-1], heads * size)
    block, warps = attention_blocks(capacity)
    _decode_attention_kernel[(heads, qkv.numel() // qkv.shape[-1])](
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
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, HALF)
    size = 2 * HALF
    total = heads + 2 * kv_heads
    place = qkv_ptr + (token * total + h)[:, None] * size + d[None, :]
    a = tl.load(place, mask=(h < total)[:, None], other=0.0)
    b = tl.load(place + HALF, mask=(h < total)[:, None], other=0.0)
    cos = tl.load(cos_ptr + token * size + d).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * size + d).to(tl.float32)[None, :]
    x = a.to(tl.float32)
    y = b.to(tl.float32)
    first = (x * cos - y * sin).to(a.dtype)
    second = (y * cos + x * sin).to(a.dtype)
    ok = (h < heads)[:, None]
    to = query_ptr + (h * tokens + token)[:, None] * size + d[None, :]
    tl.store(to, first, mask=ok)
    tl.store(to + HALF, second, mask=ok)
    ok = ((h >= heads) & (h < heads + kv_heads))[:, None]
    to = key_ptr + ((h - heads) * capacity + token)[:, None] * size + d[None, :]
    tl.store(to, first, mask=ok)
    tl.store(to + HALF, second, mask=ok)
    ok = ((h >= heads + kv_heads) & (h < total))[:, None]
    to = value_ptr + ((h - heads - kv_heads) * capacity + token)[:, None] * size + d[None, :]
    tl.store(to, a, mask=ok)
    tl.store(to + HALF, b, mask=ok)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, heads: int) -> Tensor:
    """Rotate queries and keys of a prompt; keys and values go to the cache's beginning.

    (T, (heads + 2 kv_heads) · head_dim) -> queries (heads, T, head_dim). `cache` may be a part of a
    longer one: its places from some on.
    """
    kv_heads, size = cache.shape[1], cache.shape[3]
    tokens, capacity, total = len(qkv), cache.stride(1) // size, heads + 2 * kv_heads
    query = torch.empty(heads, tokens, size, dtype=qkv.dtype, device=qkv.device)
    block = min(16, triton.next_power_of_2(total))
    _rope_kernel[(tokens, triton.cdiv(total, block))](
        qkv, cos, sin, query, cache[0], cache[1], heads, kv_heads, tokens, capacity,
        HALF=size // 2, BLOCK_H=block, num_warps=4, **early(qkv),
    )  # fmt: skip
    return query


@triton.jit
def _attend_kernel(
    query_ptr, key_ptr, value_ptr, seen_ptr, out_ptr, heads, kv_heads, tokens, scale,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    first_key = head // (heads // kv_heads) * tokens
    seen = tl.load(seen_ptr).to(tl.int32)
    d = tl.arange(0, SIZE)
    n = tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = (m < tokens)[:, None]
    place = (head * tokens + m)[:, None] * SIZE + d[None, :]
    query = tl.load(query_ptr + place, mask=m_ok, other=0.0)
    largest = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, SIZE], tl.float32)
    for start in range(0, seen, BLOCK_N):
        n_ok = start + n < seen
        row = (first_key + start + n) * SIZE
        key = tl.load(key_ptr + row[None, :] + d[:, None], mask=n_ok[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(n_ok[None, :], score, -float("inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        fade = tl.exp(largest - new)
        p = tl.exp(score - new[:, None])
        weight = weight * fade + tl.sum(p, 1)
        value = tl.load(value_ptr + row[:, None] + d[None, :], mask=n_ok[:, None], other=0.0)
        total = total * fade[:, None]
        total += tl.dot(p.to(value.dtype), value, input_precision="ieee")
        largest = new
    place = m[:, None] * (heads * SIZE) + head * SIZE + d[None, :]
    tl.store(out_ptr + place, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=m_ok)


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
    cache = qkv.new_empty(2, kv_heads, tokens, size)
    query = rope(qkv, cos, sin, cache, heads)
    out = qkv.new_empty(tokens, heads * size)
    block_m, block_n, warps, stages = attend_blocks(tokens, heads)
    _attend_kernel[(triton.cdiv(tokens, block_m), heads)](
        query, cache[0], cache[1], seen, out, heads, kv_heads, tokens, size**-0.5,
        SIZE=size, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        **early(qkv),
    )  # fmt: skip
    return out


def attend_blocks(tokens: int, heads: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile of `attend`, warps and stages: what was fastest on an H200.

    Few heads are few programs, so these are made smaller.
    """
    return (64, 64, 4, 3) if heads * triton.cdiv(tokens, 64) >= 128 else (16, 128, 4, 3)


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
