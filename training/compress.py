"""The whole pipeline, stage by stage, resumable after a kill at any point.

    rlrc compress config/training/tabletop.yaml --out runs/tabletop

Every stage leaves one directory, written under a temporary name and renamed when it is whole: what
is there is done, what is not is made. Inside a stage, training goes on from its last checkpoint.

    demonstrations/                                          shards
    original/ pruned/ recovered/ rl-seed-N/ compressed/      bundles
    work/STAGE/                                              logs, checkpoints, corrections
    evaluation/NAME.jsonl                                    one line an episode
    summary.json                                             every stage's numbers
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.vla.bundle import Bundle, open_bundle
from training import prune, quantize, rl, sft
from training.bundles import Trainable, load_trainable, new_trainable
from training.common import pick_device, seed_everything
from training.config import CompressConfig
from training.data.collect import collect_demonstrations
from training.data.demonstrations import read
from training.evaluate import Evaluation, evaluate, summarise

Say = Callable[[str], None]


class Pipeline:
    """One run in one directory.

    Args:
        config: what to do.
        out: the run's directory; refused when it holds a run of another configuration.
        device: where to train.
        say: takes one line for people at the start of each stage.
    """

    def __init__(self, config: CompressConfig, out: Path, device: str | None, say: Say) -> None:
        self.config, self.out, self.say = config, out, say
        self.device = pick_device(device)
        self._latency = config.demonstrations.latency
        out.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        """Note the configuration, or check that it is the one this directory was made with."""
        file, text = self.out / "config.json", json.dumps(asdict(self.config), indent=1)
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, file)
        elif file.read_text() != text:
            raise UserError(
                f"{self.out}: holds a run of another configuration; name another directory, or "
                "delete it"
            )

    def run(self) -> dict[str, Any]:
        """Make what is missing; returns what `summary.json` holds."""
        config = self.config
        self._demonstrations()
        self._bundle("original", None, self._sft_original, dtype="bfloat16")
        self._bundle("pruned", "original", self._prune)
        self._bundle("recovered", "pruned", self._recover)
        for seed in config.rl.seeds:
            self._bundle(
                f"rl-seed-{seed}", "recovered", lambda trainable, s=seed: self._rl(trainable, s)
            )
        first = f"rl-seed-{config.rl.seeds[0]}"
        self._bundle(
            "compressed", first, lambda t: quantize.run(config.quantize, t), dtype="bfloat16"
        )
        return self._summary()

    @property
    def bundles(self) -> list[str]:
        """Names of the bundles, in the order they are made."""
        seeds = [f"rl-seed-{seed}" for seed in self.config.rl.seeds]
        return ["original", "pruned", "recovered", *seeds, "compressed"]

    def _demonstrations(self) -> None:
        place, config = self.out / "demonstrations", self.config.demonstrations
        self.say(f"demonstrations: {config.episodes} episodes of the scripted expert")
        collect_demonstrations(place, config)

    def _data(self, *stages: str) -> list[Path]:
        """The demonstrations, and the corrections that some stages collected."""
        corrections = [
            p for s in stages for p in sorted((self.out / "work" / s).glob("corrections-?"))
        ]
        return [self.out / "demonstrations", *corrections]

    def _bundle(
        self,
        name: str,
        parent: str | None,
        stage: Callable[[Trainable], dict[str, Any]],
        dtype: Any = "float32",
    ) -> None:
        """Make one bundle and evaluate it, whichever of the two is missing."""
        place = self.out / name
        if not place.exists():
            self.say(f"{name}: {'from ' + parent if parent else 'a new policy'}, on {self.device}")
            seed_everything(self.config.seed)
            if parent:
                trainable = load_trainable(self.out / parent, self.device)
            else:
                trainable = new_trainable(self.config.model, read(self._data()), self.device)
            facts = stage(trainable)
            trainable.save(place, name, dtype, **facts)
            shutil.rmtree(self.out / "work" / name / "checkpoint", ignore_errors=True)
        self._evaluate(name)

    def _evaluate(self, name: str) -> list[Any]:
        config = self.config.evaluate
        task = Evaluation(policy=self.out / name, episodes=config.episodes, seed=config.first_seed)
        return evaluate(task, str(self.device), log=self.out / "evaluation" / f"{name}.jsonl")

    def _sft_original(self, trainable: Trainable) -> dict[str, Any]:
        return self._sft(self.config.sft, trainable, "original", self._data())

    def _recover(self, trainable: Trainable) -> dict[str, Any]:
        return self._sft(self.config.recovery, trainable, "recovered", self._data("original"))

    def _sft(
        self, config: Any, trainable: Trainable, name: str, data: list[Path]
    ) -> dict[str, Any]:
        work = self.out / "work" / name
        return sft.run(
            config,
            trainable,
            data,
            seed=self.config.seed,
            device=self.device,
            work=work,
            latency=self._latency,
        )

    def _prune(self, trainable: Trainable) -> dict[str, Any]:
        data = self._data("original")
        return prune.run(
            self.config.prune, trainable, data, seed=self.config.seed, device=self.device
        )

    def _rl(self, trainable: Trainable, seed: int) -> dict[str, Any]:
        data, work = self._data("original", "recovered"), self.out / "work" / f"rl-seed-{seed}"
        return rl.run(
            self.config.rl,
            trainable,
            data,
            seed=seed,
            device=self.device,
            work=work,
            latency=self._latency,
        )

    def _summary(self) -> dict[str, Any]:
        stages = []
        for name in self.bundles:
            bundle = open_bundle(self.out / name)
            stages.append(
                {
                    "name": name,
                    "hash": bundle.hash,
                    **_sizes(bundle),
                    **summarise(self._evaluate(name)),
                }
            )
        summary = {"stages": stages}
        partial = self.out / "summary.partial"
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        os.replace(partial, self.out / "summary.json")
        return summary


def _sizes(bundle: Bundle) -> dict[str, Any]:
    return {"bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir())}
