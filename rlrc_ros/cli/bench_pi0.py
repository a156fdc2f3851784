"""What `rlrc bench --shape pi0` measures: pi0 at full size with random weights.

The reference is `sample_actions` of `transformers`' own class over the same weights, which is what
people run. All variants act in one process, interleaved, from the cameras' bytes on the host to a
chunk of actions on the host.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrc_ros.cli.bench_shape import device_rates, random_model, say, synchronize
from rlrc_ros.errors import UserError
from rlrc_ros.timing import percentiles, ratio_interval
from rlrc_ros.vla import matrices
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    ExpertConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0, start_noise
from rlrc_ros.vla.pi0_engine import Pi0GraphEngine
from rlrc_ros.vla.pi0_upstream import upstream_inputs, upstream_model
from rlrc_ros.vla.policy import parameter_counts

PROMPT = 20
"""Tokens of an instruction of some fifteen words."""
OBSERVATIONS = 8
WARM_UP_ROUNDS = 3
COMPARED = 4
"""Chunks that the engine's actions are compared with the reference's in."""
VARIANTS = ("full", "full-nf4", "pruned", "pruned-both", "pruned-nf4", "shallow")
"""`pruned`: 90% of the heads and channels of each layer of the language model but the first and the
last; `pruned-both`: and of the action expert; `shallow`: a third of the layers of both, whole;
`-nf4`: every layer of towers, projector, language model and expert in 4 bits."""
DEFAULT = "full,full-nf4,pruned,pruned-both,shallow"


def pi0() -> BundleConfig:
    """The sizes of pi0: PaliGemma-3B, an expert of 300 M, three cameras, chunks of 50."""
    half = (0.5, 0.5, 0.5)
    tower = TowerConfig(
        kind="paligemma",
        width=1152,
        depth=27,
        heads=16,
        ffn=4304,
        patch=14,
        image_size=224,
        mean=half,
        std=half,
    )
    decoder = DecoderConfig(
        vocab_size=257152,
        hidden_size=2048,
        head_dim=256,
        layers=(LayerWidths(8, 1, 16384),) * 18,
        max_positions=8192,
        bos_token_id=2,
    )
    expert = ExpertConfig(hidden_size=1024, layers=(LayerWidths(8, 1, 4096),) * 18)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    return BundleConfig(
        architecture=ArchitectureConfig(
            towers=(tower,), decoder=decoder, images=len(cameras), expert=expert
        ),
        action_codec=ActionCodecConfig(q01=(-1.0,) * 7, q99=(1.0,) * 7, mask=(True,) * 7),
        cameras=tuple(CameraConfig(name=name, height=224, width=224) for name in cameras),
        proprioception=None,
        control_rate=20.0,
        instruction_template="{instruction}\n",
        dtype="bfloat16",
    )


SHAPES: dict[str, Callable[[], BundleConfig]] = {"pi0": pi0}


def architecture_of(variant: str, whole: ArchitectureConfig) -> ArchitectureConfig:
    """The widths of a variant's layers.

    Raises:
        UserError: the shape has too few layers for it.
    """
    kind, expert = variant.removesuffix("-nf4"), whole.expert
    assert expert is not None
    decoder = whole.decoder
    if kind == "shallow":
        keep = len(decoder.layers) // 3
        if not keep:
            raise UserError(f"'{variant}': this shape has too few layers")
        decoder = replace(decoder, layers=decoder.layers[:keep])
        expert = replace(expert, layers=expert.layers[:keep])
    elif kind != "full":
        decoder = replace(decoder, layers=_pruned(decoder.layers))
        if kind == "pruned-both":
            expert = replace(expert, layers=_pruned(expert.layers))
    return replace(whole, decoder=decoder, expert=expert)


def _pruned(layers: tuple[LayerWidths, ...]) -> tuple[LayerWidths, ...]:
    """A tenth of each layer but the first and the last; keys and values stay."""
    return (layers[0], *map(_tenth, layers[1:-1]), layers[-1])


def _tenth(widths: LayerWidths) -> LayerWidths:
    share = max(1, widths.heads // widths.kv_heads // 10)
    return LayerWidths(share * widths.kv_heads, widths.kv_heads, max(64, widths.ffn // 640 * 64))


class Upstream:
    """`sample_actions` of `transformers`."""

    takes_bytes = False

    def __init__(self, model: Pi0) -> None:
        assert model.config.expert is not None
        self._config, self._model = model.config, upstream_model(model)
        weight = model.expert.state_proj.weight
        self._noise = start_noise(model.config.expert)[None].to(weight.device, weight.dtype)

    def chunk(self, inputs: Inputs) -> Tensor:
        """Normalised actions, (1, chunk, action_width) float32 on the CPU."""
        given: dict[str, Any] = {**upstream_inputs(self._config, inputs)}
        return self._model.sample_actions(noise=self._noise.clone(), **given).float().cpu()


@dataclass
class Contestant:
    """One variant, ready to act.

    Attributes:
        name: of the variant.
        engine: that runs it.
        config: its architecture.
        dtype: of what is not quantized.
        facts: what was found out while building it.
        times_ms: of one chunk each, a value a round.
    """

    name: str
    engine: Upstream | Pi0GraphEngine
    config: BundleConfig
    dtype: torch.dtype
    facts: dict[str, Any]
    times_ms: list[float] = field(default_factory=list)


def measure(
    shape: str,
    variants: list[str],
    rounds: int,
    device: torch.device,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Build and measure.

    Args:
        shape: of `SHAPES`.
        variants: of `VARIANTS`.
        rounds: how often each variant acts.
        device: where.
        save: is given what is known, whenever there is more.

    Returns:
        `device_rates`, and of each variant sizes, times, ratios to the reference, and the floor.
    """
    config = SHAPES[shape]()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    observations = [_observation(config, seed) for seed in range(OBSERVATIONS)]
    facts: dict[str, Any] = {"shape": shape, "dtype": str(dtype), "rounds": rounds}
    facts |= {"device_rates": device_rates(device, dtype), "variants": []}
    save(facts)
    reference = _build("transformers", config, device, dtype, observations)
    contestants = [reference]
    for name in variants:
        architecture = architecture_of(name, config.architecture)
        try:
            contestant = _build(
                name, replace(config, architecture=architecture), device, dtype, observations
            )
        except torch.OutOfMemoryError as error:
            line = str(error).splitlines()[0]
            facts.setdefault("failed", {})[name] = line
            say(f"{name}: {line}")
            continue
        if name == "full":
            contestant.facts["against_transformers_actions"] = _compare(
                reference, contestant, observations, device
            )
        contestants.append(contestant)
        save(facts | {"variants": [c.facts for c in contestants]})
    order = random.Random(0)
    for number in range(WARM_UP_ROUNDS + rounds):
        for contestant in order.sample(contestants, len(contestants)):
            elapsed = _timed(contestant, observations[number % OBSERVATIONS], device)
            if number >= WARM_UP_ROUNDS:
                contestant.times_ms.append(elapsed)
        if number % 50 == 49:
            say(f"round {number + 1 - WARM_UP_ROUNDS} of {rounds}")
            save(facts | {"variants": _summarise(contestants, facts["device_rates"])})
    facts["variants"] = _summarise(contestants, facts["device_rates"])
    save(facts)
    return facts


def _observation(config: BundleConfig, seed: int) -> Inputs:
    """Noise for every camera, in bytes, and a prompt."""
    rng = np.random.default_rng(seed)
    size, expert = config.architecture.towers[0].image_size, config.architecture.expert
    assert expert is not None
    images = rng.integers(0, 256, (1, len(config.cameras), size, size, 3), dtype=np.uint8)
    bos = config.architecture.decoder.bos_token_id
    state = torch.tensor(rng.normal(size=(1, expert.state_width)), dtype=torch.float32)
    return Inputs(torch.arange(bos, bos + PROMPT)[None], None, torch.tensor(images), state)


def _build(
    name: str,
    config: BundleConfig,
    device: torch.device,
    dtype: torch.dtype,
    observations: list[Inputs],
) -> Contestant:
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    before, start = torch.cuda.memory_allocated(device) if on_gpu else 0, time.perf_counter()
    model = random_model(config, device, dtype)
    expert = config.architecture.expert
    assert expert is not None
    facts: dict[str, Any] = {"variant": name, "parameters": parameter_counts(model)}
    for part, layers in (("llm", config.architecture.decoder.layers), ("expert", expert.layers)):
        facts[f"{part}_layers"] = [[w.heads, w.kv_heads, w.ffn] for w in layers]
    engine: Upstream | Pi0GraphEngine
    if name == "transformers":
        facts["bytes"] = {
            part: sum(p.nbytes for p in module.parameters()) for part, module in model.parts.items()
        }
        engine = Upstream(model)
    else:
        hold = matrices.packed if name.endswith("-nf4") else matrices.held
        engine = Pi0GraphEngine(model, hold=hold)
        facts["bytes"] = engine.weight_bytes()
    del model
    facts["bytes"]["total"] = sum(facts["bytes"].values())
    gc.collect()
    facts["seconds_to_build"] = time.perf_counter() - start
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if isinstance(engine, Pi0GraphEngine):
        facts["seconds_to_capture"] = engine.prepare()
    contestant = Contestant(name, engine, config, dtype, facts)
    for observation in observations[:2]:
        _timed(contestant, observation, device)
    if on_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    say(f"{name}: ready in {time.perf_counter() - start:.1f} s")
    return contestant


def _inputs(contestant: Contestant, observation: Inputs, device: torch.device) -> Inputs:
    """What the engine is handed: bytes on the host, or normalised images on the device."""
    if contestant.engine.takes_bytes:
        return observation
    pixels = observation.pixel_values.to(device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return replace(observation, pixel_values=pixels).to(device, contestant.dtype)


def _timed(contestant: Contestant, observation: Inputs, device: torch.device) -> float:
    """From the images' bytes to the actions on the host, in ms."""
    codec = ActionCodec(contestant.config.action_codec)
    synchronize(device)
    start = time.perf_counter()
    chunk = contestant.engine.chunk(_inputs(contestant, observation, device))
    codec.unscale(chunk[0, :, : contestant.config.action_codec.dimensions].double().numpy())
    return (time.perf_counter() - start) * 1e3


def _compare(
    reference: Contestant, contestant: Contestant, observations: list[Inputs], device: torch.device
) -> dict[str, float]:
    """The engine's normalised actions against the reference's, over the same weights and noise."""
    largest, sizes, moved = 0.0, [], []
    expert = reference.config.architecture.expert
    assert expert is not None
    for observation in observations[:COMPARED]:
        expected, found = (
            c.engine.chunk(_inputs(c, observation, device)) for c in (reference, contestant)
        )
        largest = max(largest, (found - expected).abs().max().item())
        sizes.append((found - expected).abs().mean().item())
        moved.append((expected - start_noise(expert)).abs().mean().item())
    return {
        "chunks": COMPARED,
        "max_difference": largest,
        "mean_difference": float(np.mean(sizes)),
        "mean_distance_from_noise": float(np.mean(moved)),
    }


def floor_ms(contestant: Contestant, rates: dict[str, float]) -> float:
    """The least a chunk can take here: in each pass, reading the weights or the arithmetic."""
    config, parts = contestant.config, contestant.facts["bytes"]
    decoder, expert = config.architecture.decoder, config.architecture.expert
    assert expert is not None
    counts = contestant.facts["parameters"]
    patches = config.architecture.context
    # Of the embedding, rows are looked up; of the last layer, keys and values are used.
    embedding = decoder.vocab_size * decoder.hidden_size * contestant.dtype.itemsize
    *layers, last = decoder.layers
    used = sum((w.heads + w.kv_heads) * 2 * decoder.head_dim + 3 * w.ffn for w in layers)
    used = decoder.hidden_size * (used + 2 * last.kv_heads * decoder.head_dim)

    def seconds(weights: int, operations: int) -> float:
        return max(weights / rates["bytes_per_s"], operations / rates["operations_per_s"])

    seen = counts["vision"] + counts["projector"]
    total = seconds(parts["vision"] + parts["projector"], 2 * seen * patches)
    total += seconds(parts["llm"] - embedding, 2 * used * (patches + PROMPT))
    total += expert.steps * seconds(parts["expert"], 2 * counts["expert"] * expert.chunk)
    return total * 1e3


def _summarise(contestants: list[Contestant], rates: dict[str, float]) -> list[dict[str, Any]]:
    reference, rows = contestants[0], []
    for contestant in contestants:
        row = dict(contestant.facts)
        if contestant.times_ms:
            p50, p99 = percentiles(contestant.times_ms)
            row["latency_ms"] = {"p50": p50, "p99": p99, "chunks": len(contestant.times_ms)}
            row["floor_ms"] = floor_ms(contestant, rates)
            row["times_ms"] = contestant.times_ms
            row["against_transformers"] = _ratios(contestant, reference)
        rows.append(row)
    return rows


def _ratios(contestant: Contestant, reference: Contestant) -> dict[str, Any]:
    slow, fast = reference.times_ms, contestant.times_ms
    ratios: dict[str, Any] = {
        "times_faster": percentiles(slow)[0] / percentiles(fast)[0],
        "times_faster_ci95": list(ratio_interval(slow, fast)),
        "bytes_times_less": reference.facts["bytes"]["total"] / contestant.facts["bytes"]["total"],
    }
    if "peak_bytes" in reference.facts:
        ratios["peak_times_less"] = reference.facts["peak_bytes"] / contestant.facts["peak_bytes"]
    return ratios


def table(facts: dict[str, Any]) -> str:
    """For people."""
    rates = facts["device_rates"]
    lines = [
        f"{'variant':<14}{'p50 ms':>9}{'p99 ms':>9}{'faster':>9}{'floor ms':>10}{'GB':>8}"
        f"{'peak GB':>9}{'less':>8}{'capture s':>11}"
    ]
    for row in facts["variants"]:
        ratios, latency = row["against_transformers"], row["latency_ms"]
        peak, less = row.get("peak_bytes"), ratios.get("peak_times_less")
        lines.append(
            f"{row['variant']:<14}{latency['p50']:>9.2f}{latency['p99']:>9.2f}"
            f"{ratios['times_faster']:>8.1f}×{row['floor_ms']:>10.2f}"
            f"{row['bytes']['total'] / 1e9:>8.2f}{f'{peak / 1e9:.2f}' if peak else '':>9}"
            f"{f'{less:.1f}×' if less else '':>8}{row.get('seconds_to_capture', 0.0):>11.1f}"
        )
        if compared := row.get("against_transformers_actions"):
            lines.append(
                f"  normalised actions differ from the reference's by "
                f"{compared['mean_difference']:.2g} in the mean, {compared['max_difference']:.2g} "
                f"at most; they lie {compared['mean_distance_from_noise']:.2g} from the noise"
            )
    lines += [f"{name}: failed, {line}" for name, line in facts.get("failed", {}).items()]
    lines.append(
        f"{facts['shape']}, random weights, {facts['dtype']}, {facts['rounds']} rounds; measured "
        f"{rates['bytes_per_s'] / 1e12:.2f} TB/s and {rates['operations_per_s'] / 1e12:.0f} "
        "tera-operations/s"
    )
    return "\n".join(lines)
