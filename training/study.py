"""An empirical study of compression: method × ratio × quantization, each cell made and judged.

    rlrc study config/study/tabletop.yaml --out runs/study

Every cell is pruned, recovered if the study says so, quantized, evaluated in every environment on
the same scenes as all others, and timed beside the original. Resumable cell by cell, and inside a
cell episode by episode.

    demonstrations/          for calibration and recovery
    bundles/CELL/            the policies
    evaluation/CELL-ENV.jsonl
    cells/CELL.json          all that is known of a cell; what is there is done
    study.csv table.txt findings.txt summary.json *.svg
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.timing import INSTRUCTION, interleaved, percentiles, ratio_interval
from rlrc_ros.vla.bundle import open_bundle, resolve
from rlrc_ros.vla.policy import load_policy
from training import prune, quantize, sft
from training.bundles import Trainable, load_trainable
from training.common import claim, forget_checkpoints, pick_device, seed_everything
from training.config import PruneConfig, stated
from training.data.batches import DemonstrationBatches
from training.data.collect import collect_demonstrations
from training.evaluate import Evaluation, evaluate, summarise
from training.sparsify import sparsify, zeros, zeros_held
from training.study_config import Cell, EnvironmentConfig, StudyConfig, slug
from training.study_report import write_report

Say = Callable[[str], None]


class Study:
    """One study in one directory.

    Args:
        config: what to do.
        out: the study's directory; refused when it holds another study.
        device: where to prune, recover, evaluate and time.
        demonstrations: directories of recorded ones; recorded here where none are given.
        workers: of the evaluation, as `evaluate` takes them.
        say: takes one line for people at the start of each cell.

    Raises:
        UserError: the directory holds another study; the policy is damaged or quantized.
    """

    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        device: str | None,
        say: Say,
        *,
        demonstrations: list[Path] | None = None,
        workers: int | None = None,
    ) -> None:
        self.config, self.out, self.say, self.workers = config, out, say, workers
        self.device = pick_device(device)
        self._policy = resolve(config.policy)
        bundle = open_bundle(self._policy)
        if bundle.config.quantization:
            raise UserError(f"{bundle.path}: is quantized; study its parent instead")
        self._places = demonstrations or []
        self._held: DemonstrationBatches | None = None
        claim(out, {**stated(config), "policy": bundle.hash, "device": self.device.type})
        for name in ("cells", "bundles", "evaluation", "work"):
            (out / name).mkdir(exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Do what is missing, and report on everything; returns what `summary.json` holds."""
        cells = self.config.cells
        results = []
        for number, cell in enumerate(cells, 1):
            file = self.out / "cells" / f"{cell.name}.json"
            if not file.exists():
                self.say(f"{number} of {len(cells)}: {cell.name}")
                write_atomically(file, json.dumps(self._result(cell)) + "\n")
            results.append(json.loads(file.read_text()))
        return write_report(self.out, results)

    def _result(self, cell: Cell) -> dict[str, Any]:
        """Make one policy and find out all about it."""
        facts: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method.name if cell.method else "original",
            "kind": cell.kind,
            "ratio": cell.ratio,
            "quantization": cell.quantization,
        }
        try:
            policy = self._bundle(cell)
        except UserError as error:
            if cell.kind != "structured":
                raise
            return {**facts, "unreachable": str(error)}  # of this ratio, by this granularity
        facts |= self._made(policy)
        facts |= self._times(policy)
        facts["environments"] = {
            place.name: self._judge(cell, policy, place) for place in self.config.environments
        }
        return facts

    def _bundle(self, cell: Cell) -> Path:
        """The cell's policy, made if need be."""
        pruned = self._policy
        if cell.method is not None:
            pruned = self.out / "bundles" / cell.pruned
            if not pruned.exists():
                self._prune(cell, pruned)
        wanted = cell.quantization_config(self.config)
        if wanted is None:
            return pruned
        place = self.out / "bundles" / cell.name
        if not place.exists():
            policy = quantize.load_quantized(pruned, wanted, self.device)
            policy.save(place, "compressed", **quantize.facts(policy))
        return place

    def _prune(self, cell: Cell, place: Path) -> None:
        """Prune and recover."""
        config = self.config
        how = cell.prune_config(config)
        seed_everything(config.seed)
        trainable = load_trainable(self._policy, self.device)
        batches = self._batches(trainable)
        held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(how, PruneConfig):
            facts = prune.run(how, trainable, batches, seed=config.seed)
        else:
            assert how is not None
            sparsify(trainable.model, batches, how)
            facts, held = asdict(how), zeros_held(trainable.model)
        if config.recovery:
            with held:
                facts["recovery"] = sft.run(
                    config.recovery,
                    trainable,
                    batches,
                    seed=config.seed,
                    device=self.device,
                    work=self.out / "work" / cell.pruned,
                    latency=config.demonstrations.latency,
                )
        trainable.save(place, "pruned", **facts, **zeros(trainable.model))
        forget_checkpoints(self.out / "work" / cell.pruned)

    def _batches(self, trainable: Trainable) -> DemonstrationBatches:
        """The demonstrations, recorded if need be."""
        # What one policy is corrected on in its recovery is not for the others.
        if self._held is None or (self.config.recovery and self.config.recovery.corrections):
            self._held = DemonstrationBatches(trainable.processor, trainable.codec, self.device)
        if not self._places:
            self.say(f"{self.config.demonstrations.episodes} demonstrations")
            self._places = [self.out / "demonstrations"]
            collect_demonstrations(self._places[0], self.config.demonstrations)
        for place in self._places:
            self._held.take(place)
        return self._held

    def _made(self, policy: Path) -> dict[str, Any]:
        """What pruning took away: shares of layers and LLM."""
        stages = open_bundle(policy).provenance["stages"]
        keys = ("removed_of_layers", "removed_of_llm", "zeros_of_layers", "zeros_of_llm")
        made: dict[str, Any] = next(
            (stage for stage in stages[::-1] if "zeros_of_layers" in stage), {}
        )
        return {key: made.get(key, 0.0) for key in keys}

    def _judge(self, cell: Cell, policy: Path, place: EnvironmentConfig) -> dict[str, Any]:
        """Success in one environment, episode by episode."""
        task = Evaluation(
            policy=policy, episodes=place.episodes, seed=place.first_seed, latency=place.latency
        )
        log = self.out / "evaluation" / f"{cell.name}-{slug(place.name)}.jsonl"
        results = evaluate(task, str(self.device), self.workers, log)
        return {**summarise(results), "success": [result.success for result in results]}

    def _times(self, policy: Path) -> dict[str, Any]:
        """Latency of single actions, beside the original's in every round, and memory."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            both = [load_policy(path, str(self.device)) for path in (self._policy, policy)]
            times = list(interleaved(both, INSTRUCTION, self.config.latency_rounds))
        finally:
            torch.set_num_threads(threads)
        original, own = np.array(times).T.tolist()
        p50, p99 = percentiles(own)
        held = [p.weight_bytes() for p in both]
        return {
            "device": str(self.device),
            "engine": both[1].engine.name,
            "latency_ms": {"p50": p50, "p99": p99},
            "latency_of_original": float(p50 / np.median(original)),
            "latency_of_original_ci95": list(ratio_interval(own, original)),
            "memory_bytes": {name: held[1][name] for name in ("llm", "total")},
            "memory_of_original": {
                name: held[1][name] / held[0][name] for name in ("llm", "total")
            },
        }
