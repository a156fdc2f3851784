"""How long decoder blocks of different widths take, and plans that meet a latency budget.

    python -m training.latency POLICY --device cuda --out jetson.json

Run where the policy is to run; the file goes into the pruning's configuration as `latency_of`.
Measured is a whole action, or a chunk of them, at batch 1 in the engine that `auto` is there, on a
GPU one CUDA graph, with random weights: models of one block and of several, so that their
difference is what a block costs. A block's attention and feed-forward are taken to add up, in pi0
the language model's and the action expert's, and between measured widths the time is interpolated
linearly; the plan itself is then measured whole, and tightened where the estimate was too low.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.schema import from_dict, read_json
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.config import ArchitectureConfig, DecoderConfig, LayerWidths, TowerConfig
from rlrc_ros.vla.engine import ChunkEngine
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.pi0_engine import Pi0GraphEngine
from rlrc_ros.vla.policy import build_model, engines_of, usual_engine
from training.common import compute_dtype, pick_device
from training.config import PruneConfig
from training.importance import GroupScores
from training.planning import Plan, best_plan, decoders_of, inner_layers

PROMPT = 16
"""Tokens of the instruction."""
BLOCKS = 4
"""By so many the two models differ whose difference is what a block costs."""
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the full width; 0 is the least."""
CHANNELS = 32
"""Measured numbers of channels are multiples of this, as planned ones are."""
ROUNDS = 30
TIGHTENINGS = 3


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How long a decoder's block of some widths takes, ms.

    Attributes:
        hidden_size: of the decoder, which the times hold for.
        full: widths of the block that both series start from.
        attention: (heads, kv_heads, ms) of a block with `full.ffn` channels.
        ffn: (channels, ms) of a block with the heads of `full`.
    """

    hidden_size: int
    full: LayerWidths
    attention: tuple[tuple[int, int, float], ...]
    ffn: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        full, measured = self.full, {(heads, kv_heads) for heads, kv_heads, _ in self.attention}
        if (full.heads, full.kv_heads) not in measured or full.ffn not in dict(self.ffn):
            raise UserError(f"'attention' and 'ffn' lack the times of a block of {full}")

    def of_heads(self, heads: int, kv_heads: int) -> float:
        """A block of these heads with all channels."""
        full = self.full
        if kv_heads == full.kv_heads:  # fewer query heads in every group
            points = {h: ms for h, kv, ms in self.attention if kv == kv_heads}
        else:
            share = full.heads // full.kv_heads
            points = {h: ms for h, kv, ms in self.attention if h == kv * share}
        return _interpolated(heads, points)

    def of_channels(self, ffn: int) -> float:
        """What so many channels cost beyond all channels: nothing, or below."""
        points = dict(self.ffn)
        return _interpolated(ffn, points) - _interpolated(self.full.ffn, points)

    def of(self, width: LayerWidths) -> float:
        """A block of these widths."""
        return self.of_heads(width.heads, width.kv_heads) + self.of_channels(width.ffn)


@dataclass(frozen=True, kw_only=True)
class BlockLatencies(Blocks):
    """Times measured on one device, ms, for one inference at batch 1.

    Its own blocks are the language model's; in pi0 with a whole block of the expert beside each.

    Attributes:
        device: its name.
        dtype: of weights and arithmetic.
        head_dim: of the decoder, which the times hold for.
        tokens: length of the prompt, images included, and proprioception where it is a token.
        action_tokens: decoded after it; of a chunk its places, of pi0 its actions.
        fixed_ms: towers, projector, head: everything but the blocks.
        kind: of policy.
        engine: that it ran in.
        steps: of flow matching; where there is none, 1.
        expert: blocks of pi0's action expert, in all steps, each with a whole one of the language
            model beside it.
    """

    device: str
    dtype: str
    head_dim: int
    tokens: int
    action_tokens: int
    fixed_ms: float
    kind: Literal["openvla", "openvla-oft", "pi0"] = "openvla"
    engine: str = "unrolled"
    steps: int = 1
    expert: Blocks | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "pi0") != (self.expert is not None):
            raise UserError("'expert' is what a table of kind 'pi0' has, and no other")

    def part(self, name: str) -> Blocks:
        """The blocks of a part: `llm`, `expert`."""
        if name == "llm":
            return self
        assert self.expert is not None
        return self.expert

    @property
    def last_is_idle(self) -> bool:
        """Whether of the last layer only keys and values are computed, at any widths."""
        return self.kind == "pi0" and self.engine == Pi0GraphEngine.name

    def of_layers(self, architecture: ArchitectureConfig) -> list[float]:
        """What each layer takes, in pi0 that of both parts."""
        own = list(architecture.decoder.layers)
        if self.last_is_idle:
            own[-1] = self.full  # as where it was measured
        times = [self.of(width) for width in own]
        if self.expert is None or architecture.expert is None:
            return times
        whole = self.expert.of(self.expert.full)
        others = [self.expert.of(width) - whole for width in architecture.expert.layers]
        return [ms + more for ms, more in zip(times, others, strict=True)]

    def of_policy(self, architecture: ArchitectureConfig) -> float:
        """A whole inference."""
        return self.fixed_ms + sum(self.of_layers(architecture))


@dataclass(frozen=True)
class LatencyCost:
    """Block latencies as what a plan for one part of a policy is kept within.

    Attributes:
        table: the latencies.
        blocks: those of the part.
        fixed: ms of everything but the layers.
        idle: see `Cost`.
        beside: ms that a layer takes at the least besides what its own widths cost: in pi0 those of
            the other part, which goes with it.
        budget: ms.
        slower: so many times what the table says whole plans took.
    """

    table: BlockLatencies
    blocks: Blocks
    fixed: float
    idle: int
    beside: float
    budget: float
    slower: float = 1.0

    def attention(self, heads: int, kv_heads: int) -> float:
        """A block of these heads with all channels, and what is beside it."""
        return self.blocks.of_heads(heads, kv_heads) + self.beside

    def channels(self, ffn: int) -> float:
        """What so many channels cost beyond all channels: nothing, or below."""
        return self.blocks.of_channels(ffn)

    def shortfall(self, least: float) -> str:
        """The budget, and the least that can be reached."""
        what = "an action" if self.table.kind == "openvla" else "a chunk of actions"
        return (
            f"{what} cannot take at most {self.budget:.4g} ms on {self.table.device}, at the "
            f"least about {least * self.slower:.4g} ms"
        )


def latency_cost(
    config: PruneConfig,
    table: BlockLatencies,
    architecture: ArchitectureConfig,
    decoder: DecoderConfig,
    part: str,
    slower: float = 1.0,
) -> LatencyCost:
    """A plan's cost for one part: what the table says of the policy it leaves, or a little more.

    Args:
        config: with the budget.
        table: the latencies.
        architecture: of the policy as it is.
        decoder: the part, as `best_plan` is given it.
        part: which one.
        slower: see `LatencyCost`.
    """
    assert config.max_latency_ms is not None
    blocks, layers = table.part(part), decoder.layers
    own = [blocks.of(width) for width in layers]
    idle = int(table.last_is_idle and part == "llm" and config.protect == 0)
    if idle:  # whichever layer will be the last one takes this
        own[-1] = blocks.of(blocks.full)
    every = table.of_layers(with_layers(architecture, {part: layers}))
    others = [ms - mine for ms, mine in zip(every, own, strict=True)]
    # A layer that goes takes at least so much along; what it takes beyond that counts as staying.
    beside = min(others[i] for i in inner_layers(config, decoder))
    fixed = table.fixed_ms + sum(others) - (len(layers) - idle) * beside + idle * own[-1]
    return LatencyCost(table, blocks, fixed, idle, beside, config.max_latency_ms, slower)


def _interpolated(width: int, points: Mapping[int, float]) -> float:
    widths = sorted(points)
    # What a measurement says to the contrary is noise: a wider block is not faster.
    rising = np.maximum.accumulate([points[w] for w in widths])
    return float(np.interp(width, widths, rising))


def with_layers(
    architecture: ArchitectureConfig, layers: Mapping[str, Sequence[LayerWidths]]
) -> ArchitectureConfig:
    """The architecture with other layers in the parts that are named."""
    found = {part: decoder.layers for part, decoder in decoders_of(architecture).items()}
    found |= {part: tuple(widths) for part, widths in layers.items()}
    expert = architecture.expert and replace(architecture.expert, layers=found["expert"])
    decoder = replace(architecture.decoder, layers=found["llm"])
    return replace(architecture, decoder=decoder, expert=expert)


def left_by(plan: Plan, architecture: ArchitectureConfig, part: str) -> ArchitectureConfig:
    """The architecture that a plan for one part leaves."""
    kept = {
        name: [decoder.layers[i] for i in plan.layers]
        for name, decoder in decoders_of(architecture).items()
    }
    return with_layers(architecture, kept | {part: list(plan.widths)})


def device_name(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = models[0] if models else platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


class Contestant:
    """A model of some architecture with random weights, in its engine and ready to act."""

    def __init__(
        self, architecture: ArchitectureConfig, like: OpenVLA | Pi0, device: torch.device
    ) -> None:
        dtype = compute_dtype(device)
        with torch.device(device):
            model = _fresh(architecture, like).to(dtype).eval()
        model.requires_grad_(False)
        model.rebuild_buffers()
        engine = engines_of(architecture)[usual_engine(architecture, device)](model)
        self._act = engine.chunk if isinstance(engine, ChunkEngine) else engine.bins
        self._device, cameras, joints = device, architecture.images, architecture.proprioception
        size = (architecture.towers[0].image_size,) * 2
        if engine.takes_bytes:
            pixels = torch.zeros(1, cameras, *size, 3, dtype=torch.uint8)
        elif architecture.expert is not None:
            pixels = torch.zeros(1, cameras, 3, *size)
        else:
            pixels = torch.zeros(1, 3 * len(architecture.towers) * cameras, *size)
        inputs = Inputs(
            torch.ones(1, PROMPT, dtype=torch.long),
            None,
            pixels,
            torch.zeros(1, joints) if joints else None,
        )
        self._inputs = inputs if engine.takes_bytes else inputs.to(device, dtype)

    def milliseconds(self) -> float:
        """Time of an inference; on a single thread of a CPU, without waiting for other programs."""
        alone = self._device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        start = clock()
        self._act(self._inputs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (clock() - start) * 1e3


def _fresh(architecture: ArchitectureConfig, like: OpenVLA | Pi0) -> OpenVLA | Pi0:
    """A model of the same kind."""
    if isinstance(like, Pi0):
        return Pi0(architecture)
    if isinstance(like, OpenVLAOFT):
        return OpenVLAOFT(architecture, like.n_bins)
    return OpenVLA(architecture, like.n_bins, like.action_tokens)


def times(builders: Sequence[Callable[[], Contestant]]) -> Any:
    """(ROUNDS, builders) times in ms of several, which all act in every round."""
    contestants = [build() for build in builders]
    return np.array([[c.milliseconds() for c in contestants] for _ in range(3 + ROUNDS)])[3:]


def measure(model: OpenVLA | Pi0, device: torch.device) -> BlockLatencies:
    """Measure blocks up to the widest of the model's layers."""
    config, decoders = model.config, decoders_of(model.config)
    widest = {part: _widest(decoder.layers) for part, decoder in decoders.items()}
    heads = {part: _heads(full, config.expert is None) for part, full in widest.items()}
    channels = {part: _channels(full.ffn) for part, full in widest.items()}
    # The towers cost the same in every model: blind ones of as many patches stand in for them.
    blind = tuple(replace(t, width=32, depth=2, heads=2, ffn=64) for t in config.towers)
    total = sum(len(heads[part]) + len(channels[part]) for part in widest)
    progress = tqdm(total=total, desc="block latencies", unit="width")

    def contestant(
        towers: tuple[TowerConfig, ...], widths: Mapping[str, LayerWidths], count: int
    ) -> Callable[[], Contestant]:
        layers = {part: [width] * count for part, width in widths.items()}
        architecture = with_layers(replace(config, towers=towers), layers)
        return lambda: Contestant(architecture, model, device)

    def of_block(part: str, width: LayerWidths) -> float:
        widths = widest | {part: width}
        # The fastest round is the one that nothing else on the machine disturbed.
        one, more = times([contestant(blind, widths, n) for n in (1, 1 + BLOCKS)]).min(0)
        progress.update()
        return float(more - one) / BLOCKS

    def blocks_of(part: str, hidden_size: int) -> Blocks:
        full = widest[part]
        attention = [(h, kv, of_block(part, LayerWidths(h, kv, full.ffn))) for h, kv in heads[part]]
        ffn = [(n, of_block(part, replace(full, ffn=n))) for n in channels[part]]
        return Blocks(
            hidden_size=hidden_size, full=full, attention=tuple(attention), ffn=tuple(ffn)
        )

    blocks = {part: blocks_of(part, decoder.hidden_size) for part, decoder in decoders.items()}
    progress.close()
    table = BlockLatencies(
        **vars(blocks["llm"]),
        **shape_of(model),
        expert=blocks.get("expert"),
        device=device_name(device),
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        engine=usual_engine(config, device),
        fixed_ms=0.0,
    )
    whole = float(times([contestant(config.towers, widest, 2)]).min())
    two = with_layers(config, {part: [width] * 2 for part, width in widest.items()})
    return replace(table, fixed_ms=whole - table.of_policy(two))


def _widest(layers: Sequence[LayerWidths]) -> LayerWidths:
    """As wide as each of them."""
    kv_heads, share = max(w.kv_heads for w in layers), max(w.heads // w.kv_heads for w in layers)
    return LayerWidths(share * kv_heads, kv_heads, max(w.ffn for w in layers))


def _heads(full: LayerWidths, groups: bool) -> list[tuple[int, int]]:
    """(heads, kv_heads) to measure; `groups`: whether key-value heads may go."""
    share = full.heads // full.kv_heads
    # With a single key-value head, or few, the query heads in a group are what varies.
    found = {(max(1, round(s * share)) * full.kv_heads, full.kv_heads) for s in SHARES}
    if groups:
        kv = {max(1, round(s * full.kv_heads)) for s in SHARES}
        found |= {(n * share, n) for n in kv}
    return sorted(found)


def _channels(full: int) -> list[int]:
    """Numbers of feed-forward channels to measure."""
    rounded = {max(1, round(s * full / CHANNELS)) * CHANNELS for s in SHARES}
    return sorted({min(n, full) for n in rounded} | {full})


def shape_of(model: OpenVLA | Pi0) -> dict[str, Any]:
    """What times hold for, beside the sizes of blocks."""
    config, expert = model.config, model.config.expert
    if isinstance(model, Pi0):
        assert expert is not None
        kind, tokens, steps = "pi0", expert.chunk, expert.steps
    else:
        kind = "openvla" if config.action_head is None else "openvla-oft"
        tokens, steps = model.action_tokens, 1
    return {
        "kind": kind,
        "head_dim": config.decoder.head_dim,
        "tokens": PROMPT + config.context,
        "action_tokens": tokens,
        "steps": steps,
    }


def median(architecture: ArchitectureConfig, like: OpenVLA | Pi0, device: torch.device) -> float:
    """Median time of a whole inference of an architecture, ms."""
    return float(np.median(times([lambda: Contestant(architecture, like, device)])))


def latency_plan(
    config: PruneConfig,
    model: OpenVLA | Pi0,
    decoder: DecoderConfig,
    scores: Sequence[GroupScores],
    part: str = "llm",
) -> Plan:
    """The plan that keeps the most importance and meets the latency budget.

    Args:
        config: with the budget and the device.
        model: the policy.
        decoder: what is planned for, as `best_plan` takes it, as are the scores.
        scores: of its layers.
        part: which of the policy it is: `llm`, of pi0 also `expert`.

    Raises:
        UserError: no plan meets it, with the least that can be reached; the file of latencies is
            of another architecture; or the device is not here.
    """
    assert config.latency_of is not None and config.max_latency_ms is not None
    budget = config.max_latency_ms

    def estimated(table: BlockLatencies, slower: float = 1.0) -> Plan:
        """The best plan within the budget, taking so many times what the table says."""
        cost = latency_cost(config, table, model.config, decoder, part, slower)
        plan = best_plan(config, decoder, scores, cost, budget / slower)
        predicted = table.of_policy(left_by(plan, model.config, part))
        latency = {"device": table.device, "budget_ms": budget, "predicted_ms": predicted}
        return replace(plan, latency=latency)

    if Path(config.latency_of).suffix == ".json":
        return estimated(read_table(Path(config.latency_of), model))
    device, threads = pick_device(config.latency_of), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as policies are measured everywhere else
    try:
        table, slower = measure(model, device), 1.0
        for _ in range(TIGHTENINGS):
            plan = estimated(table, slower)
            measured = median(left_by(plan, model.config, part), model, device)
            assert plan.latency is not None
            if measured <= budget:
                return replace(plan, latency=plan.latency | {"measured_ms": measured})
            slower = measured / (0.99 * plan.latency["predicted_ms"])
    finally:
        torch.set_num_threads(threads)
    raise UserError(
        f"prune: plans that should take {budget:.4g} ms took {measured:.4g} ms on {table.device}; "
        "is something else running there? Allow more, or try again"
    )


def read_table(path: Path, model: OpenVLA | Pi0) -> BlockLatencies:
    """Latencies measured before, perhaps on another machine.

    Raises:
        UserError: it is no such file, or was made with another architecture, or a narrower one.
    """
    table = from_dict(BlockLatencies, read_json(path), str(path))

    def compare(name: str, measured: Any, value: Any) -> None:
        if measured != value:
            raise UserError(f"{path}: measured with {name} {measured}, the policy has {value}")

    for name, value in shape_of(model).items():
        compare(name, getattr(table, name), value)
    for part, decoder in decoders_of(model.config).items():
        blocks, of = table.part(part), "" if part == "llm" else f"{part}."
        compare(f"{of}hidden_size", blocks.hidden_size, decoder.hidden_size)
        if _widest([blocks.full, *decoder.layers]) != blocks.full:
            raise UserError(
                f"{path}: layers of the {part} were measured up to {blocks.full}, the policy's go "
                f"up to {_widest(decoder.layers)}"
            )
    return table


def main() -> None:
    """Measure on this machine and write the table."""
    parser = argparse.ArgumentParser(description="Measure decoder blocks of different widths.")
    parser.add_argument("policy", help="bundle directory, or the short name of a shipped bundle")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="the table, JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        config = open_bundle(arguments.policy).config
        with torch.device("meta"):
            model = build_model(config)
        table = measure(model, pick_device(arguments.device))
        write_atomically(arguments.out, json.dumps(asdict(table), indent=1) + "\n")
    except UserError as error:
        sys.exit(f"training.latency: {error}")
    print(json.dumps(asdict(table), indent=1))


if __name__ == "__main__":
    main()
