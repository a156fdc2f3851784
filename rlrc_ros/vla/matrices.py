"""Weight matrices as the graph engine holds them, and its arithmetic in plain PyTorch.

`rlrc_ros.vla.kernels` has the same operations as Triton kernels; these run anywhere, and say what
those must give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.vla.quantization import Int8Linear, is_quantized, nf4_scales, nf4_weight

NF4_BLOCK = 64
UNPACKED = 1 << 24
"""Weights that are unpacked at a time, for the memory's sake."""
ROUNDED_FROM = 17
"""Tokens from which on they too are rounded to int8 where the matrix is."""
ROW_MULTIPLE = 64
"""So many rows, or a multiple, are unpacked at a time: products like it."""
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Dettmers et al., QLoRA, arXiv 2305.14314, appendix E."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, (N, K): dense, int8 or NF4.

    Attributes:
        data: (N, K); of NF4 N · K / 2 bytes with the first of two weights in the upper half.
        shape: (N, K).
        scales: float32; of int8 one a row, of NF4 one for each 64 weights, row after row; None
            where dense.
        levels: the 16 values of NF4, float32; else None.
    """

    data: Tensor
    shape: tuple[int, int]
    scales: Tensor | None = None
    levels: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def in_int8(self) -> bool:
        """Whether it is in int8."""
        return self.scales is not None and self.levels is None

    def slices(self) -> Iterator[tuple[slice, Matrix]]:
        """Rows that are unpacked at a time, sharing its memory; of a dense one all of them."""
        total, columns = self.shape
        step = total
        if self.scales is not None:
            step = max(ROW_MULTIPLE, UNPACKED // columns // ROW_MULTIPLE * ROW_MULTIPLE)
        for start in range(0, total, step):
            stop = min(start + step, total)
            rows = slice(start, stop)
            if self.levels is None:
                scales = None if self.scales is None else self.scales[rows]
                yield rows, Matrix(self.data[rows], (stop - start, columns), scales)
                continue
            assert self.scales is not None
            data = self.data[start * columns // 2 : stop * columns // 2]
            scales = self.scales[start * columns // NF4_BLOCK : stop * columns // NF4_BLOCK]
            yield rows, Matrix(data, (stop - start, columns), scales, self.levels)


def held(linears: list[Any], dtype: torch.dtype) -> Matrix:
    """Matrices with the same inputs as one, as they are stored: dense, int8 or NF4 (bitsandbytes').

    dtype: what the model computes in.
    """
    if not is_quantized(linears[0]):
        return _dense([linear.weight.detach() for linear in linears])
    if isinstance(linears[0], Int8Linear):
        data = torch.cat([linear.weight.detach() for linear in linears])
        return _int8(data, torch.cat([linear.SCB for linear in linears]) / 127)
    states = [linear.weight.quant_state for linear in linears]
    if any(state.blocksize != NF4_BLOCK or state.shape[1] % NF4_BLOCK for state in states):
        return _dense([nf4_weight(linear, dtype) for linear in linears])
    packed = [linear.weight.data.reshape(-1) for linear in linears]
    scales = [nf4_scales(linear.weight) for linear in linears]
    shape = (sum(state.shape[0] for state in states), states[0].shape[1])
    return _nf4(torch.cat(packed), shape, torch.cat(scales))


def rounded(linears: list[Any], _: torch.dtype) -> Matrix:
    """Dense matrices with the same inputs as one in int8, one scale a row."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    scales = weight.abs().amax(1).float().clamp_min(1e-12) / 127
    data = (weight / scales[:, None].to(weight.dtype)).round_().clamp_(-127, 127).to(torch.int8)
    return _int8(data, scales)


def packed(linears: list[Any], _: torch.dtype) -> Matrix:
    """Dense matrices with the same inputs as one in NF4, without bitsandbytes."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if weight.shape[1] % NF4_BLOCK:
        return _dense([weight])
    blocks = weight.float().reshape(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1).clamp_min(1e-12)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    indices = torch.bucketize(blocks / scales[:, None], (levels[1:] + levels[:-1]) / 2)
    pairs = indices.to(torch.uint8).reshape(-1, 2)
    return _nf4(pairs[:, 0] << 4 | pairs[:, 1], (len(weight), weight.shape[1]), scales)


def _dense(weights: list[Tensor]) -> Matrix:
    data = torch.cat(weights)
    return Matrix(data, (len(data), data.shape[1]))


def _int8(data: Tensor, scales: Tensor) -> Matrix:
    return Matrix(data, (len(data), data.shape[1]), scales)


def _nf4(data: Tensor, shape: tuple[int, int], scales: Tensor) -> Matrix:
    return Matrix(data, shape, scales, torch.tensor(NF4_LEVELS, device=data.device))


class Linear(nn.Module):
    """A linear layer over a `Matrix`: (T, K) -> (T, N)."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, operations: Any) -> None:
        super().__init__()
        self.matrix, self.bias, self._operations = matrix, bias, operations

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return times(x, self.matrix, self._operations, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


def times(x: Tensor, weight: Matrix, operations: Any, bias: Tensor | None = None) -> Tensor:
    """(T, K) -> (T, N)."""
    if weight.in_int8 and len(x) >= ROUNDED_FROM:
        return operations.int8_product(x, weight, bias)
    products = [
        F.linear(x, dense(piece, x.dtype, operations), None if bias is None else bias[rows])
        for rows, piece in weight.slices()
    ]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def add_product(x: Tensor, y: Tensor, weight: Matrix, operations: Any) -> Tensor:
    """Add y (T, K) times the matrix to x (T, N), in place."""
    if weight.in_int8 and len(x) >= ROUNDED_FROM:
        return operations.int8_product(y, weight, out=x)
    for rows, piece in weight.slices():
        x[:, rows].addmm_(y, dense(piece, x.dtype, operations).T)
    return x


def dense(weight: Matrix, dtype: torch.dtype, operations: Any) -> Tensor:
    """The matrix as a tensor; one that is not dense is unpacked for this use."""
    return weight.data if weight.scales is None else operations.unpack(weight, dtype)


def unpack(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix in int8, or in NF4 in blocks of 64, as a dense one."""
    assert weight.scales is not None
    if weight.levels is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
        return torch.mul(weight.data, weight.scales[:, None], out=out)
    data = weight.data.int()
    values = weight.levels[torch.stack([data >> 4, data & 15], 1)].reshape(-1, NF4_BLOCK)
    return (values * weight.scales[:, None]).to(dtype).reshape(weight.shape)


def int8_product(
    x: Tensor, weight: Matrix, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Many rows times an int8 matrix, in int8: see `rlrc_ros.vla.kernels.int8_product`."""
    assert weight.scales is not None
    scales = x.abs().amax(1, keepdim=True).float().clamp_min(127e-12) / 127
    rounded = x.float() / scales
    rounded = (rounded + rounded.sign() / 2).trunc()
    # Sums of such products are whole numbers that float32 does not hold.
    y = (rounded.double() @ weight.data.double().T).float() * scales * weight.scales
    if bias is not None:
        y += bias
    return out.add_(y) if out is not None else y.to(x.dtype)


def gemv(
    x: Tensor,
    weight: Matrix,
    out: Tensor,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: bool = False,
) -> Tensor:
    """One row times a matrix, into `out`: see `rlrc_ros.vla.kernels.gemv`."""
    if gain is not None:
        x = F.rms_norm(x, x.shape, gain, eps)
    y = (x[None] @ (weight.data if weight.scales is None else unpack(weight, x.dtype)).T)[0]
    if gated:
        y = gate(y[None])[0]
    return out.add_(y) if residual else out.copy_(y)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, position: Tensor, heads: int
) -> Tensor:
    """Attention of one token to all before it: see `rlrc_ros.vla.kernels.decode_attention`."""
    kv_heads, capacity, size = cache.shape[-3:]
    keys, values = cache.view(2, -1, kv_heads, capacity, size)
    parts, row = qkv.view(len(keys), -1, size), torch.arange(len(keys), device=qkv.device)
    both = _turn(parts[:, : heads + kv_heads], cos[position, None], sin[position, None])
    keys[row, :, position] = both[:, heads:]
    values[row, :, position] = parts[:, heads + kv_heads :]
    seen = torch.arange(capacity, device=qkv.device) <= position[:, None]
    mixed = F.scaled_dot_product_attention(
        both[:, :heads, None],
        keys,
        values,
        attn_mask=seen[:, None, None],
        enable_gqa=heads != kv_heads,
    )
    return mixed.reshape(*qkv.shape[:-1], -1)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, heads: int) -> Tensor:
    """Rotate a prompt's queries and keys: see `rlrc_ros.vla.kernels.rope`."""
    kv_heads, size = cache.shape[1], cache.shape[3]
    tokens = len(qkv)
    parts = qkv.view(tokens, -1, size).transpose(0, 1)
    both = _turn(parts[: heads + kv_heads], cos[:tokens], sin[:tokens])
    cache[0, :, :tokens] = both[heads:]
    cache[1, :, :tokens] = parts[heads + kv_heads :]
    return both[:heads]


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, heads: int, kv_heads: int
) -> Tensor:
    """Attention of every token to every other: see `rlrc_ros.vla.kernels.attend`."""
    tokens = len(qkv)
    parts = qkv.view(tokens, heads + 2 * kv_heads, -1).transpose(0, 1)
    both = _turn(parts[: heads + kv_heads], cos[:tokens], sin[:tokens])
    mixed = F.scaled_dot_product_attention(
        both[None, :heads],
        both[None, heads:],
        parts[None, heads + kv_heads :],
        attn_mask=(torch.arange(tokens, device=qkv.device) < seen)[None, None, None],
        enable_gqa=heads != kv_heads,
    )
    return mixed[0].transpose(0, 1).reshape(tokens, -1)


def norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    bias: Tensor | None = None,
    delta: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """An RMS norm, or a layer norm: see `rlrc_ros.vla.kernels.norm`."""
    if delta is not None:
        x += delta if factor is None else delta * factor
    if bias is None:  # a gain of more precision than x keeps it
        return F.rms_norm(x.to(gain.dtype), gain.shape, gain, eps).to(x.dtype)
    return F.layer_norm(x, gain.shape, gain, bias, eps)


def gate(x: Tensor, gelu: bool = False) -> Tensor:
    """(T, 2W) -> (T, W): silu of the first half times the second; or GELU's tanh form of it."""
    first, second = x.chunk(2, -1)
    return (F.gelu(first, approximate="tanh") if gelu else F.silu(first)) * second
