"""How long decoder blocks of different widths take, and plans that meet a latency budget.

    python -m training.latency POLICY --device cuda --out jetson.json

Run where the policy is to run; the file goes into the pruning's configuration as `latency_of`.
Measured is a whole action at batch 1, fused and on a GPU in one CUDA graph, with random weights:
models of one block and of several, so that their difference is what a block costs. A block's
attention and feed-forward are taken to add up, and between measured widths the time is interpolated
linearly; the plan itself is then measured whole, and tightened where the estimate was too low.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.schema import from_dict, read_json
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.config import ArchitectureConfig, LayerWidths
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from training.common import pick_device
from training.config import PruneConfig
from training.importance import GroupScores
from training.planning import Plan, best_plan
from training.rollout import Decoder

PROMPT = 16
"""Tokens of the instruction."""
BLOCKS = 4
"""By so many the two models differ whose difference is what a block costs."""
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the full width; 0 is the least."""
ROUNDS = 30
TIGHTENINGS = 3


@dataclass(frozen=True, kw_only=True)
class BlockLatencies:
    """Times measured on one device, ms, for one action at batch 1.

    Attributes:
        device: its name.
        dtype: of weights and arithmetic.
        hidden_size: of the decoder, which the times hold for.
        head_dim: the same.
        tokens: length of the prompt, image and proprioception included.
        action_tokens: decoded after it.
        fixed_ms: towers, projector, head: everything but the blocks.
        full: widths of the block that both series start from.
        attention: (heads, kv_heads, ms) of a block with `full.ffn` channels.
        ffn: (channels, ms) of a block with the heads of `full`.
    """

    device: str
    dtype: str
    hidden_size: int
    head_dim: int
    tokens: int
    action_tokens: int
    fixed_ms: float
    full: LayerWidths
    attention: tuple[tuple[int, int, float], ...]
    ffn: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LatencyCost:
    """Block latencies as what a plan is kept within."""

    table: BlockLatencies
    budget: float

    @property
    def fixed(self) -> float:
        """Everything but the blocks."""
        return self.table.fixed_ms

    def attention(self, heads: int, kv_heads: int) -> float:
        """A block of these heads with all channels."""
        full = self.table.full
        if kv_heads == full.kv_heads:  # fewer query heads in every group
            points = {h: ms for h, kv, ms in self.table.attention if kv == kv_heads}
        else:
            share = full.heads // full.kv_heads
            points = {h: ms for h, kv, ms in self.table.attention if h == kv * share}
        return _interpolated(heads, points)

    def channels(self, ffn: int) -> float:
        """What so many channels cost beyond all channels: nothing, or below."""
        points = dict(self.table.ffn)
        return _interpolated(ffn, points) - _interpolated(self.table.full.ffn, points)

    def of(self, layers: Sequence[LayerWidths]) -> float:
        """An action of a decoder of these layers."""
        return self.fixed + sum(
            self.attention(w.heads, w.kv_heads) + self.channels(w.ffn) for w in layers
        )

    def shortfall(self, least: float) -> str:
        """The budget, and the least that can be reached."""
        return (
            f"an action cannot take at most {self.budget:.4g} ms on {self.table.device}, at the "
            f"least about {least:.4g} ms"
        )


def _interpolated(width: int, points: Mapping[int, float]) -> float:
    widths = sorted(points)
    # What a measurement says to the contrary is noise: a wider block is not faster.
    rising = np.maximum.accumulate([points[w] for w in widths])
    return float(np.interp(width, widths, rising))


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
    """A model of some architecture with random weights, ready to act."""

    def __init__(
        self, architecture: ArchitectureConfig, like: OpenVLA, device: torch.device
    ) -> None:
        dtype = working_dtype(device)
        with torch.device(device):
            model = OpenVLA(architecture, like.n_bins, like.action_tokens).to(dtype).eval()
        model.requires_grad_(False)
        model.rebuild_buffers()
        self._decoder, tower = Decoder(model, 1), architecture.towers[0]
        self._device, pixels = device, tower.image_size
        joints = architecture.proprioception
        self._inputs = Inputs(
            torch.ones(1, PROMPT, dtype=torch.long),
            None,
            torch.zeros(1, 3 * len(architecture.towers), pixels, pixels),
            torch.zeros(1, joints) if joints else None,
        ).to(device, dtype)

    def milliseconds(self) -> float:
        """Time of one action; on a single thread of a CPU, without waiting for other programs."""
        alone = self._device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        start = clock()
        self._decoder(self._inputs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (clock() - start) * 1e3


def working_dtype(device: torch.device) -> torch.dtype:
    """What a policy runs in on a device unless told otherwise."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def times(builders: Sequence[Callable[[], Contestant]], rounds: int = ROUNDS) -> Any:
    """(rounds, builders) times in ms of several, which all act in every round."""
    contestants = [build() for build in builders]
    return np.array([[c.milliseconds() for c in contestants] for _ in range(3 + rounds)])[3:]


def measure(model: OpenVLA, device: torch.device, rounds: int = ROUNDS) -> BlockLatencies:
    """Measure blocks up to the widths of the model's second layer.

    Raises:
        UserError: the policy gives chunks: what is measured here decodes tokens.
    """
    if model.config.action_head is not None:
        raise UserError(
            "prune: latency budgets are for policies that decode action tokens, and this one gives "
            "chunks in one pass; give remove_of_llm or max_bytes instead"
        )
    decoder = model.config.decoder
    full = decoder.layers[min(1, len(decoder.layers) - 1)]
    per_group = full.heads // full.kv_heads
    # The towers cost the same in every model: blind ones of as many patches stand in for them.
    blind = tuple(
        replace(tower, kind="vit", width=8, depth=1, heads=1, ffn=8)
        for tower in model.config.towers
    )

    def contestant(layers: Sequence[LayerWidths], seeing: bool = False) -> Callable[[], Contestant]:
        towers = model.config.towers if seeing else blind
        return lambda: Contestant(
            replace(model.config, towers=towers, decoder=replace(decoder, layers=tuple(layers))),
            model,
            device,
        )

    def of_block(width: LayerWidths) -> float:
        # The fastest round is the one that nothing else on the machine disturbed.
        one, more = times([contestant([width] * n) for n in (1, 1 + BLOCKS)], rounds).min(0)
        return float(more - one) / BLOCKS

    kv = sorted({max(1, round(share * full.kv_heads)) for share in SHARES})
    # With a single key-value head, or few, the query heads in a group are what varies.
    heads = {(n * per_group, n) for n in kv}
    heads |= {(max(1, round(s * per_group)) * full.kv_heads, full.kv_heads) for s in SHARES}
    channels = sorted({max(1, round(share * full.ffn)) for share in SHARES})
    steps = tqdm(total=len(heads) + len(channels), desc="block latencies", unit="width")
    attention, ffn = [], []
    for query, keys in sorted(heads):
        attention.append((query, keys, of_block(LayerWidths(query, keys, full.ffn))))
        steps.update()
    for width in channels:
        ffn.append((width, of_block(LayerWidths(full.heads, full.kv_heads, width))))
        steps.update()
    steps.close()
    whole = float(times([contestant([full] * 2, seeing=True)], rounds).min())
    return BlockLatencies(
        device=device_name(device),
        dtype=str(working_dtype(device)).removeprefix("torch."),
        hidden_size=decoder.hidden_size,
        head_dim=decoder.head_dim,
        tokens=PROMPT + model.config.towers[0].patches + bool(model.config.proprioception),
        action_tokens=model.action_tokens,
        fixed_ms=whole - 2 * dict(ffn)[full.ffn],
        full=full,
        attention=tuple(attention),
        ffn=tuple(ffn),
    )


def median(architecture: ArchitectureConfig, like: OpenVLA, device: torch.device) -> float:
    """Median time of a whole action of an architecture, ms."""
    return float(np.median(times([lambda: Contestant(architecture, like, device)])))


def latency_plan(config: PruneConfig, model: OpenVLA, scores: Sequence[GroupScores]) -> Plan:
    """The plan that keeps the most importance and meets the latency budget.

    Raises:
        UserError: no plan meets it, with the least that can be reached; the file of latencies is
            of another architecture; or the device is not here.
    """
    assert config.latency_of is not None
    if Path(config.latency_of).suffix == ".json":
        table = read_table(Path(config.latency_of), model)
        return _estimated_plan(config, model, scores, table)
    device, threads = pick_device(config.latency_of), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as policies are measured everywhere else
    try:
        return _measured_plan(config, model, scores, device)
    finally:
        torch.set_num_threads(threads)


def _estimated_plan(
    config: PruneConfig,
    model: OpenVLA,
    scores: Sequence[GroupScores],
    table: BlockLatencies,
    allowed: float = math.inf,
) -> Plan:
    """The best plan that the table lets expect to take `allowed` ms, or the budget if less."""
    assert config.max_latency_ms is not None
    budget, decoder = config.max_latency_ms, model.config.decoder
    cost = LatencyCost(table, budget)
    plan = best_plan(config, decoder, scores, cost, min(allowed, budget))
    predicted = cost.of(plan.widths)
    latency = {"device": table.device, "budget_ms": budget, "predicted_ms": predicted}
    return replace(plan, latency=latency)


def _measured_plan(
    config: PruneConfig, model: OpenVLA, scores: Sequence[GroupScores], device: torch.device
) -> Plan:
    """The same on a device that is here, so that the plan itself can be measured."""
    table, allowed = measure(model, device), math.inf
    for _ in range(TIGHTENINGS):
        plan = _estimated_plan(config, model, scores, table, allowed)
        assert plan.latency is not None
        decoder = replace(model.config.decoder, layers=plan.widths)
        measured = median(replace(model.config, decoder=decoder), model, device)
        if measured <= (budget := plan.latency["budget_ms"]):
            return replace(plan, latency=plan.latency | {"measured_ms": measured})
        allowed = min(allowed, budget) * 0.99 * budget / measured
    raise UserError(
        f"prune: plans that should take {budget:.4g} ms took {measured:.4g} ms on {table.device}; "
        "is something else running there? Allow more, or try again"
    )


def read_table(path: Path, model: OpenVLA) -> BlockLatencies:
    """Latencies measured before, perhaps on another machine.

    Raises:
        UserError: it is no such file, or was made with another architecture.
    """
    table = from_dict(BlockLatencies, read_json(path), str(path))
    decoder = model.config.decoder
    shape = {"hidden_size": decoder.hidden_size, "head_dim": decoder.head_dim}
    shape |= {"action_tokens": model.action_tokens}
    for name, value in shape.items():
        if getattr(table, name) != value:
            raise UserError(
                f"{path}: measured with {name} {getattr(table, name)}, the policy has {value}"
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
            codec = config.action_codec
            model = OpenVLA(config.architecture, codec.n_bins, codec.dimensions)
        table = measure(model, pick_device(arguments.device))
        write_atomically(arguments.out, json.dumps(asdict(table), indent=1) + "\n")
    except UserError as error:
        sys.exit(f"training.latency: {error}")
    print(json.dumps(asdict(table), indent=1))


if __name__ == "__main__":
    main()
