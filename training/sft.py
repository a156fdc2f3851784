"""Supervised fine-tuning on action tokens: makes the original policy, and recovers a pruned one.

    rlrc sft CONFIG --demonstrations DIR --out BUNDLE                       a new policy
    rlrc sft CONFIG --demonstrations DIR --out BUNDLE --policy PRUNED       recover one

Cross-entropy on the action's tokens, as OpenVLA is trained. On the way the policy may act itself
while the scripted expert says what it would have done (DAgger); those episodes join the
demonstrations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

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
from training.rollout import Actor


class DemonstrationBatches:
    """Random batches of demonstration steps, kept on the device."""

    def __init__(
        self, data: Demonstrations, processor: Processor, codec: ActionCodec, device: torch.device
    ) -> None:
        self._processor = processor
        self._images = torch.from_numpy(data.images).to(device)
        self._proprioception = torch.from_numpy(data.proprioception).to(device)
        self._bins = torch.from_numpy(codec.encode(data.actions.astype(np.float64))).to(device)
        self._prompts = torch.from_numpy(data.prompts).to(device)
        ids, mask = processor.batch_token_ids(data.instructions)
        self._ids, self._mask = ids.to(device), None if mask is None else mask.to(device)
        self._device = device

    def sample(self, size: int, brightness: float = 0.0) -> tuple[Inputs, Tensor]:
        """`size` steps drawn with torch's global generator: inputs, and (size, D) bins.

        brightness: each image is scaled by up to this share, and its contrast about its mean too.
        """
        rows = torch.randint(len(self._bins), (size,)).to(self._device)
        prompts = self._prompts[rows]
        inputs = Inputs(
            self._ids[prompts],
            None if self._mask is None else self._mask[prompts],
            self._processor.pixel_values(self._images[rows]),
            self._processor.normalise_proprioception(self._proprioception[rows]),
        )
        if brightness:
            gain, contrast = 1 + brightness * (2 * torch.rand(2, size, 1, 1, 1) - 1).to(
                self._device
            )
            pixels = inputs.pixel_values
            mean = pixels.mean((2, 3), keepdim=True)
            inputs.pixel_values = mean * gain + (pixels - mean) * contrast
        return inputs, self._bins[rows]


def bc_loss(model: OpenVLA, inputs: Inputs, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over every action token, and the share of tokens that are right."""
    logits, _ = model(inputs, bins)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), bins.flatten())
    return loss, (logits.argmax(-1) == bins).float().mean()


def train(
    model: OpenVLA,
    batches: DemonstrationBatches,
    config: SftConfig,
    device: torch.device,
    work: Path,
    rebuild: Callable[[int, OpenVLA], DemonstrationBatches] | None = None,
) -> dict[str, float]:
    """Train in place, resuming from `work` where an earlier run was killed; returns the last
    metrics.

    Args:
        model: on the device; ends with the averaged weights.
        batches: the demonstrations.
        config: how.
        device: where.
        work: directory for the log (`log.csv`) and the checkpoint.
        rebuild: called with the index of a corrections round and the averaged policy when that
            round is due; returns the batches to go on with. Must return at once if the round was
            collected before.
    """
    work.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    start = 0
    if saved := load_checkpoint(work / "checkpoint"):
        tensors, facts = saved
        start = facts["step"]
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        average = {
            k.removeprefix("average."): v.to(device)
            for k, v in tensors.items()
            if k.startswith("average.")
        }
        restore_optimizer(optimizer, tensors)
        restore_rng(tensors, device)
    log = MetricsLog(work / "log.csv", start)
    dtype = compute_dtype(device)
    metrics: dict[str, float] = {}
    began, sums = time.perf_counter(), torch.zeros(2, device=device)
    every = max(1, config.steps // 100)
    model.train()
    for step in tqdm(
        range(start, config.steps), desc="sft", initial=start, total=config.steps, unit="step"
    ):
        for number, corrections in enumerate(config.corrections):
            if rebuild and (step == corrections.at_step or corrections.at_step < step == start):
                current = {name: value.clone() for name, value in model.state_dict().items()}
                model.load_state_dict(average)
                batches = rebuild(number, model.eval())
                model.load_state_dict(current)
                model.train()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        inputs, bins = batches.sample(config.batch_size, config.brightness)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, accuracy = bc_loss(model, inputs, bins)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - decay)
        sums += torch.stack([loss.detach(), accuracy])
        if (step + 1) % every == 0:
            loss_mean, accuracy_mean = (sums / every).tolist()
            rate = every * config.batch_size / (time.perf_counter() - began)
            metrics = {"loss": loss_mean, "token_accuracy": accuracy_mean, "samples_per_s": rate}
            log.write(step=step, **metrics)
            began, sums = time.perf_counter(), torch.zeros(2, device=device)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            tensors |= {f"average.{k}": v for k, v in average.items()}
            tensors |= optimizer_tensors(optimizer) | rng_tensors(device)
            save_checkpoint(work / "checkpoint", tensors, {"step": step + 1})
    model.load_state_dict(average)
    model.eval()
    return metrics


def schedule(step: int, config: SftConfig) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def run(
    config: SftConfig,
    trainable: Trainable,
    data: list[Path],
    *,
    seed: int,
    device: torch.device,
    work: Path,
    latency: tuple[float, float],
) -> dict[str, Any]:
    """Train on demonstrations and the corrections collected on the way; returns the stage's facts.

    Corrections go to `work/corrections-N`.
    """
    seed_everything(seed)
    processor, codec = trainable.processor, trainable.codec

    def batches(rounds: int) -> DemonstrationBatches:
        directories = data + [work / f"corrections-{i}" for i in range(rounds)]
        return DemonstrationBatches(read(directories), processor, codec, device)

    def rebuild(number: int, model: OpenVLA) -> DemonstrationBatches:
        place, wanted = work / f"corrections-{number}", config.corrections[number]
        if not place.exists():
            environments = min(wanted.episodes, 4 * cpu_count())
            actor = Actor(model, processor, codec, device)
            collect_corrections(
                place, actor, wanted.first_seed, wanted.episodes, latency, environments
            )
        return batches(number + 1)

    began = time.perf_counter()
    metrics = train(trainable.model, batches(0), config, device, work, rebuild)
    return {"seed": seed, "seconds": time.perf_counter() - began, **asdict(config), **metrics}
