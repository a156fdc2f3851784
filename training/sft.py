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
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
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
        chunk: (B, chunk, D) the actions from this step on, scaled and in [-1, 1]; beyond the end
            of the episode its last one. None where the policy gives single actions.
    """

    inputs: Inputs
    bins: Tensor
    grounding: Tensor
    chunk: Tensor | None = None


class DemonstrationBatches:
    """Random batches of demonstration steps, kept on the device."""

    CHECKED = ("images", "proprioception", "bins")
    """What must have the same shape in all demonstrations."""

    def __init__(self, processor: Processor, codec: ActionCodec, device: torch.device) -> None:
        self._processor, self._codec, self._device = processor, codec, device
        self._instructions: dict[str, int] = {}
        self._steps: dict[str, Tensor] = {}
        architecture = processor.config.architecture
        self._images, self._head = architecture.images, architecture.action_head
        self._taken: list[Path] = []

    def take(self, place: Path) -> None:
        """Add a directory of demonstrations, unless it has been taken before."""
        if place not in self._taken:
            self.add(read(place))
            self._taken.append(place)

    def add(self, data: Demonstrations) -> None:
        """Add steps; joined on the device, where there is room and copying takes no time.

        Raises:
            UserError: their images, proprioception or actions have another shape than those before;
                or there are images of more or fewer cameras than the policy looks through.
        """
        cameras = data.images.shape[1] if data.images.ndim == 5 else 1
        if cameras != self._images:
            raise UserError(
                f"the policy looks through {self._images} cameras, and the demonstrations hold the "
                f"frames of {cameras}; export rollouts for this policy"
            )
        for text in data.instructions:
            self._instructions.setdefault(text, len(self._instructions))
        numbers = np.array([self._instructions[text] for text in data.instructions])
        arrays = self._arrays(data) | {"prompts": numbers[data.prompts]}
        for name in self.CHECKED if self._steps else ():
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

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps["prompts"])

    @property
    def one_length(self) -> bool:
        """Whether all prompts have the same length, so that no batch has a mask."""
        return self._mask is None

    def _arrays(self, data: Demonstrations) -> dict[str, NDArray[Any]]:
        """What is kept of each step, apart from its prompt."""
        arrays: dict[str, NDArray[Any]] = {
            "images": data.images,
            "proprioception": data.proprioception,
            "bins": self._codec.encode(data.actions.astype(np.float64)),
            "grounding": data.grounding,
        }
        if self._head is not None:
            scaled = self._codec.scale(data.actions.astype(np.float64)).clip(-1.0, 1.0)
            arrays |= {"actions": scaled.astype(np.float32), "ends": self._ends(data)}
        return arrays

    def _ends(self, data: Demonstrations) -> NDArray[np.int64]:
        """The place of the last step of each step's episode, among all steps."""
        steps = [facts["steps"] for facts in data.episodes]
        before = len(self._steps["ends"]) if self._steps else 0
        return before + np.repeat(np.cumsum(steps) - 1, steps)

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
        rows = torch.randint(len(self), (size,), device=self._device)
        inputs = self._inputs(rows, self._pixels(rows, brightness, shift))
        return Batch(inputs, steps["bins"][rows], steps["grounding"][rows], self._chunks(rows))

    def _pixels(self, rows: Tensor, brightness: float, shift: int) -> Tensor:
        """The steps' images, normalised, changed at random; (B · images, C, H, W)."""
        # Of several cameras one after the other.
        images = self._steps["images"][rows].flatten(0, -4)
        if shift:
            by = torch.randint(-shift, shift + 1, (2, len(images)), device=self._device)
            images = shifted(images, by)
        pixels = self._processor.pixel_values(images)
        if brightness:
            change = 2 * torch.rand(2, len(images), 1, 1, 1, device=self._device) - 1
            gain, contrast = 1 + brightness * change
            mean = pixels.mean((2, 3), keepdim=True)
            pixels = mean * gain + (pixels - mean) * contrast
        return pixels

    def _inputs(self, rows: Tensor, pixels: Tensor) -> Inputs:
        prompts = self._steps["prompts"][rows]
        return Inputs(
            self._ids[prompts],
            None if self._mask is None else self._mask[prompts],
            self._arranged(pixels, len(rows)),
            self._processor.normalise_proprioception(self._steps["proprioception"][rows])
            if self._processor.config.proprioception
            else None,
        )

    def _arranged(self, pixels: Tensor, size: int) -> Tensor:
        """(B · images, C, H, W) -> as `Inputs.pixel_values` has it."""
        return pixels.reshape(size, -1, *pixels.shape[2:])

    def _chunks(self, rows: Tensor) -> Tensor | None:
        if self._head is None:
            return None
        following = rows[:, None] + torch.arange(self._head.chunk, device=self._device)
        return self._steps["actions"][following.minimum(self._steps["ends"][rows][:, None])]


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


class CapturedStep:
    """A training step that becomes one CUDA graph, so that the GPU never waits for the host.

    Small policies take less time on a GPU than Python takes to launch their kernels.

    Args:
        step: draws its batch and its randomness on the device, and takes numbers that change from
            step to step from tensors; returns a tensor.
    """

    WARM_UP = 4
    """Steps outside a graph first: what is compiled or allocated once is by then."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step, self._key, self._left = step, object(), self.WARM_UP
        self._stream = torch.cuda.Stream()

    def __call__(self, key: object) -> Tensor:
        """Take one step; captured anew when `key` differs from the one before."""
        if key != self._key:
            self._key, self._left, self._graph = key, self.WARM_UP, None
        if self._left:
            self._left -= 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._result = self._step()
        self._graph.replay()
        return self._result


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

    Raises:
        UserError: the configuration distils, and there is no teacher.
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
    ) -> None:
        if config.distillation and teacher is None:
            raise UserError("sft: 'distillation' needs a teacher; name its bundle with --teacher")
        self._teacher = teacher if config.distillation else None
        if config.freeze_vision:
            model.vision_backbone.requires_grad_(False)
        self._model, self._batches, self._config, self._device = model, batches, config, device
        self._work, self._collect = work, correct
        if isinstance(model, OpenVLAOFT):
            for name in ("label_width", "distillation"):
                if getattr(config, name):
                    raise UserError(
                        f"sft: {name} is about tokens, and the policy gives chunks; leave it"
                    )
        self._head: nn.Module = self._new_head()
        self._learnt = nn.ModuleDict({"model": model, "head": self._head})
        on_gpu = device.type == "cuda"
        # Tensors, so that a captured step sees what they are by then.
        learning_rate = torch.tensor(config.learning_rate, device=device)
        self._follow = torch.ones((), device=device)
        self._learning = [p for p in self._learnt.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._learning,
            lr=learning_rate if on_gpu else config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._captured = CapturedStep(self._step_on_batch) if on_gpu and self.CAPTURES else None
        self._current = model.state_dict()
        self._average = {name: value.clone() for name, value in self._current.items()}
        self._step = 0
        self._sums = torch.zeros(len(self.LOGGED), device=device)
        self._metrics = dict[str, float]()
        work.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._log = MetricsLog(work / "log.csv", self._step)

    def _new_head(self) -> nn.Module:
        """What is trained beside the policy, and thrown away."""
        hidden = self._model.config.decoder.hidden_size
        return GroundingHead(hidden, self._batches.grounding_size, device=self._device)

    def _blocks(self) -> Iterable[nn.Module]:
        """What is worth compiling: blocks of which there are many."""
        policies = (self._model, *([self._teacher] if self._teacher else []))
        return [
            block
            for policy in policies
            for block in (
                *policy.vision_backbone.featurizer.blocks,
                *policy.language_model.model.layers,
            )
        ]

    def _losses(self) -> tuple[Tensor, ...]:
        """Of a new batch, as `LOGGED` names them; the first is minimised."""
        config = self._config
        batch = self._batches.sample(config.batch_size, config.brightness, config.shift)
        with self._autocast():
            losses = sft_losses(self._model, self._head, batch, config, self._teacher)  # type: ignore[arg-type]
        return losses.total, losses.token_accuracy, losses.grounding

    def _autocast(self) -> torch.autocast:
        dtype = compute_dtype(self._device)
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last metrics."""
        config, model, device = self._config, self._model, self._device
        if device.type == "cuda":
            # Layer by layer: the same few kernels serve all, and compiling takes seconds.
            for block in self._blocks():
                block.compile(dynamic=False)
        every = max(1, config.steps // 100)
        began = time.perf_counter()
        model.train()
        first = self._step
        steps = range(first, config.steps)
        for self._step in tqdm(steps, "sft", initial=first, total=config.steps, unit="step"):
            self._correct(first)
            self._sums += self._update()
            if (self._step + 1) % every == 0:
                means = (self._sums / every).tolist()
                self._metrics = dict(zip(self.LOGGED, means, strict=True))
                rate = every * config.batch_size / (time.perf_counter() - began)
                self._log.write(step=self._step, **self._metrics, samples_per_s=rate)
                self._sums.zero_()
                began = time.perf_counter()
            if (self._step + 1) % config.checkpoint_every == 0:
                self._save()
        model.load_state_dict(self._average)
        model.eval().requires_grad_(True)
        return self._metrics

    def _update(self) -> Tensor:
        """One step; the losses, as `LOGGED` names them."""
        config = self._config
        self._set_learning_rate(config.learning_rate * schedule(self._step, config))
        # Early on the average follows faster, or it would remember the initial weights.
        self._follow.fill_(1 - min(config.average, (1 + self._step) / (10 + self._step)))
        if self._captured and self._batches.one_length:
            return self._captured(key=len(self._batches))
        return self._step_on_batch()

    def _set_learning_rate(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _step_on_batch(self) -> Tensor:
        losses = self._losses()
        losses[0].backward()
        nn.utils.clip_grad_norm_(self._learning, self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages = list(self._average.values())
            ahead = torch._foreach_sub(list(self._current.values()), averages)
            torch._foreach_mul_(ahead, self._follow)
            torch._foreach_add_(averages, ahead)
        return torch.stack(losses).detach()

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
    teacher: OpenVLA | None = None,
    environment: str = "tabletop",
) -> dict[str, Any]:
    """Train on demonstrations and the corrections collected on the way.

    Corrections go to `work/corrections-N` and into the batches. Returns the stage's facts.

    Raises:
        UserError: the configuration distils, and there is no teacher.
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
    metrics = Trainer(trainable.model, batches, config, device, work, correct, teacher).run()
    return {"seed": seed, "seconds": time.perf_counter() - began, **asdict(config), **metrics}
