"""Run 4: prune the shipped original and recover it by SFT for a given time.

python docs/results/tabletop/run-4/recover.py OUT SECONDS [CONFIG]

The stages are those of `rlrc compress`, laid out so that nothing waits: a process of its own first
records more demonstrations and then, round after round, corrections of the latest average. The
learning rate falls with time instead of steps.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from training import prune, sft
from training.bundles import load_trainable, new_trainable
from training.common import cpu_count, pick_device, seed_everything
from training.config import CorrectionsConfig, load_config
from training.data.collect import collect_corrections, collect_demonstrations
from training.data.demonstrations import Demonstrations, read, read_proprioception
from training.rollout import Actor

BEGAN = time.monotonic()
ROLES = ("--more", "--correct", "--probe")
role = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in ROLES else ""
out, seconds = Path(sys.argv[1]), float(sys.argv[2])
config_path = Path(sys.argv[3] if sys.argv[3:] else "config/training/tabletop.yaml")
config = load_config(config_path)
small = config.model.layers < 12  # to try this script
FIRST, SECOND, CORRECTIONS = (8, 8, 4) if small else (2880, 3840, 768)
LAST_SNAPSHOT = 0.65
"""Share of the training time after which no new round of corrections begins."""


RECOVERY = dataclasses.replace(
    config.recovery,
    distillation=0.75,
    freeze_vision=True,
    shift=6,
    corrections=(),
    checkpoint_every=10**9,
)


def teacher(device):
    return load_trainable(out / "original" if small else "tabletop-original", device).model


def say(*words):
    print(f"[{time.monotonic() - BEGAN:5.0f} s]", *words, flush=True)


def helper(role, seconds):
    """Another process of this script."""
    arguments = [sys.executable, __file__, role, str(out), str(seconds), str(config_path)]
    log = (out / f"console{role[1:]}.txt").open("w")
    return subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)


def record(name, first, episodes, workers):
    wanted = dataclasses.replace(config.demonstrations, episodes=episodes, first_seed=first)
    partial = out / f"{name}.recording"
    collect_demonstrations(partial, wanted, workers)
    partial.rename(out / name)
    say(f"{name}: {episodes} episodes recorded")


def more():
    record("more", 1_050_000, SECOND, max(1, cpu_count() - 2))


def correct():
    """Collect a round of corrections of every snapshot that appears; ends when there is none."""
    device = pick_device(None)
    number = 0
    while not (out / "stop").exists():
        snapshot = out / "snapshots" / str(number)
        if not snapshot.exists():
            time.sleep(0.2)
            continue
        trainable = load_trainable(snapshot, device)
        first = 3_500_000 + 10_000 * number
        wanted = CorrectionsConfig(at_step=0, episodes=CORRECTIONS, first_seed=first)
        environments = min(CORRECTIONS, 8 * cpu_count())
        actor = Actor(trainable.model, trainable.processor, trainable.codec, device, environments)
        place = out / f"corrections-{number}"
        rate = collect_corrections(place, actor, wanted, config.demonstrations.latency)
        say(f"snapshot {number}: solved {100 * rate:.1f}% of {CORRECTIONS} new scenes")
        number += 1


def probe():
    """Compile and capture a step on noise, so that the real training finds everything compiled."""
    device = pick_device(None)
    trainable = load_trainable(out / "pruned", device)
    batches = sft.DemonstrationBatches(trainable.processor, trainable.codec, device)
    rng, n = np.random.default_rng(0), 4096
    size = config.model.tower.image_size
    noise = Demonstrations(
        rng.integers(0, 256, (n, size, size, 3), np.uint8),
        rng.normal(size=(n, 8)).astype(np.float32),
        np.zeros((n, 7), np.float32),
        np.zeros((n, 21), np.float32),
        np.zeros(n, np.int64),
        ["put the red cube on the blue plate"],
        [],
    )
    batches.add(noise)
    wanted, work = dataclasses.replace(RECOVERY, steps=120), out / "work" / "probe"
    sft.Trainer(trainable.model, batches, wanted, device, work, teacher=teacher(device)).run()
    say("captured")


class TimeUp(Exception):
    """The training has had its time."""


class TimedTrainer(sft.Trainer):
    """Trains until a moment, taking up what the other processes have recorded by then."""

    def start(self, trainable, until):
        """Say what is trained and until when."""
        self.trainable, self.began, self.until = trainable, time.monotonic(), until
        self.share, self.snapshots, self.reading = 0.0, 0, None
        self.ready = []
        self.corrector = None

    def _set_learning_rate(self, _):
        warm = min(1.0, (self._step + 1) / self._config.warmup_steps)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share)))
        super()._set_learning_rate(self._config.learning_rate * warm * cosine)

    def _correct(self, _):
        if self._step % 20:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.share = (time.monotonic() - self.began) / (self.until - self.began)
        if self.share >= 1:
            raise TimeUp
        if self.ready:
            name, data = self.ready.pop()
            self._batches.add(data)
            say(f"step {self._step}: {name} joined, {len(self._batches)} steps of episodes")
            self.reading = None
        if self.reading is None:
            self._next()

    def _next(self):
        """Wait for the next recording; ask for one of corrections where none is under way."""
        if self.corrector is None:
            if (out / "more").exists():
                self.corrector = helper("--correct", 0)
                self._read("more")
        elif self.snapshots and (out / f"corrections-{self.snapshots - 1}").exists():
            name = f"corrections-{self.snapshots - 1}"
            self._snapshot()
            self._read(name)
        elif not self.snapshots:
            self._snapshot()

    def _snapshot(self):
        if self.share < LAST_SNAPSHOT:
            current = {name: value.clone() for name, value in self._current.items()}
            self._model.load_state_dict(self._average)
            self.trainable.save(out / "snapshots" / str(self.snapshots), "recovered")
            self._model.load_state_dict(current)
        else:
            (out / "stop").touch()
        self.snapshots += 1

    def _read(self, name):
        self.reading = threading.Thread(
            target=lambda: self.ready.append((name, read(out / name))), daemon=True
        )
        self.reading.start()


def main():
    device = pick_device(None)
    shutil.rmtree(out / "snapshots", ignore_errors=True)
    (out / "snapshots").mkdir(parents=True)
    source = "tabletop-original"
    if small:
        record("demonstrations", 1_030_000, FIRST, cpu_count())
        source = out / "original"
        proprioception = read_proprioception(out / "demonstrations")
        new_trainable(config.model, proprioception, device).save(source, "original")
    pruned = load_trainable(source, device)
    batches = sft.DemonstrationBatches(pruned.processor, pruned.codec, device)
    if not (out / "pruned").exists():
        batches.take(out / "demonstrations")
        seed_everything(config.seed)
        pruned.save(
            out / "pruned", "pruned", **prune.run(config.prune, pruned, batches, seed=config.seed)
        )
    probing = helper("--probe", 0)
    if not small:
        record("demonstrations", 1_030_000, FIRST, cpu_count() - 1)
    batches.take(out / "demonstrations")
    say("demonstrations: read")
    recording = helper("--more", 0)
    captures = probing.wait() == 0
    say("the step can be captured" if captures else "the step cannot be captured")

    recovered = load_trainable(out / "pruned", device)
    wanted = dataclasses.replace(RECOVERY, steps=50_000)
    seed_everything(config.seed)
    work = out / "work" / "recovered"
    trainer = TimedTrainer(recovered.model, batches, wanted, device, work, teacher=teacher(device))
    if not captures:
        trainer._captured = None
    trainer.start(recovered, BEGAN + seconds)
    with contextlib.suppress(TimeUp):
        trainer.run()
    recovered.model.load_state_dict(trainer._average)
    recovered.model.eval()
    metrics = {**trainer._metrics, "steps": trainer._step, "captured": captures}
    facts = {"seed": config.seed, **dataclasses.asdict(wanted), **metrics}
    recovered.save(out / "recovered", "recovered", **facts)
    say("recovered: saved", json.dumps(metrics))
    (out / "stop").touch()
    recording.terminate()
    if trainer.corrector:
        trainer.corrector.terminate()


if __name__ == "__main__":
    {"": main, "--more": more, "--correct": correct, "--probe": probe}[role]()
    os._exit(0)
