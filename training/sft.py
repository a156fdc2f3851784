"""Supervised fine-tuning: makes the original policy, and recovers a pruned one.

    rlrc sft CONFIG --demonstrations DIR --out BUNDLE                     a new policy
    rlrc sft CONFIG --demonstrations DIR --out BUNDLE --policy PRUNED     recover one

Cross-entropy on the action's tokens, as OpenVLA is trained; for a policy that gives chunks the L1
distance of the actions, as OpenVLA-OFT is; for pi0 the loss of its flow, see `training.flow`. On
the way the policy may act itself
while the scripted expert says what it would have done (DAgger); those episodes join the
demonstrations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.vla.openvla import OpenVLA
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from training import augmentation
from training.bundles import Trainable
from training.captured import CapturedStep
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
from training.config import SftConfig, stated
from training.data.batches import Batch, DemonstrationBatches
from training.data.collect import collect_corrections
from training.envs.registry import at_once
from training.lora import Adapters, refuse_new
from training.memory import recomputed, refuse_recomputing, transformer_blocks
from training.ranks import ALONE, Ranks, like, local, whole
from training.rollout import Actor


def bc_loss(model: OpenVLA, batch: Batch) -> Tensor:
    """What is minimised: cross-entropy over every action token, or the L1 distance of a chunk."""
    if isinstance(model, OpenVLAOFT):
        assert batch.chunk is not None
        return F.l1_loss(model(batch.inputs).float(), batch.chunk)
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
    """What a batch gave: the loss to minimise, and two numbers to watch.

    The accuracy of continuous actions is that of the tokens that they would be.
    """

    total: Tensor
    token_accuracy: Tensor
    grounding: Tensor


def sft_losses(
    model: OpenVLA,
    head: GroundingHead,
    batch: Batch,
    config: SftConfig,
    teacher: OpenVLA | None = None,
) -> Losses:
    """The loss, cross-entropy softened if the configuration says so, and the weighted grounding.

    With a teacher, the configured share of the cross-entropy is that with the teacher's
    distributions.
    """
    if isinstance(model, OpenVLAOFT):
        assert batch.chunk is not None
        states = model.action_states(batch.inputs)
        chunk = model.action_head(states).float()
        grounding = head.loss(states[:, 0], batch.grounding)
        ours, theirs = (
            ((x.clamp(-1, 1) + 1) / 2 * (model.n_bins - 1)).floor() for x in (chunk, batch.chunk)
        )
        return Losses(
            F.l1_loss(chunk, batch.chunk) + config.grounding * grounding,
            (ours == theirs).float().mean(),
            grounding,
        )
    logits, state = model(batch.inputs, batch.bins)
    flat, bins = logits.flatten(0, 1).float(), batch.bins.flatten()
    targets = bins
    if config.label_width:
        distance = torch.arange(flat.shape[1], device=flat.device) - bins[:, None]
        targets = (-0.5 * (distance / config.label_width) ** 2).softmax(-1)
    imitation = F.cross_entropy(flat, targets)
    if teacher is not None:
        with torch.no_grad():
            told = teacher(batch.inputs, batch.bins)[0].flatten(0, 1).float().softmax(-1)
        imitation = torch.lerp(imitation, F.cross_entropy(flat, told), config.distillation)
    grounding = head.loss(state, batch.grounding)
    return Losses(
        imitation + config.grounding * grounding,
        (flat.argmax(-1) == bins).float().mean(),
        grounding,
    )


class Learnt(nn.Module):
    """The policy and what is trained beside it; called with a batch it gives the losses."""

    def __init__(
        self, model: nn.Module, head: nn.Module, losses: Callable[[Any], tuple[Tensor, ...]]
    ) -> None:
        super().__init__()
        self.model, self.head, self._losses = model, head, losses

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        """The losses, the first of them to be minimised."""
        return self._losses(batch)


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
        teacher: whom `config.distillation` imitates; on the device.
        ranks: who trains together. Each draws its part of every batch itself; all of them call
            `correct`, and the first one has `work`.

    Raises:
        UserError: the configuration distils, and there is no teacher; or it asks for what cannot be
            had together.
    """

    LOGGED: tuple[str, ...] = ("loss", "token_accuracy", "grounding_loss")
    CAPTURES = True
    """Whether a step can be a CUDA graph: all that it draws and decides, it does on the device."""

    def __init__(
        self,
        model: Any,
        batches: DemonstrationBatches,
        config: SftConfig,
        device: torch.device,
        work: Path,
        correct: Callable[[int, OpenVLA], None] | None = None,
        teacher: OpenVLA | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if config.distillation and teacher is None:
            raise UserError("sft: 'distillation' needs a teacher; name its bundle with --teacher")
        self._teacher = teacher if config.distillation else None
        if config.freeze_vision:
            model.vision_backbone.requires_grad_(False)
        if config.gradient_checkpointing:
            refuse_recomputing(model)
        if config.corrections and ranks.sharded:
            raise UserError("sft: 'corrections' take a whole policy; launch without FSDP")
        # What is sharded together must have one type.
        kept = torch.float32 if ranks.sharded else compute_dtype(device)
        self._adapters = Adapters(model, config.lora, kept) if config.lora else None
        self._model, self._batches, self._config, self._device = model, batches, config, device
        self._work, self._collect, self._ranks = work, correct, ranks
        self._batch_size = ranks.share_of(config.batch_size, "sft: 'batch_size'")
        if isinstance(model, OpenVLAOFT):
            for name in ("label_width", "distillation"):
                if getattr(config, name):
                    raise UserError(
                        f"sft: {name} is about tokens, and the policy gives chunks; leave it"
                    )
        self._head: nn.Module = self._new_head()
        learnt = Learnt(model, self._head, self._losses)
        blocks = [block for part in transformer_blocks(model).values() for block in part]
        self._learnt = ranks.wrap(learnt, blocks)
        on_gpu = device.type == "cuda" and not ranks.sharded
        # Tensors, so that a captured step sees what they are by then.
        learning_rate = torch.tensor(config.learning_rate, device=device)
        self._follow = torch.ones((), device=device)
        self._optimizer = torch.optim.AdamW(
            [p for p in learnt.parameters() if p.requires_grad],
            lr=learning_rate if on_gpu else config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._learning = {n: p for n, p in learnt.named_parameters() if p.requires_grad}
        captures = on_gpu and self.CAPTURES and not ranks.many
        self._captured = CapturedStep(self._step_on_batch) if captures else None
        self._current = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self._average = {name: value.clone() for name, value in self._current.items()}
        self._step = 0
        self._sums = torch.zeros(len(self.LOGGED), device=device)
        self._metrics = dict[str, float]()
        ranks.reseed()
        work.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._log = MetricsLog(work / "log.csv", self._step) if ranks.first else None

    def _new_head(self) -> nn.Module:
        """What is trained beside the policy, and thrown away."""
        hidden = self._model.config.decoder.hidden_size
        return GroundingHead(hidden, self._batches.grounding_size, device=self._device)

    def _blocks(self) -> Iterable[nn.Module]:
        """What is worth compiling: blocks of which there are many."""
        policies = (self._model, *([self._teacher] if self._teacher else []))
        parts = [part for policy in policies for part in transformer_blocks(policy).values()]
        return [block for part in parts for block in part]

    def _draw(self) -> Any:
        """A new batch."""
        config = self._config
        augmented = config.augmentation == "openvla"
        return self._batches.sample(self._batch_size, config.brightness, config.shift, augmented)

    def _weights(self, parts: list[Any]) -> list[Any]:
        """How much each part's mean counts in the batch's."""
        return [len(part) / self._batch_size for part in parts]

    def _losses(self, batch: Any) -> tuple[Tensor, ...]:
        """As `LOGGED` names them; the first is minimised."""
        with self._autocast():
            losses = sft_losses(self._model, self._head, batch, self._config, self._teacher)  # type: ignore[arg-type]
        return losses.total, losses.token_accuracy, losses.grounding

    def _autocast(self) -> torch.autocast:
        dtype = compute_dtype(self._device)
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last metrics."""
        with ExitStack() as until_done:
            again = []
            if self._config.gradient_checkpointing:
                again = [b for part in transformer_blocks(self._model).values() for b in part]
            on_gpu = self._device.type == "cuda" and not self._ranks.sharded
            # Layer by layer: the same few kernels serve all, and compiling takes seconds.
            for block in self._blocks() if on_gpu else ():
                if not any(block is other for other in again):
                    block.compile(dynamic=False)
            until_done.enter_context(recomputed(again, compiled=on_gpu))
            self._train()
        self._put(self._average)
        if self._ranks.sharded:
            self._ranks.unshard(self._model)
        if self._adapters:
            self._adapters.fold()
        self._model.eval().requires_grad_(True)
        return self._metrics

    def _train(self) -> None:
        config = self._config
        every = max(1, config.steps // 100)
        began = time.perf_counter()
        self._model.train()
        first = self._step
        steps = range(first, config.steps)
        quiet = not self._ranks.first
        bar = tqdm(steps, "sft", initial=first, total=config.steps, unit="step", disable=quiet)
        for self._step in bar:
            self._correct(first)
            self._sums += self._update()
            if (self._step + 1) % every == 0:
                means = (self._ranks.mean(self._sums) / every).tolist()
                self._metrics = dict(zip(self.LOGGED, means, strict=True))
                rate = every * config.batch_size / (time.perf_counter() - began)
                if self._log:
                    self._log.write(step=self._step, **self._metrics, samples_per_s=rate)
                self._sums.zero_()
                began = time.perf_counter()
            if (self._step + 1) % config.checkpoint_every == 0:
                self._save()

    def _update(self) -> Tensor:
        """One step; the losses, as `LOGGED` names them."""
        config = self._config
        self._set_learning_rate(config.learning_rate * schedule(self._step, config))
        # Early on the average follows faster, or it would remember the initial weights.
        self._follow.fill_(1 - min(config.average, (1 + self._step) / (10 + self._step)))
        # With prompts of several lengths, a step of an OpenVLA-OFT waits for the host.
        waits = isinstance(self._model, OpenVLAOFT) and not self._batches.one_length
        if self._captured and not waits:
            return self._captured(key=len(self._batches))
        return self._step_on_batch()

    def _set_learning_rate(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _step_on_batch(self) -> Tensor:
        batch, size = self._draw(), self._config.micro_batch or self._batch_size
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        seen = torch.zeros_like(self._sums)
        for part, weight in zip(parts, self._weights(parts), strict=True):
            with self._ranks.gathering(self._learnt, last=part is parts[-1]):
                losses = self._learnt(part)
                (weight * losses[0]).backward()
            seen += weight * torch.stack(losses).detach()
        nn.utils.clip_grad_norm_(self._learning.values(), self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages = [local(value) for value in self._average.values()]
            current = [local(value) for value in self._current.values()]
            ahead = torch._foreach_sub(current, averages)
            torch._foreach_mul_(ahead, self._follow)
            torch._foreach_add_(averages, ahead)
        return seen

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        """Give what learns of the policy these values."""
        for name, value in weights.items():
            self._current[name].copy_(value)

    def _correct(self, first: int) -> None:
        """Collect a corrections round if it is due; after a resume, take up the earlier ones."""
        for number, corrections in enumerate(self._config.corrections):
            due = corrections.at_step
            if self._collect and (self._step == due or due < self._step == first):
                current = {name: value.clone() for name, value in self._current.items()}
                self._put(self._average)
                with self._adapters.folded() if self._adapters else nullcontext():
                    self._collect(number, self._model.eval())
                self._put(current)
                self._model.train()

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"learnt.{k}": v for k, v in self._learning.items()}
        tensors |= {f"average.{k}": v for k, v in self._average.items()}
        tensors |= optimizer_tensors(self._optimizer)
        tensors = {name: whole(value) for name, value in tensors.items()}
        own = {"sums": self._sums, **rng_tensors(self._device)}
        tensors |= self._ranks.everyones(own)
        facts = {"step": self._step + 1, "metrics": self._metrics, "ranks": self._ranks.count}
        if self._ranks.first:
            save_checkpoint(self._work / "checkpoint", tensors, facts)

    def _restore(self) -> None:
        place, ranks = self._work / "checkpoint", self._ranks
        saved = ranks.from_first(load_checkpoint(place) if ranks.first else None)
        if not saved:
            return
        tensors, facts = saved
        ranks.require(facts.get("ranks", 1), place)
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(like(tensors[f"learnt.{name}"], parameter))
        for name, value in self._average.items():
            value.copy_(like(tensors[f"average.{name}"], value))
        for i, parameter in enumerate(self._learning.values()):
            for name in ("exp_avg", "exp_avg_sq"):
                key = f"optimizer.{i}.{name}"
                if key in tensors:
                    tensors[key] = like(tensors[key], parameter)
        restore_optimizer(self._optimizer, tensors)
        own = ranks.mine(tensors, ["sums", *rng_tensors(self._device)])
        restore_rng(own, self._device)
        self._step, self._metrics = facts["step"], facts["metrics"]
        self._sums.copy_(own["sums"])


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
    teacher: OpenVLA | None = None,
    environment: str = "tabletop",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train on demonstrations and the corrections collected on the way.

    Corrections go to `work/corrections-N` and into the batches; of several processes the first one
    collects them, and all get them. Returns the stage's facts.

    Raises:
        UserError: the configuration distils, and there is no teacher; or it adapts a policy that is
            new.
    """
    if config.lora:
        refuse_new(trainable, "sft")
    if config.augmentation:  # from here on it looks at the centre: where it acts, and is trained on
        trainable.config = replace(trainable.config, center_crop=augmentation.CROP)
        batches.processor = trainable.processor
    seed_everything(seed)

    def correct(number: int, model: OpenVLA) -> None:
        place, wanted = work / f"corrections-{number}", config.corrections[number]
        if ranks.first and not place.exists():
            environments = at_once(environment, min(wanted.episodes, 8 * cpu_count()))
            actor = Actor(model, trainable.processor, trainable.codec, device, environments)
            collect_corrections(place, actor, wanted, latency, environment)
        batches.take(place, ranks)

    began = time.perf_counter()
    metrics = Trainer(trainable.model, batches, config, device, work, correct, teacher, ranks).run()
    facts = {"seed": seed, "seconds": time.perf_counter() - began, **ranks.facts}
    return {**facts, **stated(config), **metrics}
