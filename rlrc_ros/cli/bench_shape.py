"""What `rlrc bench --shape` measures: full-size architectures with random weights.

Latency and memory hang on the architecture, not on what was learnt, so this needs no checkpoint.
Every variant is measured against what people run of the full model, in one process and interleaved:
Hugging Face `generate`, or where a chunk comes from one pass its `forward`.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.timing import percentiles, ratio_interval
from rlrc_ros.vla import matrices
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.captured import CapturedEngine
from rlrc_ros.vla.chunk_engine import EagerChunkEngine, GraphChunkEngine
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ActionHeadConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.engine import ChunkEngine, EagerEngine
from rlrc_ros.vla.graph_engine import GraphEngine, Hold
from rlrc_ros.vla.oft_checkpoint import LIBERO_CHUNK, MORE_CAMERAS, unscaled
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.openvla_checkpoint import CAMERA, CONTROL_RATE, PROMPT_SUFFIX, TEMPLATE
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.policy import build_model, parameter_counts
from rlrc_ros.vla.processor import Processor

if TYPE_CHECKING:
    from rlrc_ros.vla.engine import Engine

PROMPT = 20
"""Tokens: OpenVLA's template around an instruction of five words."""
IMAGES = 8
REFERENCE_EVERY = 8
"""In one round of so many the reference acts too: it takes as long as all others together."""
WARM_UP_ROUNDS = 3
COMPARED = 10
"""Actions that the engine's tokens are compared with eager's in."""


def openvla_7b() -> BundleConfig:
    """The sizes of `openvla/openvla-7b`."""
    half = (0.5, 0.5, 0.5)
    sizes: dict[str, Any] = {"patch": 14, "image_size": 224, "mean": half, "std": half}
    towers = (
        TowerConfig(kind="dinov2", width=1024, depth=24, heads=16, ffn=4096, **sizes),
        TowerConfig(kind="siglip", width=1152, depth=27, heads=16, ffn=4304, **sizes),
    )
    decoder = DecoderConfig(
        vocab_size=32064,
        hidden_size=4096,
        head_dim=128,
        layers=(LayerWidths(32, 32, 11008),) * 32,
        pad_to_multiple_of=64,
        pad_token_id=32000,
    )
    return BundleConfig(
        architecture=ArchitectureConfig(towers=towers, decoder=decoder),
        action_codec=ActionCodecConfig(q01=(-1.0,) * 7, q99=(1.0,) * 7, mask=(True,) * 7),
        cameras=(CameraConfig(name=CAMERA, height=224, width=224),),
        proprioception=None,
        control_rate=CONTROL_RATE,
        instruction_template=TEMPLATE,
        prompt_suffix_token=PROMPT_SUFFIX,
        dtype="bfloat16",
    )


def openvla_7b_oft() -> BundleConfig:
    """The sizes of `moojink/openvla-7b-oft-finetuned-libero-*`: two images, eight actions."""
    base = openvla_7b()
    head = ActionHeadConfig(chunk=LIBERO_CHUNK, dimensions=base.action_codec.dimensions)
    architecture = replace(base.architecture, proprioception=8, images=2, action_head=head)
    cameras = tuple(replace(base.cameras[0], name=name) for name in (CAMERA, *MORE_CAMERAS))
    return replace(base, architecture=architecture, cameras=cameras, proprioception=unscaled(8))


SHAPES: dict[str, Callable[[], BundleConfig]] = {
    "openvla-7b": openvla_7b,
    "openvla-7b-oft": openvla_7b_oft,
}
HOLD: dict[str, tuple[Hold, Hold]] = {
    "": (matrices.held, matrices.held),
    "nf4": (matrices.packed, matrices.packed),
    "int8": (matrices.rounded, matrices.rounded),
    "llm-int8": (matrices.rounded, matrices.held),
}
"""How the decoder's layers are held, and the others."""
VARIANTS = tuple(
    f"{kind}-{name}".rstrip("-") for kind in ("full", "pruned", "planned") for name in HOLD
)
"""`pruned`: 90% of each layer but the first and the last; `planned`: no more bytes than that in as
few layers as they fill; `-nf4` and `-int8`: every linear layer of towers, projector and decoder in
4 or 8 bits; `-llm-int8`: the decoder's."""
DEFAULT = "full,pruned,pruned-nf4,planned,planned-nf4"


def layers_of(variant: str, full: tuple[LayerWidths, ...], decoder: DecoderConfig) -> Any:
    """The widths of a variant's layers."""
    kind, whole = variant.partition("-")[0], full[0]
    if kind == "full":
        return full
    inner = _share(whole, 0.1)
    pruned = (full[0], *(inner,) * (len(full) - 2), full[-1])
    if kind == "pruned":
        return pruned
    budget = sum(_parameters(widths, decoder) for widths in pruned)
    fewest = max(3, -(-budget // _parameters(whole, decoder)))
    for share in np.linspace(1.0, 0.0, 65)[:-1]:
        planned = (full[0], *(_share(whole, float(share)),) * (fewest - 2), full[-1])
        if sum(_parameters(widths, decoder) for widths in planned) <= budget:
            return planned
    raise UserError(f"'{variant}': this shape has too few layers to plan")


def _share(widths: LayerWidths, share: float) -> LayerWidths:
    """That share of a layer, at least one group; feed-forward widths are multiples of 64."""
    groups = max(1, int(widths.kv_heads * share))
    heads = groups * (widths.heads // widths.kv_heads)
    return LayerWidths(heads, groups, max(64, int(widths.ffn * share) // 64 * 64))


def _parameters(widths: LayerWidths, decoder: DecoderConfig) -> int:
    attention = (2 * widths.heads + 2 * widths.kv_heads) * decoder.head_dim
    return decoder.hidden_size * (attention + 3 * widths.ffn)


def random_model(config: BundleConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The module tree with random weights made on the device; the same for the same sizes."""
    with torch.device("meta"):
        model = build_model(config)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, meta in model.state_dict().items():
        if meta.ndim > 1:
            tensor = torch.empty(meta.shape, device=device, dtype=dtype)
            tensors[name] = tensor.normal_(0, 0.02, generator=generator)
        else:
            filled = 0.0 if name.endswith("bias") else 1.0
            tensors[name] = torch.full(meta.shape, filled, device=device, dtype=dtype)
    model.load_state_dict(tensors, assign=True)
    model.rebuild_buffers()
    return model.to(device).eval()


class Generate:
    """Hugging Face's own decoding over the whole vocabulary, as upstream's `predict_action`."""

    name = "generate"
    takes_bytes = False

    def __init__(self, model: OpenVLA) -> None:
        self.model = model

    @torch.inference_mode()
    def bins(self, inputs: Inputs) -> Tensor:
        """Action bins, (1, action_tokens); tokens that are no action's are clipped into range."""
        model = self.model
        embeds, _ = model.embed(inputs)
        language_model: Any = model.language_model
        tokens = language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=model.action_tokens,
            min_new_tokens=model.action_tokens,
            do_sample=False,
        )
        return (tokens[:, -model.action_tokens :] - model.first_action_id).clamp(
            0, model.n_bins - 1
        )


@dataclass
class Contestant:
    """One variant, ready to act.

    Attributes:
        name: of the variant.
        engine: that runs it.
        config: its architecture.
        dtype: of what is not quantized.
        facts: what was found out while building it.
        times_ms: of one action each, a value a round.
    """

    name: str
    engine: Engine | ChunkEngine | Generate
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
    rng = np.random.default_rng(0)
    size, count = config.architecture.towers[0].image_size, config.architecture.images
    images = rng.integers(0, 256, (IMAGES, count, size, size, 3), dtype=np.uint8)
    name = "forward" if config.architecture.action_head else "generate"
    facts: dict[str, Any] = {"shape": shape, "dtype": str(dtype), "rounds": rounds}
    facts["reference"] = name
    facts |= {"device_rates": device_rates(device, dtype), "variants": []}
    save(facts)
    reference = _build(name, config, device, dtype, images)
    contestants = [reference]
    for name in variants:
        decoder = config.architecture.decoder
        layers = layers_of(name, decoder.layers, decoder)
        architecture = replace(config.architecture, decoder=replace(decoder, layers=layers))
        try:
            variant = _build(
                name, replace(config, architecture=architecture), device, dtype, images
            )
        except torch.OutOfMemoryError as error:
            line = str(error).splitlines()[0]
            facts.setdefault("failed", {})[name] = line
            say(f"{name}: {line}")
            continue
        if name == "full":
            variant.facts["against_eager"] = _compare(reference, variant, images, device)
        contestants.append(variant)
        save(facts | {"variants": [c.facts for c in contestants]})
    order = random.Random(0)
    for number in range(WARM_UP_ROUNDS + rounds):
        acting = contestants if number % REFERENCE_EVERY == 0 else contestants[1:]
        for contestant in order.sample(acting, len(acting)):
            elapsed = _timed(contestant, images[number % IMAGES], device)
            if number >= WARM_UP_ROUNDS:
                contestant.times_ms.append(elapsed)
        if number % 50 == 49:
            say(f"round {number + 1 - WARM_UP_ROUNDS} of {rounds}")
            save(facts | {"variants": _summarise(contestants, facts["device_rates"])})
    facts["variants"] = _summarise(contestants, facts["device_rates"])
    save(facts)
    return facts


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy, reading and writing, and operations a second of a product."""
    large = device.type == "cuda"
    source = torch.empty(1 << (30 if large else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(8192 if large else 512, 8192 if large else 512, device=device, dtype=dtype)
    copying = _best(lambda: target.copy_(source), device)
    product = _best(lambda: a @ a, device)
    return {
        "bytes_per_s": 2 * source.nbytes / copying,
        "operations_per_s": 2 * len(a) ** 3 / product,
    }


def _best(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _build(
    name: str,
    config: BundleConfig,
    device: torch.device,
    dtype: torch.dtype,
    images: NDArray[np.uint8],
) -> Contestant:
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    before, start = torch.cuda.memory_allocated(device) if on_gpu else 0, time.perf_counter()
    model = random_model(config, device, dtype)
    facts: dict[str, Any] = {"variant": name, "parameters": parameter_counts(model)}
    layers = config.architecture.decoder.layers
    facts["layers"] = [[w.heads, w.kv_heads, w.ffn] for w in layers]
    engine: Engine | ChunkEngine | Generate
    if name in ("generate", "forward"):
        engine = EagerChunkEngine(model) if isinstance(model, OpenVLAOFT) else Generate(model)
        facts["bytes"] = EagerEngine(model).weight_bytes()
    else:
        hold, hold_rest = HOLD[name.partition("-")[2]]
        kind = GraphChunkEngine if isinstance(model, OpenVLAOFT) else GraphEngine
        engine = kind(model, hold=hold, hold_rest=hold_rest)
        del model
        facts["bytes"] = engine.weight_bytes()
    facts["bytes"]["total"] = sum(facts["bytes"].values())
    gc.collect()
    facts["seconds_to_build"] = time.perf_counter() - start
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if isinstance(engine, CapturedEngine):
        facts["seconds_to_capture"] = engine.prepare()
    contestant = Contestant(name, engine, config, dtype, facts)
    for image in images[:2]:
        _timed(contestant, image, device)
    if on_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    say(f"{name}: ready in {time.perf_counter() - start:.1f} s")
    return contestant


def _inputs(contestant: Contestant, images: NDArray[np.uint8], device: torch.device) -> Inputs:
    """What `Policy.act` hands to an engine; images: (images, H, W, 3)."""
    architecture = contestant.config.architecture
    bos, joints = architecture.decoder.bos_token_id, architecture.proprioception
    in_bytes = contestant.engine.takes_bytes
    inputs = Inputs(
        torch.arange(bos, bos + PROMPT)[None],
        None,
        Processor(contestant.config, None).stacked(images, in_bytes),
        torch.linspace(-1, 1, joints)[None] if joints else None,
    )
    return inputs if in_bytes else inputs.to(device, contestant.dtype)


def _numbers(contestant: Contestant, inputs: Inputs) -> NDArray[Any]:
    """What the engine gives, on the host: bins (1, D), or a chunk (T, D)."""
    if isinstance(contestant.engine, ChunkEngine):
        return contestant.engine.chunk(inputs)[0].double().cpu().numpy()
    return contestant.engine.bins(inputs).cpu().numpy()


def _timed(contestant: Contestant, images: NDArray[np.uint8], device: torch.device) -> float:
    """From the images' bytes to the actions on the host, in ms."""
    codec = ActionCodec(contestant.config.action_codec)
    synchronize(device)
    start = time.perf_counter()
    numbers = _numbers(contestant, _inputs(contestant, images, device))
    decode = codec.unscale if isinstance(contestant.engine, ChunkEngine) else codec.decode
    decode(numbers)
    return (time.perf_counter() - start) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for all that runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compare(
    reference: Contestant, variant: Contestant, images: NDArray[np.uint8], device: torch.device
) -> dict[str, float]:
    """The engine's tokens and actions against eager's over the same weights and dtype."""
    eager, tokens = reference, isinstance(reference.engine, Generate)
    if isinstance(reference.engine, Generate):
        eager = replace(reference, engine=EagerEngine(reference.engine.model))
    seen = [np.roll(images[i % IMAGES], i, axis=1) for i in range(COMPARED)]
    numbers = [
        np.concatenate([_numbers(each, _inputs(each, image, device)) for image in seen])
        for each in (eager, variant)
    ]
    codec = ActionCodec(reference.config.action_codec)
    expected, found = map(codec.decode if tokens else codec.unscale, numbers)
    facts = {"actions": COMPARED, "max_action_diff": float(np.abs(found - expected).max())}
    if tokens:
        return facts | {"share_of_tokens_different": float(np.mean(numbers[0] != numbers[1]))}
    return facts | {"action_std": float(expected.std())}


def floor_ms(contestant: Contestant, rates: dict[str, float]) -> float:
    """The least an action can take here: in each pass, reading the weights or the arithmetic."""
    architecture, parts = contestant.config.architecture, contestant.facts["bytes"]
    counts, head = contestant.facts["parameters"], architecture.action_head
    decoder = architecture.decoder
    embedding = decoder.vocab_size * decoder.hidden_size * contestant.dtype.itemsize
    layers = sum(_parameters(widths, decoder) for widths in decoder.layers)
    seen = counts["vision"] + counts["projector"]

    def seconds(weights: int, operations: int) -> float:
        return max(weights / rates["bytes_per_s"], operations / rates["operations_per_s"])

    patches = architecture.images * architecture.towers[0].patches
    total = seconds(parts["vision"] + parts["projector"], 2 * seen * patches)
    read = parts["llm"] - embedding  # of the embedding a row is looked up
    if head is None:
        steps = contestant.config.action_codec.dimensions - 1
        total += seconds(read, 2 * layers * (patches + PROMPT)) + steps * seconds(read, 2 * layers)
        return total * 1e3
    if not isinstance(contestant.engine, CapturedEngine):
        read -= embedding  # and the head over the vocabulary is not asked
    last = decoder.layers[-1]
    keys = 2 * last.kv_heads * decoder.head_dim * decoder.hidden_size
    beside = _parameters(last, decoder) - keys  # only the actions' tokens need the rest of it
    tokens = architecture.context + PROMPT + head.places + 1
    work = (layers - beside) * tokens + beside * head.places
    total += seconds(read, 2 * work)
    total += seconds(parts["action_head"], 2 * counts["action_head"] * head.chunk)
    return total * 1e3


def _summarise(contestants: list[Contestant], rates: dict[str, float]) -> list[dict[str, Any]]:
    reference, rows = contestants[0], []
    for contestant in contestants:
        row = dict(contestant.facts)
        if contestant.times_ms and reference.times_ms:
            p50, p99 = percentiles(contestant.times_ms)
            row["latency_ms"] = {"p50": p50, "p99": p99, "actions": len(contestant.times_ms)}
            row["floor_ms"] = floor_ms(contestant, rates)
            row["times_ms"] = contestant.times_ms
            row[f"against_{reference.name}"] = _ratios(contestant, reference)
        rows.append(row)
    return rows


def _ratios(contestant: Contestant, reference: Contestant) -> dict[str, Any]:
    slow = reference.times_ms
    # Of a variant, those rounds in which the reference acted too.
    fast = contestant.times_ms[-WARM_UP_ROUNDS % REFERENCE_EVERY :: REFERENCE_EVERY]
    fast = slow if contestant is reference else fast
    ratios: dict[str, Any] = {
        "times_faster": percentiles(slow)[0] / percentiles(contestant.times_ms)[0],
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
        ratios, latency = row[f"against_{facts['reference']}"], row["latency_ms"]
        peak, less = row.get("peak_bytes"), ratios.get("peak_times_less")
        lines.append(
            f"{row['variant']:<14}{latency['p50']:>9.2f}{latency['p99']:>9.2f}"
            f"{ratios['times_faster']:>8.1f}×{row['floor_ms']:>10.2f}"
            f"{row['bytes']['total'] / 1e9:>8.2f}{f'{peak / 1e9:.2f}' if peak else '':>9}"
            f"{f'{less:.1f}×' if less else '':>8}{row.get('seconds_to_capture', 0.0):>11.1f}"
        )
        if compared := row.get("against_eager"):
            share, largest = compared.get("share_of_tokens_different"), compared["max_action_diff"]
            found = (
                f"actions differ by at most {largest:.2g}, their deviation is "
                f"{compared['action_std']:.2g}"
                if share is None
                else f"{share:.1%} of the tokens differ"
            )
            lines.append(f"  against eager on these weights: {found}")
    lines += [f"{name}: failed, {line}" for name, line in facts.get("failed", {}).items()]
    lines.append(
        f"{facts['shape']}, random weights, {facts['dtype']}, {facts['rounds']} rounds; measured "
        f"{rates['bytes_per_s'] / 1e12:.2f} TB/s and {rates['operations_per_s'] / 1e12:.0f} "
        "tera-operations/s"
    )
    return "\n".join(lines)


def say(line: str) -> None:
    """Tell people what goes on, beside the result."""
    print(line, file=sys.stderr, flush=True)
