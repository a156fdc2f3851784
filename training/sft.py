"""Supervised fine-tuning on action tokens: makes the original policy, and recovers a pruned one.

    rlrc sft CONFIG --demonstrations DIR --out BUNDLE                     a new policy
    rlrc sft CONFIG --demonstrations DIR --out BUNDLE --policy PRUNED     recover one

Cross-entropy on the action's tokens, as OpenVLA is trained. On the way the policy may act itself
while the scripted expert says what it would have done (DAgger); those episodes join the
demonstrations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.processor import Processor
from training.bundles import Trainable
from training.common import (
    MetricsLog,
    compute_dtype,
    cpu_count,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
    seed_everything,
)
from training.config import SftConfig
from training.data.collect import collect_corrections
from training.data.demonstrations import Demonstrations, read
from training.envs.registry import at_once
from training.rollout import Actor


@dataclass
class Batch:
    """Steps of demonstrations.

    Attributes:
        inputs: what the policy sees.
        bins: (B, D) the action's tokens.
        grounding: (B, G) positions in m, NaN where they are not known.
    """

    inputs: Inputs
    bins: Tensor
    grounding: Tensor


class DemonstrationBatches:
    """Random batches of demonstration steps, kept on the device."""

    def __init__(self, processor: Processor, codec: ActionCodec, device: torch.device) -> None:
        self._processor, self._codec, self._device = processor, codec, device
        self._instructions: dict[str, int] = {}
        self._steps: dict[str, Tensor] = {}
        self._taken: list[Path] = []

    def take(self, place: Path) -> None:
        """Add a directory of demonstrations, unless it has been taken before."""
        if place not in self._taken:
            self.add(read(place))
            self._taken.append(place)

    def add(self, data: Demonstrations) -> None:
        """Add steps; joined on the device, where there is room and copying takes no time.

        Raises:
            UserError: their images, proprioception or actions have another shape than those before.
        """
        for text in data.instructions:
            self._instructions.setdefault(text, len(self._instructions))
        numbers = np.array([self._instructions[text] for text in data.instructions])
        arrays: dict[str, NDArray[Any]] = {
            "images": data.images,
            "proprioception": data.proprioception,
            "bins": self._codec.encode(data.actions.astype(np.float64)),
            "grounding": data.grounding,
            "prompts": numbers[data.prompts],
        }
        for name in ("images", "proprioception", "bins") if self._steps else ():
            here, there = tuple(self._steps[name].shape[1:]), arrays[name].shape[1:]
            if here != there:
                raise UserError(
                    f"the demonstrations do not go together: {name} of shapes {here} and {there}; "
                    "export rollouts for the policy that was trained on the others"
                )
        for name, array in arrays.items():
            new = torch.from_numpy(array).to(self._device)
            old = self._steps.pop(name, new[:0])
            if name == "grounding":  # a recording of a real arm knows nothing of it
                width = max(old.shape[1], new.shape[1])
                old, new = (F.pad(x, (0, width - x.shape[1]), value=math.nan) for x in (old, new))
            self._steps[name] = torch.cat([old, new])
        ids, mask = self._processor.batch_token_ids(list(self._instructions))
        self._ids = ids.to(self._device)
        self._mask = None if mask is None else mask.to(self._device)

    @property
    def grounding_size(self) -> int:
        """How many grounding values a step has."""
        return self._steps["grounding"].shape[1]

    def sample(self, size: int, brightness: float = 0.0, shift: int = 0) -> Batch:
        """`size` steps, drawn with the device's global generator.

        brightness: each image is scaled by up to this share, and its contrast about its mean too.
        shift: each image is moved by up to so many pixels down or up, right or left.
        """
        # Drawn on the device: a copy to it would wait for everything before.
        steps = self._steps
        rows = torch.randint(len(steps["bins"]), (size,), device=self._device)
        prompts = steps["prompts"][rows]
        images = steps["images"][rows]
        if shift:
            images = shifted(
                images, torch.randint(-shift, shift + 1, (2, size), device=self._device)
            )
        pixels = self._processor.pixel_values(images)
        if brightness:
            change = 2 * torch.rand(2, size, 1, 1, 1, device=self._device) - 1
            gain, contrast = 1 + brightness * change
            mean = pixels.mean((2, 3), keepdim=True)
            pixels = mean * gain + (pixels - mean) * contrast
        inputs = Inputs(
            self._ids[prompts],
            None if self._mask is None else self._mask[prompts],
            pixels,
            self._processor.normalise_proprioception(steps["proprioception"][rows]),
        )
        return Batch(inputs, steps["bins"][rows], steps["grounding"][rows])


def shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each image moved by whole pixels, its border repeated: (B, H, W, C), (2, B) -> (B, H, W, C).

    by: how far down, and how far right.
    """
    height, width = images.shape[1:3]
    down, right = by[:, :, None]
    rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
    each = torch.arange(len(images), device=images.device)
    return images[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def bc_loss(model: OpenVLA, batch: Batch) -> Tensor:
    """Cross-entropy over every action token."""
    logits, _ = model(batch.inputs, batch.bins)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.bins.flatten())


class GroundingHead(nn.Linear):
    """Reads from the policy's state where the things are that the instruction speaks of.

    A second loss on the way to the first: a policy that trains from nothing otherwise has to find
    out from actions alone what the words mean. No part of the policy; thrown away after training.
    """

    SCALE = 0.05
    """m; errors of this size weigh 1."""

    def loss(self, state: Tensor, grounding: Tensor) -> Tensor:
        """Huber loss over what is known: (B, hidden), (B, G) -> scalar."""
        error = self(state) - grounding.nan_to_num() / self.SCALE
        loss = F.huber_loss(error, torch.zeros_like(error), reduction="none")
        return (loss * grounding.isfinite()).mean()


@dataclass
class Losses:
    """What a batch gave: the loss to minimise, and two numbers to watch."""

    total: Tensor
    token_accuracy: Tensor
    grounding: Tensor


def sft_losses(model: OpenVLA, head: GroundingHead, batch: Batch, config: SftConfig) -> Losses:
    """Cross-entropy, softened if the configuration says so, and the weighted grounding loss."""
    logits, state = model(batch.inputs, batch.bins)
    flat, bins = logits.flatten(0, 1).float(), batch.bins.flatten()
    targets = bins
    if config.label_width:
        distance = torch.arange(flat.shape[1], device=flat.device) - bins[:, None]
        targets = (-0.5 * (distance / config.label_width) ** 2).softmax(-1)
    grounding = head.loss(state, batch.grounding)
    return Losses(
        F.cross_entropy(flat, targets) + config.grounding * grounding,
        (flat.argmax(-1) == bins).float().mean(),
        grounding,
    )


class Trainer:
    """One run of SFT, resumable exactly: what it depends on is in its checkpoint.

    Args:
        model: trained in place, on the device; ends with the averaged weights.
        batches: the demonstrations.
        config: how.
        device: where.
        work: directory for the log (`log.csv`) and the checkpoint.
        correct: called with the number of a corrections round and the averaged policy when that
            round is due; adds it to the batches. Must not collect again what was collected before.
    """

    def __init__(
        self,
        model: OpenVLA,
        batches: DemonstrationBatches,
        config: SftConfig,
        device: torch.device,
        work: Path,
        correct: Callable[[int, OpenVLA], None] | None = None,
    ) -> None:
        self._model, self._batches, self._config, self._device = model, batches, config, device
        self._work, self._collect = work, correct
        self._head = GroundingHead(
            model.config.decoder.hidden_size, batches.grounding_size, device=device
        )
        self._learnt = nn.ModuleDict({"model": model, "head": self._head})
        self._optimizer = torch.optim.AdamW(
            self._learnt.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self._current = model.state_dict()
        self._average = {name: value.clone() for name, value in self._current.items()}
        self._step = 0
        self._sums, self._metrics = torch.zeros(3, device=device), dict[str, float]()
        work.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._log = MetricsLog(work / "log.csv", self._step)

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last metrics."""
        config, model, device = self._config, self._model, self._device
        if device.type == "cuda":
            # Layer by layer: the same few kernels serve all, and compiling takes seconds.
            tower = model.vision_backbone.featurizer
            for block in (*tower.blocks, *model.language_model.model.layers):
                block.compile(dynamic=False)
        every = max(1, config.steps // 100)
        began = time.perf_counter()
        model.train()
        first = self._step
        steps = range(first, config.steps)
        for self._step in tqdm(steps, "sft", initial=first, total=config.steps, unit="step"):
            self._correct(first)
            losses = self._update()
            seen = torch.stack([losses.total, losses.token_accuracy, losses.grounding])
            self._sums += seen.detach()
            if (self._step + 1) % every == 0:
                names = ("loss", "token_accuracy", "grounding_loss")
                self._metrics = dict(zip(names, (self._sums / every).tolist(), strict=True))
                rate = every * config.batch_size / (time.perf_counter() - began)
                self._log.write(step=self._step, **self._metrics, samples_per_s=rate)
                self._sums.zero_()
                began = time.perf_counter()
            if (self._step + 1) % config.checkpoint_every == 0:
                self._save()
        model.load_state_dict(self._average)
        model.eval()
        return self._metrics

    def _update(self) -> Losses:
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(self._step, config)
        batch = self._batches.sample(config.batch_size, config.brightness, config.shift)
        dtype = compute_dtype(self._device)
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            losses = sft_losses(self._model, self._head, batch, config)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self._learnt.parameters(), config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        # Early on the average follows faster, or it would remember the initial weights.
        decay = min(config.average, (1 + self._step) / (10 + self._step))
        averages, current = list(self._average.values()), list(self._current.values())
        torch._foreach_lerp_(averages, current, 1 - decay)
        return losses

    def _correct(self, first: int) -> None:
        """Collect a corrections round if it is due; after a resume, take up the earlier ones."""
        for number, corrections in enumerate(self._config.corrections):
            due = corrections.at_step
            if self._collect and (self._step == due or due < self._step == first):
                current = {name: value.clone() for name, value in self._current.items()}
                self._model.load_state_dict(self._average)
                self._collect(number, self._model.eval())
                self._model.load_state_dict(current)
                self._model.train()

    def _save(self) -> None:
        tensors = {f"learnt.{k}": v for k, v in self._learnt.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self._average.items()}
        tensors |= optimizer_tensors(self._optimizer) | rng_tensors(self._device)
        tensors["sums"] = self._sums
        facts = {"step": self._step + 1, "metrics": self._metrics}
        save_checkpoint(self._work / "checkpoint", tensors, facts)

    def _restore(self) -> None:
        saved = load_checkpoint(self._work / "checkpoint")
        if not saved:
            return
        tensors, facts = saved

        learnt = {name: tensors[f"learnt.{name}"] for name in self._learnt.state_dict()}
        self._learnt.load_state_dict(learnt)
        for name, value in self._average.items():
            value.copy_(tensors[f"average.{name}"])
        restore_optimizer(self._optimizer, tensors)
        restore_rng(tensors, self._device)
        self._step, self._metrics = facts["step"], facts["metrics"]
        self._sums.copy_(tensors["sums"])


def schedule(step: int, config: SftConfig) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def run(
    config: SftConfig,
    trainable: Trainable,
    batches: DemonstrationBatches,
    *,
    seed: int,
    device: torch.device,
    work: Path,
    latency: tuple[float, float],
    environment: str = "tabletop",
) -> dict[str, Any]:
    """Train on demonstrations and the corrections collected on the way.

    Corrections go to `work/corrections-N` and into the batches. Returns the stage's facts.
    """
    seed_everything(seed)

    def correct(number: int, model: OpenVLA) -> None:
        place, wanted = work / f"corrections-{number}", config.corrections[number]
        if not place.exists():
            environments = at_once(environment, min(wanted.episodes, 8 * cpu_count()))
            actor = Actor(model, trainable.processor, trainable.codec, device, environments)
            collect_corrections(place, actor, wanted, latency, environment)
        batches.take(place)

    began = time.perf_counter()
    metrics = Trainer(trainable.model, batches, config, device, work, correct).run()
    return {"seed": seed, "seconds": time.perf_counter() - began, **asdict(config), **metrics}
