"""Quantized weights through bitsandbytes: NF4 and int8.

NF4 (Dettmers et al., QLoRA, arXiv 2305.14314) keeps two weights a byte and one scale a block, and
is dequantized on use. int8 (Dettmers et al., LLM.int8(), arXiv 2208.07339, without its outliers)
keeps one weight a byte and one scale a row, and multiplies in integers. Stored as plain tensors
beside the weight, `X.weight`, `X.weight.absmax` or `X.weight.SCB`, …, so safetensors holds them.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.openvla import OpenVLA
from rlrc_ros.vla.pi0 import Pi0

STATE_KEY = "quant_state.bitsandbytes__nf4"
SCALE_KEY = "SCB"
"""bitsandbytes' name for the largest magnitude in each row, which int8's 127 stands for."""


@functools.cache
def bitsandbytes() -> ModuleType:
    """The library, imported when a quantized policy first needs it: that takes over a second."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it reports an optional accelerator that is missing
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise UserError(
            f"quantized weights take bitsandbytes, which is missing ({error}); run: pip install "
            "bitsandbytes"
        ) from error
    return library


def quantizable(
    model: OpenVLA | Pi0, config: QuantizationConfig
) -> Iterator[tuple[nn.Module, str, str]]:
    """The linear layers that `config` covers, as (parent module, attribute, full name).

    In the decoder those are the layers' projections: the embedding and the head stay as they are,
    since the head's action rows decide the bin.

    Raises:
        UserError: the model has no such part.
    """
    roots: dict[str, list[tuple[str, nn.Module]]] = {
        "llm": [("language_model.model.layers", model.language_model.model.layers)],
        "vision": [("vision_backbone", model.vision_backbone)],
        "projector": [("projector", model.projector)],
    }
    if isinstance(model, Pi0):
        roots["expert"] = [("expert.model.layers", model.expert.model.layers)]
    if model.proprio_projector is not None:
        roots["projector"].append(("proprio_projector", model.proprio_projector))
    for part in config.parts:
        if part not in roots:
            raise UserError(f"quantization: this policy has no part '{part}'")
        for prefix, root in roots[part]:
            for path, module in list(root.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, attribute = path.rpartition(".")
                    yield root.get_submodule(parent), attribute, f"{prefix}.{path}"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale a row, and inputs that are quantized on the way.

    On a CPU through torch's dynamically quantized kernels (inputs in 7 bits of one scale a call, so
    that no processor's instructions overflow, and all give the same); elsewhere through
    bitsandbytes (inputs in 8 bits, one scale a row).

    Args:
        weight: (outputs, inputs) int8.
        scale: (outputs,) float32; what 127 stands for.
        bias: (outputs,), or None.
    """

    SCB: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer(SCALE_KEY, scale.float())
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self._packed: Any = None

    @classmethod
    def joined(cls, linears: list[Int8Linear]) -> Int8Linear:
        """Several with the same inputs, and no bias, as one."""
        weight = torch.cat([linear.weight for linear in linears])
        return cls(weight, torch.cat([linear.SCB for linear in linears]), None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights that the integers stand for, (outputs, inputs)."""
        return (self.weight * (self.SCB[:, None] / 127)).to(dtype)

    @property
    def nbytes(self) -> int:
        """Of the weights as they are held."""
        copies = 1 if self._packed is None else 2
        return copies * self.weight.nbytes + self.SCB.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the dtype of the inputs."""
        if x.device.type == "cpu":
            if self._packed is None:
                self._packed = self._pack()
            out = torch.ops.quantized.linear_dynamic(x.float(), self._packed, True)
            return (out if self.bias is None else out + self.bias).to(x.dtype)
        library = bitsandbytes()
        rows = x.reshape(-1, x.shape[-1]).half()
        quantized, scales, _ = library.functional.int8_vectorwise_quant(rows)
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            quantized, self.weight, scales, self.SCB, bias=self.bias, dtype=x.dtype
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def _pack(self) -> Any:
        """The weight as torch's kernels take it."""
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that a successor is being made
            weight = torch._make_per_channel_quantized_tensor(
                self.weight.data, self.SCB.double() / 127, zero, 0
            )
            return torch.ops.quantized.linear_prepack(weight, None)


def quantize(model: OpenVLA | Pi0, config: QuantizationConfig) -> None:
    """Replace the layers that `config` covers by quantized ones, in place."""
    for parent, attribute, _ in quantizable(model, config):
        linear = getattr(parent, attribute)
        setattr(parent, attribute, _quantized(linear, linear.weight.detach(), linear.bias, config))


def quantize_while_loading(
    model: OpenVLA | Pi0,
    config: QuantizationConfig,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> None:
    """Put quantized layers into a model on the meta device, made of full-precision tensors.

    One matrix at a time is read, quantized on the device and let go.

    Args:
        model: on the meta device; the layers that `config` covers are replaced.
        config: which layers, and how.
        tensors: memory-mapped, by name; those of the layers are taken out.
        device: where the quantized weights go.
    """
    for parent, attribute, name in quantizable(model, config):
        linear = getattr(parent, attribute)
        weight = tensors.pop(f"{name}.weight").to(device)
        setattr(parent, attribute, _quantized(linear, weight, linear.bias, config))


def _quantized(
    linear: nn.Linear, weight: Tensor, bias: nn.Parameter | None, config: QuantizationConfig
) -> nn.Module:
    """The quantized layer for a linear one that has this weight."""
    bnb = bitsandbytes()
    if config.method == "bitsandbytes-int8":
        rounded, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return Int8Linear(rounded, scale, bias)
    packed, state = bnb.functional.quantize_4bit(
        weight.float(),
        blocksize=config.block_size,
        compress_statistics=config.double_quantization,
        quant_type="nf4",
    )
    parameter = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=config.block_size,
        compress_statistics=config.double_quantization,
        quant_type="nf4",
        bnb_quantized=True,
    )
    return _linear4bit(linear, parameter, bias)


def stored(model: OpenVLA | Pi0) -> dict[str, Tensor]:
    """The model's tensors as a bundle stores them.

    Bitsandbytes adds the statistics of its layers by itself.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        key = f"{layer}.weight.{SCALE_KEY}" if last == SCALE_KEY else name
        tensors[key] = value.detach().cpu().contiguous()
    return tensors


def restore(model: OpenVLA | Pi0, config: QuantizationConfig, tensors: dict[str, Tensor]) -> None:
    """Put quantized layers into a model on the meta device, taking their tensors out of `tensors`.

    Raises:
        UserError: a layer's quantized tensors are missing.
    """
    int8 = config.method == "bitsandbytes-int8"
    needed = SCALE_KEY if int8 else STATE_KEY
    for parent, attribute, name in quantizable(model, config):
        linear = getattr(parent, attribute)
        prefix = f"{name}.weight"
        statistics = {
            key[len(prefix) + 1 :]: tensors.pop(key)
            for key in list(tensors)
            if key.startswith(f"{prefix}.")
        }
        if prefix not in tensors or needed not in statistics:
            raise UserError(
                f"config.json says that {name} is {'int8' if int8 else 'NF4'}, and "
                "model.safetensors has no such weights for it"
            )
        if int8:
            # Copies: the file's own memory map must not change under a running policy.
            weight, scale = tensors.pop(prefix).clone(), statistics[needed].clone()
            setattr(parent, attribute, Int8Linear(weight, scale, linear.bias))
            continue
        weight = bitsandbytes().nn.Params4bit.from_prequantized(
            tensors.pop(prefix), statistics, requires_grad=False, device="cpu"
        )
        setattr(parent, attribute, _linear4bit(linear, weight, linear.bias))


def _linear4bit(linear: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    with torch.device("meta"):
        module = _linear4bit_class()(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4"
        )
    module.weight, module.bias = weight, bias
    return module


@functools.cache
def _linear4bit_class() -> Any:
    class NF4Linear(bitsandbytes().nn.Linear4bit):  # type: ignore[misc]
        """On a CPU without bitsandbytes' own way of multiplying.

        That is wrong for some widths (`unpack_nf4`), and where the processor has AVX512-BF16 it
        goes on in bfloat16, whatever the inputs are: a policy would act differently on different
        machines.
        """

        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                return super().forward(x)
            return nn.functional.linear(x, nf4_weight(self, x.dtype), self.bias)

    return NF4Linear


def nf4_scales(weight: Any) -> Tensor:
    """What 1 stands for in each block of an NF4 weight, (blocks,) float32."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float().reshape(-1)


def unpack_nf4(
    packed: Tensor, scales: Tensor, block: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weights that NF4 codes stand for, of this shape.

    bitsandbytes is told of rows of one block each: where a row ends within a block, its CPU kernel
    (0.50) takes the next row's first weights for a new block's, and their scale from there.
    """
    bitsandbytes()
    count = shape[0] * shape[1]
    rows = [count // block, block] if count % block == 0 else [count]
    unpack = torch.ops.bitsandbytes.dequantize_4bit.default
    return unpack(packed, scales, block, "nf4", rows, dtype).view(shape)


def nf4_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """The weights that an NF4 layer stands for, (outputs, inputs)."""
    weight, state = linear.weight, linear.weight.quant_state
    return unpack_nf4(weight.data, nf4_scales(weight), state.blocksize, state.shape, dtype)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds quantized weights."""
    nf4 = getattr(getattr(module, "weight", None), "quant_state", None) is not None
    return nf4 or isinstance(module, Int8Linear)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights as they are held now, quantization statistics included."""
    total = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    for layer in module.modules():
        if isinstance(layer, Int8Linear):
            total += layer.nbytes - layer.weight.nbytes - layer.SCB.nbytes
        elif is_quantized(layer):
            weight: Any = layer.weight
            statistics = weight.quant_state.as_dict(packed=True).values()
            total += sum(v.numel() * v.element_size() for v in statistics)
    return total
