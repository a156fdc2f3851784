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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlrc_ros.files import write_atomically
from rlrc_ros.vla.inspection import inspect
from training import prune, quantize, rl, sft
from training.bundles import Trainable, load_trainable, new_trainable
from training.common import claim, forget_checkpoints, pick_device, seed_everything
from training.config import CompressConfig, stated
from training.data.collect import collect_demonstrations
from training.data.demonstrations import Demonstrations, join, read
from training.evaluate import EpisodeResult, Evaluation, evaluate, summarise

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
        self._read: dict[Path, Demonstrations] = {}
        self._joined: tuple[list[Path], Any] = ([], None)
        claim(out, stated(config))

    def run(self, evaluate_too: bool = True) -> dict[str, Any]:
        """Make what is missing; returns what `summary.json` holds.

        evaluate_too: False leaves evaluation to a later run, perhaps on another machine.
        """
        config = self.config
        self._bundle("original", None, self._sft_original)
        self._bundle("pruned", "original", self._prune)
        self._bundle("recovered", "pruned", self._recover)
        for seed in config.rl.seeds:
            self._bundle(f"rl-seed-{seed}", "recovered", partial(self._rl, seed=seed))
        quantized = partial(quantize.run, config.quantize)
        self._bundle("compressed", f"rl-seed-{config.rl.seeds[0]}", quantized)
        return self._summary(evaluate_too)

    @property
    def bundles(self) -> list[str]:
        """Names of the bundles, in the order they are made."""
        seeds = [f"rl-seed-{seed}" for seed in self.config.rl.seeds]
        return ["original", "pruned", "recovered", *seeds, "compressed"]

    def _data(self, *stages: str) -> Demonstrations:
        """The demonstrations, recorded if need be, and the corrections that stages collected."""
        place, wanted = self.out / "demonstrations", self.config.demonstrations
        if place not in self._read:
            self.say(f"demonstrations: {wanted.episodes} episodes of the scripted expert")
            collect_demonstrations(place, wanted)
        works = [self.out / "work" / stage for stage in stages]
        places = [place, *(found for work in works for found in sorted(work.glob("corrections-?")))]
        for place in places:
            if place not in self._read:
                self._read[place] = read(place)
        if self._joined[0] != places:  # most stages want the same, and joining copies it all
            self._joined = places, join([self._read[place] for place in places])
        return self._joined[1]

    def _bundle(
        self, name: str, parent: str | None, stage: Callable[[Trainable], dict[str, Any]]
    ) -> None:
        """Make one bundle, unless it is there."""
        place = self.out / name
        if place.exists():
            forget_checkpoints(self.out / "work" / name)
            return
        self.say(f"{name}: {'from ' + parent if parent else 'a new policy'}, on {self.device}")
        seed_everything(self.config.seed)
        if parent:
            trainable = load_trainable(self.out / parent, self.device)
        else:
            trainable = new_trainable(self.config.model, self._data(), self.device)
        facts = stage(trainable)
        trainable.save(place, name, **facts)
        forget_checkpoints(self.out / "work" / name)

    def _evaluate(self, name: str) -> list[EpisodeResult]:
        config = self.config.evaluate
        task = Evaluation(policy=self.out / name, episodes=config.episodes, seed=config.first_seed)
        return evaluate(task, str(self.device), log=self.out / "evaluation" / f"{name}.jsonl")

    def _sft_original(self, trainable: Trainable) -> dict[str, Any]:
        return self._sft(self.config.sft, trainable, "original", self._data())

    def _recover(self, trainable: Trainable) -> dict[str, Any]:
        return self._sft(self.config.recovery, trainable, "recovered", self._data("original"))

    def _sft(
        self, config: Any, trainable: Trainable, name: str, data: Demonstrations
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
        return rl.run(
            self.config.rl,
            trainable,
            self._data("original", "recovered"),
            seed=seed,
            device=self.device,
            work=self.out / "work" / f"rl-seed-{seed}",
            latency=self._latency,
        )

    def _summary(self, evaluate_too: bool) -> dict[str, Any]:
        stages = []
        for name in self.bundles:
            stage = inspect(self.out / name)
            if evaluate_too:
                self.say(f"evaluation of {name}")
                stage |= summarise(self._evaluate(name))
            stages.append(stage)
        summary = {"stages": stages}
        write_atomically(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary
