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

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.vla.inspection import inspect
from rlrc_ros.vla.openvla import OpenVLA
from training import flow, prune, prune_pi0, quantize, rl, sft
from training.bundles import Trainable, load_trainable, new_trainable
from training.common import claim, forget_checkpoints, pick_device, seed_everything
from training.config import CompressConfig, SftConfig, stated
from training.data.batches import DemonstrationBatches
from training.data.collect import collect_demonstrations
from training.data.demonstrations import read_proprioception
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
        if config.model.chunk:
            raise UserError(
                "compress: its PPO takes probabilities, and with model.chunk there are none; run "
                "sft, prune, sft and quantize one after another"
            )
        self._pi0 = config.model.expert is not None
        if self._pi0:
            flow.refuse_tokens_options(config.sft)
            flow.refuse_tokens_options(config.recovery)
            prune_pi0.refuse_what_pi0_has_not(config.prune)
        self.config, self.out, self.say = config, out, say
        self.device = pick_device(device)
        self._latency = config.demonstrations.latency
        self._held: DemonstrationBatches | None = None
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

    def _demonstrations(self) -> Path:
        """Where they are; recorded if need be."""
        place, wanted = self.out / "demonstrations", self.config.demonstrations
        if self._held is None:
            self.say(f"demonstrations: {wanted.episodes} episodes of the scripted expert")
            config = self.config
            size = config.model.tower.image_size
            collect_demonstrations(place, wanted, environment=config.environment, image_size=size)
        return place

    def _batches(self, trainable: Trainable, *stages: str) -> DemonstrationBatches:
        """The demonstrations, and the corrections that stages collected.

        All stages share them: they differ in weights, not in how they see.
        """
        places = [self._demonstrations()]
        for stage in stages:
            places += sorted((self.out / "work" / stage).glob("corrections-?"))
        if self._held is None:
            self._held = flow.batches_for(trainable, self.device)
        for place in places:
            self._held.take(place)
        return self._held

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
            trainable = load_trainable(self.out / parent, self.device, pi0=self._pi0)
        else:
            proprioception = read_proprioception(self._demonstrations())
            environment = self.config.environment
            trainable = new_trainable(self.config.model, proprioception, self.device, environment)
        facts = stage(trainable)
        trainable.save(place, name, **facts)
        forget_checkpoints(self.out / "work" / name)

    def _evaluate(self, name: str) -> list[EpisodeResult]:
        config = self.config.evaluate
        task = Evaluation(
            policy=self.out / name,
            environment=self.config.environment,
            episodes=config.episodes,
            seed=config.first_seed,
        )
        return evaluate(task, str(self.device), log=self.out / "evaluation" / f"{name}.jsonl")

    def _sft_original(self, trainable: Trainable) -> dict[str, Any]:
        return self._sft(self.config.sft, trainable, "original")

    def _recover(self, trainable: Trainable) -> dict[str, Any]:
        config, teacher = self.config.recovery, None
        if config.distillation:
            teacher = load_trainable(self.out / "original", self.device).model
        return self._sft(config, trainable, "recovered", "original", teacher=teacher)

    def _sft(
        self,
        config: SftConfig,
        trainable: Trainable,
        name: str,
        *stages: str,
        teacher: OpenVLA | None = None,
    ) -> dict[str, Any]:
        where: dict[str, Any] = {
            "seed": self.config.seed,
            "device": self.device,
            "work": self.out / "work" / name,
        }
        batches: Any = self._batches(trainable, *stages)
        if self._pi0:
            return flow.run(config, trainable, batches, **where)
        return sft.run(
            config,
            trainable,
            batches,
            **where,
            latency=self._latency,
            teacher=teacher,
            environment=self.config.environment,
        )

    def _prune(self, trainable: Trainable) -> dict[str, Any]:
        batches: Any = self._batches(trainable, "original")
        stage: Any = prune_pi0 if self._pi0 else prune
        return stage.run(self.config.prune, trainable, batches, seed=self.config.seed)

    def _rl(self, trainable: Trainable, seed: int) -> dict[str, Any]:
        return rl.run(
            self.config.rl,
            trainable,
            self._batches(trainable, "original", "recovered"),
            seed=seed,
            device=self.device,
            work=self.out / "work" / f"rl-seed-{seed}",
            latency=self._latency,
            environment=self.config.environment,
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
