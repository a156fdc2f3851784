"""`load_policy`: from a bundle on disk to an object that acts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rlrc_ros.errors import UserError
from rlrc_ros.vla import quantization
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.bundle import Bundle, open_bundle
from rlrc_ros.vla.chunk_engine import EagerChunkEngine, GraphChunkEngine
from rlrc_ros.vla.config import ArchitectureConfig, BundleConfig
from rlrc_ros.vla.engine import ChunkEngine, EagerEngine, Engine, UnrolledEngine
from rlrc_ros.vla.graph_engine import GraphEngine
from rlrc_ros.vla.openvino_engine import OpenVINOEngine
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.pi0_engine import Pi0EagerEngine, Pi0GraphEngine
from rlrc_ros.vla.pi0_processor import Pi0Processor
from rlrc_ros.vla.processor import Observation, Processor

EngineName = Literal["auto", "eager", "unrolled", "graph", "openvino"]
ACTION_WIDTH = 7
"""Values of an action that this program can command."""


@dataclass
class ActionChunk:
    """What a policy wants done next.

    Attributes:
        actions: (T, 7) float64, one row a control step: translation (m) and rotation vector (rad)
            of the end effector in the base frame, gripper opening in [0, 1] (0 closed).
        latency_ms: by stage: preprocess, inference, total.
    """

    actions: NDArray[np.float64]
    latency_ms: dict[str, float]


def build_model(config: BundleConfig) -> OpenVLA | Pi0:
    """The bundle's module tree with fresh weights."""
    if config.architecture.expert is not None:
        return Pi0(config.architecture)
    if config.architecture.action_head is not None:
        return OpenVLAOFT(config.architecture, config.action_codec.n_bins)
    return OpenVLA(config.architecture, config.action_codec.n_bins, config.action_codec.dimensions)


def processor_of(config: BundleConfig, tokenizer: Tokenizer | None) -> Processor:
    """The bundle's preprocessing."""
    pi0 = config.architecture.expert is not None
    return (Pi0Processor if pi0 else Processor)(config, tokenizer)


def empty_model(bundle: Bundle) -> OpenVLA | Pi0:
    """The bundle's module tree without memory, on the meta device.

    Raises:
        UserError: the stored tensors do not fit the architecture.
    """
    with torch.device("meta"):
        model = build_model(bundle.config)
    weights, quantized = bundle.weights, bundle.config.quantization is not None
    _refuse_misfits(weights.path, model, weights.shapes(), quantized)
    return model


def load_model(
    bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> OpenVLA | Pi0:
    """The bundle's model with its weights; what is not quantized is cast to `dtype`.

    Raises:
        UserError: the stored tensors do not fit the architecture; found out before any of them is
            read.
    """
    model, weights = empty_model(bundle), bundle.weights
    tensors = weights.stream()
    if quantized := bundle.config.quantization:
        held = bundle.tensors()
        quantization.restore(model, quantized, held)
        tensors = iter(held.items())
    # Copies, one at a time: a file's own memory map must not change under a running policy when the
    # file does, nor fill the memory beside them.
    cast = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors}
    problems = model.load_state_dict(cast, strict=False, assign=True)
    left = [key for key in problems.missing_keys if not _belongs_to_quantized(model, key)]
    if left or problems.unexpected_keys:
        raise UserError(
            f"{weights.path}: missing {left[:3]}, unexpected {problems.unexpected_keys[:3]}"
        )
    model.rebuild_buffers()
    return model.to(device).eval()


def load_openvla(
    bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> OpenVLA:
    """`load_model` of a policy that decides by tokens.

    Raises:
        UserError: it is pi0, which decides otherwise; or what `load_model` refuses.
    """
    if bundle.config.architecture.expert is not None:
        raise UserError(
            f"{bundle.path}: is a pi0 policy; this takes one that decides by action tokens"
        )
    model = load_model(bundle, device, dtype)
    assert isinstance(model, OpenVLA)
    return model


def _belongs_to_quantized(model: OpenVLA | Pi0, key: str) -> bool:
    return quantization.is_quantized(model.get_submodule(key.rpartition(".")[0]))


def _refuse_misfits(
    file: Path, model: OpenVLA | Pi0, stored: dict[str, tuple[int, ...]], quantized: bool
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = len(model.config.decoder.layers)
    held = {
        name.split(".")[3] for name in stored if name.startswith("language_model.model.layers.")
    }
    if held and layers != len(held):
        raise UserError(
            f"{file}: config.json asks for {layers} decoder layers, the file holds {len(held)}"
        )
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(
        name for name in stored.keys() - expected.keys() if not (quantized and ".weight." in name)
    )
    wrong = [
        f"{name} is {stored[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in stored
        and stored[name] != shape
        and f"{name}.{quantization.STATE_KEY}" not in stored
    ]
    problems = [f"missing: {_some(missing)}"] * bool(missing) + [f"unknown: {_some(extra)}"] * bool(
        extra
    )
    problems += [f"wrong shape: {_some(wrong)}"] * bool(wrong)
    if problems:
        raise UserError(f"{file} does not fit config.json; {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Policy:
    """A policy that is loaded and ready.

    The same object serves nodes, evaluation and benchmarks.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine | ChunkEngine,
        parameters: dict[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.bundle, self.config, self.hash = bundle, bundle.config, bundle.hash
        self.engine, self.device, self.dtype = engine, device, dtype
        self.parameters = parameters
        tokenizer = bundle.tokenizer() if bundle.has_tokenizer else None
        self.processor = processor_of(bundle.config, tokenizer)
        self._codec = ActionCodec(bundle.config.action_codec)

    def act(self, observation: Observation) -> ActionChunk:
        """One inference.

        Raises:
            UserError: the observation does not fit the bundle's contract, or the model gave a value
                that is not finite.
        """
        self.bundle.require_action_scale()
        start = time.perf_counter()
        inputs = self.processor(observation, as_bytes=self.engine.takes_bytes)
        if not self.engine.takes_bytes:
            inputs = inputs.to(self.device, self.dtype)
        ready = time.perf_counter()
        actions = self._decide(inputs)
        actions[:, -1] = actions[:, -1].clip(0.0, 1.0)
        if not np.isfinite(actions).all():
            raise UserError("the policy gave an action that is not finite")
        done = time.perf_counter()
        stages = {"preprocess": ready - start, "inference": done - ready, "total": done - start}
        return ActionChunk(actions, {name: seconds * 1e3 for name, seconds in stages.items()})

    def _decide(self, inputs: Inputs) -> NDArray[np.float64]:
        """(T, 7) actions, from the engine's tokens or from its chunk of continuous values."""
        if isinstance(self.engine, ChunkEngine):
            chunk = self.engine.chunk(inputs)[0, :, :ACTION_WIDTH]  # what follows is padding
            return self._codec.unscale(chunk.double().cpu().numpy())
        return self._codec.decode(self.engine.bins(inputs).cpu().numpy())

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part and in total."""
        parts = self.engine.weight_bytes()
        return parts | {"total": sum(parts.values())}

    def warm_up(self) -> float:
        """Prepare the engine and act twice on a grey image: no robot waits for first calls.

        Returns the seconds it took.

        Raises:
            UserError: nobody has said how the policy's actions are scaled.
        """
        self.bundle.require_action_scale()
        start = time.perf_counter()
        config, in_bytes = self.config, self.engine.takes_bytes
        size = config.architecture.towers[0].image_size
        grey = np.full((config.architecture.images, size, size, 3), 128, np.uint8)
        resting = np.asarray(config.proprioception.mean)[None] if config.proprioception else None
        inputs = Inputs(
            torch.full((1, 16), config.architecture.decoder.bos_token_id),
            None,
            self.processor.stacked(grey, in_bytes),
            None if resting is None else self.processor.normalise_proprioception(resting),
        )
        if not in_bytes:
            inputs = inputs.to(self.device, self.dtype)
        self.engine.prepare()
        for _ in range(2):
            self._decide(inputs)
        return time.perf_counter() - start


def part_of(name: str) -> str:
    """The part that a stored tensor belongs to: vision, projector, llm, action_head or expert."""
    parts = {"vision_backbone": "vision", "language_model": "llm"}
    parts |= {"action_head": "action_head", "expert": "expert"}
    return parts.get(name.partition(".")[0], "projector")


def parameter_counts(model: OpenVLA | Pi0) -> dict[str, int]:
    """Parameters by part, and in total; a quantized weight counts as what it stands for."""

    def count(parameter: Any) -> int:
        state = getattr(parameter, "quant_state", None)
        return parameter.numel() if state is None else state.shape.numel()

    counts = {name: sum(map(count, part.parameters())) for name, part in model.parts.items()}
    return counts | {"total": sum(counts.values())}


def load_policy(
    policy: str | Path,
    device: str = "cpu",
    engine: EngineName = "auto",
    dtype: str = "auto",
    unnorm_key: str | None = None,
) -> Policy:
    """Load a bundle, or an OpenVLA or pi0 checkpoint, and make it ready to act.

    Args:
        policy: a directory, or the short name of a shipped bundle; `DIR#KEY` for `unnorm_key`.
        device: as torch names it.
        engine: `auto` takes `graph` on a GPU; on a CPU `unrolled`, for chunks `eager`.
        dtype: of weights and arithmetic where nothing is quantized; `auto` takes float32 on a CPU,
            else bfloat16. With `openvino`, of the arithmetic alone.
        unnorm_key: the data set of `norm_stats` that scales an OpenVLA checkpoint's actions. Where
            there are several and none is chosen, the policy loads and refuses to act.

    Raises:
        UserError: the bundle is incomplete or damaged, or does not fit; the device does not exist.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]})"
        ) from None
    bundle = open_bundle(policy, unnorm_key)
    on_cpu, architecture = target.type == "cpu", bundle.config.architecture
    engines = engines_of(architecture)
    if architecture.expert is not None:
        _refuse_other_actions(bundle)
    if engine == "auto":
        engine = usual_engine(architecture, target)
    if engine not in engines:
        raise UserError(
            f"{bundle.path}: gives chunks of actions, which the {engine} engine cannot; take "
            f"engine {' or '.join(map(repr, engines))}"
        )
    if engine in ("unrolled", "openvino") and not on_cpu:
        raise UserError(f"the {engine} engine runs on a CPU only; take engine 'graph' or 'eager'")
    kind = {"auto": torch.float32 if on_cpu else torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    build = engines[engine]
    if engine == "openvino":  # which casts by itself, where it takes weights in float32
        build = partial(OpenVINOEngine, precision="bf16" if kind == torch.bfloat16 else "f32")
        kind = torch.float32
    _refuse_too_large(bundle, target, kind)
    model = load_model(bundle, target, kind)
    parameters = parameter_counts(model)  # before an engine takes the model apart
    return Policy(bundle, build(model), parameters, target, kind)


def engines_of(architecture: ArchitectureConfig) -> _Engines:
    """What can run policies of an architecture, by name."""
    if architecture.expert is not None:
        return _PI0_ENGINES
    return _ENGINES if architecture.action_head is None else _CHUNK_ENGINES


def usual_engine(architecture: ArchitectureConfig, device: torch.device) -> EngineName:
    """What `auto` is."""
    if device.type == "cpu":
        return "unrolled" if "unrolled" in engines_of(architecture) else "eager"
    return "graph"


def _refuse_other_actions(bundle: Bundle) -> None:
    """Say that the policy commands something else than this program can."""
    if (found := bundle.config.action_codec.dimensions) != ACTION_WIDTH:
        raise UserError(
            f"{bundle.path}: its actions have {found} values; this program commands the motion of "
            f"one end effector and its gripper, {ACTION_WIDTH} values"
        )


_Engines = dict[str, Callable[[Any], Engine | ChunkEngine]]
_ENGINES: _Engines = {
    "eager": EagerEngine,
    "unrolled": UnrolledEngine,
    "graph": GraphEngine,
    "openvino": OpenVINOEngine,
}
_CHUNK_ENGINES: _Engines = {"eager": EagerChunkEngine, "graph": GraphChunkEngine}
_PI0_ENGINES: _Engines = {"eager": Pi0EagerEngine, "graph": Pi0GraphEngine}


def _refuse_too_large(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> None:
    """Say before anything is read that a GPU has no room for a model, and what would fit."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    quantized = bundle.config.quantization is not None
    shapes = bundle.weights.shapes().values()
    needed = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    if quantized:
        needed = sum(bundle.sizes().values())
    if needed > free:
        advice = "prune it further" if quantized else "prune it, or quantize it to NF4"
        smaller = "" if quantized else f" (about {needed * 0.55 / dtype.itemsize / 1e9:.1f} GB)"
        raise UserError(
            f"{bundle.path}: its weights take {needed / 1e9:.1f} GB as {dtype}, and {device} has "
            f"{free / 1e9:.1f} of its {total / 1e9:.1f} GB free; {advice}{smaller}, or free memory"
        )
