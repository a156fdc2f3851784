"""Supervised fine-tuning of pi0: the flow-matching loss, and demonstrations in chunks.

    rlrc sft CONFIG --policy BUNDLE --demonstrations DIR --out BUNDLE

Black et al., pi0, arXiv 2410.24164, section IV; times are drawn as openpi draws them
(`openpi/src/openpi/models/pi0.py`, `compute_loss`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.config import ExpertConfig
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.processor import Processor
from training.bundles import Trainable
from training.common import seed_everything
from training.config import SftConfig, stated
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import Demonstrations
from training.lora import refuse_new
from training.ranks import ALONE, Ranks
from training.sft import Trainer

TIME_ALPHA, TIME_BETA = 1.5, 1.0
"""Of the Beta distribution that times come from: more of them near the noise."""
TIME_SCALE, TIME_OFFSET = 0.999, 0.001


@dataclass
class FlowBatch:
    """Steps of demonstrations, each with the actions from it on.

    Attributes:
        inputs: what the policy sees.
        actions: (B, chunk, action_width), scaled to the model's range, zeros where it is padding.
        known: (B, chunk) bool, False after the episode's end.
        noise, time: of the flow, as `actions` and (B,); None where they have yet to be drawn.
    """

    inputs: Inputs
    actions: Tensor
    known: Tensor
    noise: Tensor | None = None
    time: Tensor | None = None

    def __getitem__(self, rows: slice) -> FlowBatch:
        noise, time = (None if x is None else x[rows] for x in (self.noise, self.time))
        return FlowBatch(self.inputs[rows], self.actions[rows], self.known[rows], noise, time)

    def __len__(self) -> int:
        return len(self.inputs)

    def disturbed(self) -> FlowBatch:
        """The same with noise and times drawn."""
        beta = torch.distributions.Beta(
            torch.tensor(TIME_ALPHA, device=self.actions.device),
            torch.tensor(TIME_BETA, device=self.actions.device),
        )
        time = beta.sample((len(self),)) * TIME_SCALE + TIME_OFFSET
        return replace(self, noise=torch.randn_like(self.actions), time=time)


class FlowBatches(DemonstrationBatches):
    """Random batches of demonstration steps with their chunks, kept on the device."""

    CHECKED = ("images", "proprioception", "actions")

    def __init__(
        self, processor: Processor, codec: ActionCodec, device: torch.device, expert: ExpertConfig
    ) -> None:
        super().__init__(processor, codec, device)
        self._expert = expert

    def _arrays(self, data: Demonstrations) -> dict[str, NDArray[Any]]:
        size = self.processor.config.architecture.towers[0].image_size
        height, width = data.images.shape[-3:-1]
        if (height, width) != (size, size):
            raise UserError(
                f"the demonstrations' images are {height}×{width}, "
                f"and the policy's vision takes {size}×{size}; record or export them so"
            )
        return {
            "images": data.images,
            "proprioception": data.proprioception,
            "actions": self._codec.scale(data.actions.astype(np.float64)).astype(np.float32),
            "ends": self._ends(data),
        }

    def _arranged(self, pixels: Tensor, size: int) -> Tensor:
        return pixels.unflatten(0, (size, -1))

    def sample(self, size: int, brightness: float = 0.0, shift: int = 0) -> FlowBatch:  # type: ignore[override]
        """`size` steps, drawn with the device's global generator; images changed as in the base."""
        steps, expert = self._steps, self._expert
        rows = torch.randint(len(steps["prompts"]), (size,), device=self._device)
        pixels = self._pixels(rows, brightness, shift)
        places = rows[:, None] + torch.arange(expert.chunk, device=self._device)
        last = steps["ends"][rows][:, None]
        actions = steps["actions"][places.minimum(last)]
        padding = expert.action_width - actions.shape[2]
        return FlowBatch(
            self._inputs(rows, pixels),
            F.pad(actions, (0, padding)),
            places <= last,
        )


def batches_for(trainable: Trainable, device: torch.device) -> DemonstrationBatches:
    """Where demonstrations for a policy go; for pi0 with chunks of actions."""
    expert = trainable.config.architecture.expert
    if expert is None:
        return DemonstrationBatches(trainable.processor, trainable.codec, device)
    return FlowBatches(trainable.processor, trainable.codec, device, expert)


def flow_loss(model: Pi0, batch: FlowBatch) -> Tensor:
    """Mean squared error of the flow, over actions that are known.

    Noise and times are the batch's, or drawn.
    """
    if batch.noise is None:
        batch = batch.disturbed()
    actions, noise, time = batch.actions, batch.noise, batch.time
    assert noise is not None and time is not None
    when = time[:, None, None]
    noisy = when * noise + (1 - when) * actions
    flow = model.velocity(model.prefix(batch.inputs), batch.inputs.proprioception, noisy, time)
    error = (flow - (noise - actions)).square().mean(2)
    return (error * batch.known).sum() / batch.known.sum()


class FlowTrainer(Trainer):
    """One run of SFT on the flow's loss, resumable as its base is."""

    LOGGED = ("loss",)
    CAPTURES = False

    def _new_head(self) -> nn.Module:
        return nn.Module()  # nothing

    def _blocks(self) -> Iterable[nn.Module]:
        return ()  # layers hand each other a cache that grows, which compiling does not like

    def _draw(self) -> Any:
        config = self._config
        batch: Any = self._batches.sample(self._batch_size, config.brightness, config.shift)
        return batch.disturbed()

    def _weights(self, parts: list[Any]) -> list[Any]:
        known = torch.stack([part.known.sum() for part in parts]).float()
        return list(known / self._ranks.mean(known.sum()))

    def _losses(self, batch: Any) -> tuple[Tensor, ...]:
        with self._autocast():
            return (flow_loss(self._model, batch),)


def refuse_tokens_options(config: SftConfig) -> None:
    """Say that an option is there for action tokens only.

    Raises:
        UserError: naming it.
    """
    refused = ("corrections", "grounding", "label_width", "distillation", "freeze_vision")
    for name in (*refused, "augmentation"):
        if getattr(config, name):
            raise UserError(f"sft: '{name}' is not there for a pi0 policy; leave it out")


def run(
    config: SftConfig,
    trainable: Trainable,
    batches: FlowBatches,
    *,
    seed: int,
    device: torch.device,
    work: Path,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train on demonstrations; returns the stage's facts.

    Raises:
        UserError: the configuration asks for what is there for action tokens only.
    """
    refuse_tokens_options(config)
    if ranks.sharded:
        raise UserError(
            "sft: the weights of a pi0 policy cannot be shared out; launch without FSDP"
        )
    if config.lora:
        refuse_new(trainable, "sft")
    seed_everything(seed)
    began = time.perf_counter()
    metrics = FlowTrainer(trainable.model, batches, config, device, work, ranks=ranks).run()
    facts = {"seed": seed, "seconds": time.perf_counter() - began, **ranks.facts}
    return {**facts, **stated(config), **metrics}
