"""NF4 weights (Dettmers et al., QLoRA, arXiv 2305.14314) through bitsandbytes.

A quantized linear layer keeps two weights a byte and one scale a block; bitsandbytes dequantizes on
use. Stored as plain tensors under bitsandbytes' own names, `X.weight`, `X.weight.absmax`, …, so
safetensors holds them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.openvla import OpenVLA

STATE_KEY = "quant_state.bitsandbytes__nf4"


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
            f"this policy has NF4 weights, which take bitsandbytes ({error}); run: pip install "
            "bitsandbytes"
        ) from error
    return library


def quantizable(model: OpenVLA, config: QuantizationConfig) -> Iterator[tuple[nn.Module, str, str]]:
    """The linear layers that `config` covers, as (parent module, attribute, full name).

    In the decoder those are the layers' projections: the embedding and the head stay as they are,
    since the head's action rows decide the bin.
    """
    roots: dict[str, list[tuple[str, nn.Module]]] = {
        "llm": [("language_model.model.layers", model.language_model.model.layers)],
        "vision": [("vision_backbone", model.vision_backbone)],
        "projector": [("projector", model.projector)],
    }
    if model.proprio_projector is not None:
        roots["projector"].append(("proprio_projector", model.proprio_projector))
    for part in config.parts:
        for prefix, root in roots[part]:
            for path, module in list(root.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, attribute = path.rpartition(".")
                    yield root.get_submodule(parent), attribute, f"{prefix}.{path}"


def quantize(model: OpenVLA, config: QuantizationConfig) -> None:
    """Replace the layers that `config` covers by quantized ones, in place."""
    bnb = bitsandbytes()
    for parent, attribute, _ in quantizable(model, config):
        linear = getattr(parent, attribute)
        packed, state = bnb.functional.quantize_4bit(
            linear.weight.detach().float(),
            blocksize=config.block_size,
            compress_statistics=config.double_quantization,
            quant_type="nf4",
        )
        weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=config.block_size,
            compress_statistics=config.double_quantization,
            quant_type="nf4",
            bnb_quantized=True,
        )
        setattr(parent, attribute, _linear4bit(linear, weight, linear.bias))


def stored(model: OpenVLA) -> dict[str, Tensor]:
    """The model's tensors as a bundle stores them.

    Bitsandbytes adds the statistics of its layers by itself.
    """
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def restore(model: OpenVLA, config: QuantizationConfig, tensors: dict[str, Tensor]) -> None:
    """Put quantized layers into a model on the meta device, taking their tensors out of `tensors`.

    Raises:
        UserError: a layer's quantized tensors are missing.
    """
    bnb = bitsandbytes()
    for parent, attribute, name in quantizable(model, config):
        linear = getattr(parent, attribute)
        prefix = f"{name}.weight"
        statistics = {
            key[len(prefix) + 1 :]: tensors.pop(key)
            for key in list(tensors)
            if key.startswith(f"{prefix}.")
        }
        if prefix not in tensors or STATE_KEY not in statistics:
            raise UserError(
                f"config.json says that {name} is NF4, and model.safetensors has no such weights "
                "for it"
            )
        weight = bnb.nn.Params4bit.from_prequantized(
            tensors.pop(prefix), statistics, requires_grad=False, device="cpu"
        )
        setattr(parent, attribute, _linear4bit(linear, weight, linear.bias))


def _linear4bit(linear: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    bnb = bitsandbytes()
    with torch.device("meta"):
        module = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4"
        )
    module.weight, module.bias = weight, bias
    # Where the CPU has AVX512-BF16, bitsandbytes would repack the weights at their first use and go
    # on in bfloat16, whatever the inputs are: a policy would act differently on different machines.
    module.support_avx512bf16_for_cpu = False
    return module


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds NF4 weights."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights as they are held now, quantization statistics included."""
    total = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    for layer in module.modules():
        if is_quantized(layer):
            weight: Any = layer.weight
            statistics = weight.quant_state.as_dict(packed=True).values()
            total += sum(v.numel() * v.element_size() for v in statistics)
    return total
