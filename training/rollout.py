"""A policy over many environments at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.chunk_engine import EagerChunkEngine
from rlrc_ros.vla.engine import Unrolled
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.pi0_engine import Pi0EagerEngine
from rlrc_ros.vla.processor import Processor
from training.augmentation import centre_cropped
from training.envs.tabletop import decode_text
from training.envs.vector import Environments, InProcess, Scenes


class Batcher:
    """Observations of many environments to a batch the model takes."""

    def __init__(self, processor: Processor, device: torch.device) -> None:
        self._processor, self._device = processor, device

    def __call__(self, observation: dict[str, Any]) -> Inputs:
        """From `image` (B, H, W, 3) uint8, `proprioception` (B, P), `instruction` (B, TEXT_BYTES).

        Arrays or tensors.
        """
        processor, device = self._processor, self._device
        rows = torch.as_tensor(observation["instruction"]).cpu().numpy()
        ids, mask = processor.batch_token_ids([decode_text(row) for row in rows])
        proprioception = torch.as_tensor(observation["proprioception"]).to(device)
        images = torch.as_tensor(observation["image"]).to(device)
        if (share := processor.config.center_crop) != 1.0:
            images = centre_cropped(images, share)
        if processor.config.architecture.expert is not None:  # which has cameras in a row
            images = images[:, None]
        return Inputs(
            ids.to(device),
            None if mask is None else mask.to(device),
            processor.pixel_values(images),
            processor.normalise_proprioception(proprioception)
            if processor.config.proprioception
            else None,
        )


class Decoder:
    """`OpenVLA.generate` for many rollouts with one model: fused, and on a GPU one CUDA graph.

    Args:
        model: may be trained between rollouts; call `refresh` then.
        batch: observations at a time, always that many.
    """

    def __init__(self, model: OpenVLA, batch: int) -> None:
        self._model, self._batch = model, batch
        self._unrolled = Unrolled(model, batch)
        self._graphs: dict[tuple[int, bool, float], _Graph] = {}

    def refresh(self) -> None:
        """Take over the weights that the model has by now."""
        self._unrolled.refresh()

    @torch.no_grad()
    def __call__(self, inputs: Inputs, temperature: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Bins (B, action_tokens), log-probabilities (B,), states (B, hidden)."""
        if inputs.attention_mask is not None and not self._unrolled.takes_masks:
            return self._model.generate(inputs, temperature)
        shape = (self._batch, self._model.action_tokens, self._model.n_bins)
        noise = torch.empty(shape, device=inputs.pixel_values.device)
        if temperature:
            noise.exponential_().log_().neg_()  # standard Gumbel
        # A compiled training step must not be compiled anew for this shape.
        with torch.compiler.set_stance("force_eager"):
            if inputs.pixel_values.device.type != "cuda":
                return self._unrolled(inputs, temperature, noise if temperature else None)
            key = (inputs.input_ids.shape[1], inputs.attention_mask is None, temperature)
            if key not in self._graphs:
                self._graphs[key] = _Graph(self._unrolled, inputs, temperature, noise)
            return self._graphs[key](inputs, noise)


class _Graph:
    """One captured decode; inputs are copied into the tensors it was captured with."""

    def __init__(
        self, unrolled: Unrolled, inputs: Inputs, temperature: float, noise: Tensor
    ) -> None:
        self._inputs = Inputs(**{name: _cloned(value) for name, value in vars(inputs).items()})
        self._noise = noise.clone() if temperature else None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                unrolled(self._inputs, temperature, self._noise)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Of several training processes each has a thread that looks after NCCL; it may go on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = unrolled(self._inputs, temperature, self._noise)

    def __call__(self, inputs: Inputs, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, mine in vars(self._inputs).items():
            if mine is not None:
                mine.copy_(getattr(inputs, name))
        if self._noise is not None:
            self._noise.copy_(noise)
        self._graph.replay()
        bins, log_probability, states = self._out
        return bins.clone(), log_probability.clone(), states.clone()


def _cloned(value: Any) -> Any:
    return value if value is None else value.clone()


class Actor:
    """Acts greedily in a fixed number of environments, in float32.

    Attributes:
        environments: how many.
        image_size: pixels, height and width of the images it looks at.
    """

    def __init__(
        self,
        model: OpenVLA | Pi0,
        processor: Processor,
        codec: ActionCodec,
        device: torch.device,
        environments: int,
    ) -> None:
        self.environments = environments
        self.image_size = processor.config.architecture.towers[0].image_size
        self._codec = codec
        self._decoder = self._chunks = None
        if isinstance(model, Pi0):
            self._chunks = Pi0EagerEngine(model).chunk
        elif isinstance(model, OpenVLAOFT):
            self._chunks = EagerChunkEngine(model).chunk
        else:
            self._decoder = Decoder(model, environments)
        self._batch = Batcher(processor, device)

    def act(self, observation: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        """(B, D) actions; of chunks the first one, since every step looks anew."""
        inputs = self._batch(observation)
        if self._decoder is not None:
            return self._codec.decode(self._decoder(inputs)[0].cpu().numpy())
        assert self._chunks is not None
        first = self._chunks(inputs)[:, 0, : self._codec.config.dimensions]
        return self._codec.unscale(first.double().cpu().numpy())


@dataclass
class Step:
    """One step of those environments that have answered.

    Attributes:
        which: they.
        observation: what each environment saw before it; only until the next step.
        told: the environments' infos that came with that.
        ended: those of them whose episode this step ended.
        infos: what each of them told after it.
    """

    which: list[int]
    observation: dict[str, NDArray[Any]]
    told: list[dict[str, Any]]
    ended: list[int]
    infos: dict[int, dict[str, Any]]


Instead = Callable[[int, dict[str, Any]], "NDArray[np.float64] | None"]
"""What an environment does instead of what the policy would, from its infos; None: nothing else."""


def roll(
    actor: Actor,
    venv: Environments | InProcess,
    seeds: Sequence[int],
    instead: Instead | None = None,
) -> Iterator[Step]:
    """Act until every scene has had its episode; closes the environments at the end.

    Who takes long to answer is not waited for, since a reset takes as long as ten steps or more:
    the policy acts for a quarter of them at a time.
    """
    scenes = Scenes(seeds, venv.num_envs)

    def prepare(environment: int, *first: int) -> None:
        """Tell an environment the scene after the one it is in."""
        following = [*first, *scenes.take(environment)]
        venv.env_method("set_seeds", following, indices=environment)

    try:
        for i in range(venv.num_envs):
            prepare(i, *scenes.take(i))
        observation: Any = venv.reset()
        told: list[dict[str, Any]] = list(venv.reset_infos)
        stepping: set[int] = set()
        acting = [i for i, info in enumerate(told) if not info["exhausted"]]
        while acting or stepping:
            if acting:
                actions = actor.act(observation)
                for i in acting:
                    other = instead(i, told[i]) if instead else None
                    actions[i] = actions[i] if other is None else other
                venv.begin(acting, actions[acting])
                stepping.update(acting)
            answers = venv.answers(stepping, max(1, venv.num_envs // 4))
            stepping -= answers.keys()
            which = sorted(answers)
            ended = [i for i in which if answers[i].done]
            yield Step(which, observation, told, ended, {i: answers[i].info for i in which})
            for i in which:
                told[i] = answers[i].reset_info if answers[i].done else answers[i].info
                for name, value in answers[i].observation.items():
                    observation[name][i] = value
            for i in ended:
                prepare(i)
            acting = [i for i in which if not told[i]["exhausted"]]
    finally:
        venv.close()
