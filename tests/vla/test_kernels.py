"""The Triton kernels against the same in PyTorch: on a GPU, or in Triton's interpreter.

Without a GPU: `TRITON_INTERPRET=1 python -m pytest tests/vla/test_kernels.py`, where Triton is
installed.
"""

import os

import pytest
import torch

from rlrc_ros.vla import matrices

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
kernels = pytest.importorskip("rlrc_ros.vla.kernels")

DEVICE = "cpu" if INTERPRETED else "cuda"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def linear(rows, columns):
    layer = torch.nn.Linear(columns, rows, bias=False, device=DEVICE)
    layer.weight.data = random(rows, columns, seed=1) / columns**0.5
    return layer


@pytest.mark.parametrize(
    "hold", [matrices.held, matrices.rounded, matrices.packed], ids=["dense", "int8", "nf4"]
)
@pytest.mark.parametrize(
    ("rows", "columns"), [(256, 128), (4098, 64), (192, 1088), (32, 704)], ids=str
)
@pytest.mark.parametrize("kind", ["norm", "gated", "residual"])
def test_one_row_times_a_matrix(rows, columns, hold, kind):
    weight, x = hold([linear(rows, columns)], torch.float32), random(columns, seed=2)
    options = {
        "norm": {"gain": random(columns, seed=3), "eps": 1e-6},
        "gated": {"gain": random(columns, seed=3), "eps": 1e-6, "gated": True},
        "residual": {"residual": True},
    }[kind]
    outs = [random(rows // 2 if kind == "gated" else rows, seed=4) for _ in range(2)]
    close(kernels.gemv(x, weight, outs[0], **options), matrices.gemv(x, weight, outs[1], **options))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("position", [0, 5, 64, 99])
def test_attention_of_one_token(heads, kv_heads, position):
    size, capacity = 32, 100
    qkv = random((heads + 2 * kv_heads) * size)
    cos, sin = random(capacity, size // 2, seed=1).repeat(1, 2), random(capacity, size // 2, seed=2)
    sin = sin.repeat(1, 2)
    caches = [random(2, kv_heads, capacity, size, seed=3) for _ in range(2)]
    place = torch.tensor([position], device=DEVICE)
    mixed = [
        operations.decode_attention(qkv, cos, sin, cache, place, heads)
        for operations, cache in zip((kernels, matrices), caches, strict=True)
    ]
    close(*mixed)
    close(*caches)


def test_attention_of_one_token_of_several_sequences():
    size, capacity, heads, kv_heads, batch = 32, 100, 4, 2, 3
    qkv = random(batch, (heads + 2 * kv_heads) * size)
    cos, sin = (random(capacity, size // 2, seed=s).repeat(1, 2) for s in (1, 2))
    cache, place = random(2, batch, kv_heads, capacity, size, seed=3), torch.tensor([70, 3, 99])
    place = place.to(DEVICE)
    expected, single = [], cache.clone()
    for row in range(batch):
        kept = single[:, row].clone()
        args = (qkv[row], cos, sin, kept, place[row : row + 1], heads)
        expected.append(matrices.decode_attention(*args))
        single[:, row] = kept
    for operations in (kernels, matrices):
        whole = cache.clone()
        close(
            operations.decode_attention(qkv, cos, sin, whole, place, heads),
            torch.stack(expected),
        )
        close(whole, single)


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (0, 1)])
def test_rotation_of_a_prompt(heads, kv_heads, start):
    size, capacity, tokens = 16, 12, 7
    qkv = random(tokens, (heads + 2 * kv_heads) * size)
    cos, sin = (random(capacity, size // 2, seed=s).repeat(1, 2) for s in (1, 2))
    caches = [torch.zeros(2, kv_heads, capacity, size, device=DEVICE) for _ in range(2)]
    queries = [
        operations.rope(qkv, cos, sin, cache[:, :, start:], heads)
        for operations, cache in zip((kernels, matrices), caches, strict=True)
    ]
    close(*queries)
    close(*caches)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "seen"), [(16, 1), (80, 80), (144, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_of_every_token_to_every_other(heads, kv_heads, tokens, seen, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 as if it were integers")
    size, capacity = 32, 160
    qkv = random(tokens, (heads + 2 * kv_heads) * size).to(dtype)
    cos, sin = (random(capacity, size // 2, seed=s).repeat(1, 2) for s in (1, 2))
    count = torch.tensor([seen], device=DEVICE)
    found = kernels.attend(qkv, cos, sin, count, heads, kv_heads).float()
    expected = matrices.attend(qkv.float(), cos, sin, count, heads, kv_heads)
    near = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=near, rtol=near)


@pytest.mark.parametrize("bias", [None, 5])
@pytest.mark.parametrize("delta", [None, "plain", "scaled"])
def test_norms(bias, delta):
    gain = random(72, seed=1)
    options = {"bias": None if bias is None else random(72, seed=bias)}
    if delta:
        options["delta"] = random(9, 72, seed=2)
        options["factor"] = random(72, seed=3) if delta == "scaled" else None
    xs = [random(9, 72) for _ in range(2)]
    close(kernels.norm(xs[0], gain, 1e-6, **options), matrices.norm(xs[1], gain, 1e-6, **options))
    close(*xs)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(17, 96, 64), (130, 200, 160)])
@pytest.mark.parametrize("kind", ["plain", "bias", "residual"])
def test_products_in_int8(tokens, rows, columns, kind):
    weight, x = matrices.rounded([linear(rows, columns)], torch.float32), random(tokens, columns)
    found = []
    for operations in (kernels, matrices):
        options = {
            "plain": {},
            "bias": {"bias": random(rows, seed=4)},
            "residual": {"out": random(tokens, rows, seed=5)},
        }[kind]
        found.append(operations.int8_product(x, weight, **options))
        if kind == "residual":
            assert found[-1] is options["out"]
    close(*found)
    if kind == "plain":
        exact = x @ matrices.unpack(weight, torch.float32).T
        assert (found[0] - exact).norm() < 0.02 * exact.norm()


def test_gates_and_unpacking():
    x = random(5, 2 * 1100)
    close(kernels.gate(x), matrices.gate(x))
    close(kernels.gate(30 * x, gelu=True), matrices.gate(30 * x, gelu=True))
    for hold in (matrices.packed, matrices.rounded):
        matrix = hold([linear(40, 128)], torch.float32)
        close(kernels.unpack(matrix, torch.float32), matrices.unpack(matrix, torch.float32))
