"""LoRA: a frozen policy, and beside its linear layers small matrices that learn (peft).

Hu et al., LoRA, arXiv 2106.09685; OpenVLA's own settings are rank 32 and alpha 16
(openvla/vla-scripts/finetune.py). The adapters are there during training only: what is saved has
plain weights with the adapters folded in, so that pruning, quantization and engines need not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from training.config import LoraConfig
from training.memory import transformer_blocks

NAME = "default"
"""Of the one adapter that each layer gets."""


class Adapters:
    """Adapters in a policy, which is frozen apart from them.

    Args:
        model: changed in place.
        config: how large, and where.
        dtype: what the frozen blocks' matrices are kept in. What that loses of them is kept on the
            host, so that nothing is lost of the weights that come out in the end.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, dtype: torch.dtype) -> None:
        import peft  # takes seconds

        self._model = model
        model.requires_grad_(False)
        blocks = transformer_blocks(model)
        chosen = {id(block) for target in config.targets for block in blocks[target]}
        targets = [
            f"{name}.{inner}"
            for name, block in model.named_modules()
            if id(block) in chosen
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
        peft.inject_adapter_in_model(settings, model, NAME)
        self._layers = {name: model.get_submodule(name) for name in targets}
        for layer in self._layers.values():
            layer.cast_input_dtype_enabled = False  # type: ignore[assignment] # autocast does it
        self._lost: dict[nn.Parameter, Tensor] = {}
        if dtype != torch.float32:
            for block in (*blocks["decoder"], *blocks["vision"]):
                for layer in block.modules():
                    if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                        self._cast(layer.weight, dtype)

    def _cast(self, weight: Any, dtype: torch.dtype) -> None:
        near = weight.data.to(dtype)
        lost = weight.data - near
        self._lost[weight] = lost.to(dtype).cpu() if lost.any() else lost.new_empty(0)
        weight.data = near

    @contextmanager
    def folded(self) -> Iterator[None]:
        """The policy with plain float32 weights, the adapters in them; afterwards as it was."""
        held = {weight: weight.data for weight in self._weights()}
        self.fold()
        try:
            yield
        finally:
            for weight, data in held.items():
                weight.data = data
            for name, layer in self._layers.items():
                self._model.set_submodule(name, layer)

    @torch.no_grad()
    def fold(self) -> None:
        """Leave the policy with plain float32 weights, the adapters in them.

        Added up in float32: in bfloat16 the rounding alone is as large as what was learnt.
        """
        for weight in self._weights():
            exact = weight.data.float()
            if (lost := self._lost.get(weight)) is not None and len(lost):
                exact = exact + lost.to(exact)
            weight.data = exact
        for name, layer in self._layers.items():
            adapted: Any = layer
            base = adapted.get_base_layer()
            base.weight.data = base.weight.data + adapted.get_delta_weight(NAME)
            self._model.set_submodule(name, base)

    def _weights(self) -> list[nn.Parameter]:
        """Of the frozen layers, those that folding changes."""
        layers: Any = self._layers.values()
        return list({*self._lost, *(layer.get_base_layer().weight for layer in layers)})


def refuse_new(policy: Any, where: str) -> None:
    """Say that there must be a policy to adapt.

    Raises:
        UserError: it has no bundle that it came from.
    """
    if policy.parent is None:
        raise UserError(f"{where}: 'lora' adapts a trained policy; name one with --policy")
