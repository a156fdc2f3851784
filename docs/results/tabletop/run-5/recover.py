"""Run 5: prune the original and recover it by SFT on a stream of new episodes.

python docs/results/tabletop/run-5/recover.py OUT SECONDS [CONFIG]

Processes of their own record all the time: the expert's demonstrations, and what the expert would
have done where the policy's latest average goes. The trainer keeps the newest steps on the GPU and
forgets the oldest, so that no step is seen often enough to be learnt by heart. The learning rate
falls with time instead of steps. OUT/pruned is made if it is not there.
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

import training.envs.tabletop
from training import prune, sft
from training.bundles import load_trainable, new_trainable
from training.common import cpu_count, pick_device, seed_everything
from training.config import load_config
from training.data.collect import _disturb, collect_demonstrations
from training.data.demonstrations import read_proprioception
from training.envs.registry import make_environment
from training.envs.vector import make_vector
from training.rollout import Actor, roll

BEGAN = time.monotonic()
role = sys.argv.pop(1) if sys.argv[1].startswith("--") else ""
out, seconds = Path(sys.argv[1]), float(sys.argv[2])
config_path = Path(sys.argv[3] if sys.argv[3:] else "config/training/tabletop.yaml")
config = load_config(config_path)
small = config.model.layers < 12  # to try this script
POOL = Path("/dev/shm/rlrc-pool")  # noqa: S108 in memory, and this machine was ours alone
BACKLOG = 400  # files
GPUS = torch.cuda.device_count()
CAPACITY = 4000 if small else int(os.environ.get("CAPACITY", 1_900_000))  # steps
START_AT = 500 if small else 60_000  # steps
ENVIRONMENTS = 2 if small else (56 if cpu_count() > 16 else 32)
RECORDERS = 1 if small else cpu_count() * 9 // 16
LATENCIES = ((0.0, 0.0), (0.0, 0.08))  # s; half of the episodes each
FIRST_DEMONSTRATION, FIRST_CORRECTION = 100_000_000, 500_000_000
RECOVERY = dataclasses.replace(
    config.recovery,
    steps=120_000,
    distillation=float(os.environ.get("DISTILLATION", 0.5)),
    corrections=(),
    checkpoint_every=10**9,
)


def say(*words):
    print(f"[{time.monotonic() - BEGAN:5.0f} s]", *words, flush=True)


def stopped():
    return (out / "stop").exists()


def helper(role, number, gpu):
    """Another process of this script; renders on the GPU of that number."""
    environment = {**os.environ, "NUMBER": str(number), "TRAINER": str(os.getpid())}
    if GPUS > 1:
        environment["MUJOCO_EGL_DEVICE_ID"] = str(gpu)
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    arguments = [sys.executable, __file__, role, str(out), str(seconds), str(config_path)]
    with (out / f"console{role[1:]}-{number}.txt").open("w") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)


def deliver(name, steps, instruction):
    """Hand an episode to the trainer: a list of (image, proprioception, action, grounding)."""
    images, *others = zip(*steps, strict=True)
    names = ("proprioception", "actions", "grounding")
    arrays = {k: np.asarray(v, np.float32) for k, v in zip(names, others, strict=True)}
    partial_path = POOL / f"{name}.partial"
    save_file({"images": np.asarray(images), **arrays}, partial_path, {"text": instruction})
    partial_path.rename(POOL / f"{name}.episode")


def alive():
    """Whether the trainer is there and wants more; waits while it has not taken what there is."""
    while not stopped() and Path("/proc", os.environ["TRAINER"]).exists():
        if sum(1 for _ in POOL.iterdir()) < BACKLOG:
            return True
        time.sleep(0.1)
    return False


def record():
    """Demonstrations, for ever."""
    number = int(os.environ["NUMBER"])
    training.envs.tabletop.encode_png = lambda _: b""  # nobody reads it here
    env = make_environment(config.environment, [], latency=LATENCIES[0], label=True, image_size=128)
    seed, wanted, began = FIRST_DEMONSTRATION + 1_000_000 * number, config.demonstrations, 0
    while alive():
        rng = np.random.default_rng([seed, 11])
        env._env.latency = LATENCIES[seed % 2]
        strength = rng.uniform(0, 2) if rng.random() < wanted.disturbed_share else 0.0
        env.set_seeds([seed])
        seen, told = env.reset()
        steps, ended = [], False
        while not ended:
            label = told["expert_action"]
            steps.append((seen["image"], seen["proprioception"], label, told["grounding"]))
            env.world.change_view(rng)
            seen, _, success, cut, told = env.step(_disturb(label, strength, wanted, rng))
            ended = success or cut
        if told["success"]:
            deliver(f"{number}-{seed}", steps, told["instruction"])
        seed += 1
        if time.monotonic() - began > 30:
            began = time.monotonic()
            say(f"{seed % 1_000_000} episodes")


def correct():
    """Corrections of the latest average, for ever."""
    number, device = int(os.environ["NUMBER"]), pick_device(None)
    trainable = load_trainable(out / "pruned", device)
    actor = Actor(trainable.model, trainable.processor, trainable.codec, device, ENVIRONMENTS)
    first = FIRST_CORRECTION + 100_000_000 * number
    venv = make_vector(
        partial(scenes, first),
        ENVIRONMENTS,
        config.environment,
        image_size=128,
        latency=LATENCIES[number],
        label=True,
        max_steps=60,
    )
    average, version, began, count = out / "average.safetensors", 0.0, time.monotonic(), 0
    steps = [[] for _ in range(ENVIRONMENTS)]
    solved = []
    while not average.exists() and not stopped():
        time.sleep(0.2)
    for step in roll(actor, venv):
        for i in step.active:
            told, seen = step.told[i], step.observation
            image = seen["image"][i].copy()
            label, grounding = told["expert_action"], told["grounding"]
            steps[i].append((image, seen["proprioception"][i], label, grounding))
        for i in step.ended:
            told = step.infos[i]
            solved.append(told["success"])
            deliver(f"c{number}-{told['seed']}", steps[i], told["instruction"])
            steps[i], count = [], count + 1
        if time.monotonic() - began > 25 or version == 0.0:
            if solved:
                rate = 100 * np.mean(solved)
                say(f"latency {LATENCIES[number]}: {rate:.1f}% of {len(solved)}; {count} in all")
            began, solved = time.monotonic(), []
            if not alive():
                break
            if (newest := average.stat().st_mtime) != version:
                version = newest
                trainable.model.load_state_dict(load_file(average), strict=False)
                actor._decoder.refresh()


def scenes(first, index, _):
    return range(first + 1_000_000 * index, first + 1_000_000 * (index + 1))


class Ring(sft.DemonstrationBatches):
    """The newest steps, in tensors of a fixed size."""

    def __init__(self, processor, codec, device, grounding):
        super().__init__(processor, codec, device)
        n = CAPACITY
        self._steps = {
            "images": torch.zeros((n, 128, 128, 3), dtype=torch.uint8, device=device),
            "proprioception": torch.zeros((n, 8), device=device),
            "bins": torch.zeros((n, 7), dtype=torch.int64, device=device),
            "grounding": torch.zeros((n, grounding), device=device),
            "prompts": torch.zeros(n, dtype=torch.int64, device=device),
        }
        self._count = torch.zeros((), device=device)
        self.total, self._at = 0, 0
        ids, mask = processor.batch_token_ids(["put the red cube on the blue plate"])
        assert mask is None
        self._ids = torch.zeros((8192, ids.shape[1]), dtype=ids.dtype, device=device)
        self._mask = None

    def extend(self, episodes):
        """Write over the oldest steps."""
        prompts = []
        for episode in episodes:
            text = episode["text"]
            if text not in self._instructions:
                ids, mask = self.processor.batch_token_ids([text])
                assert mask is None
                self._ids[len(self._instructions)] = ids[0].to(self._device)
                self._instructions[text] = len(self._instructions)
            prompts.append(np.full(len(episode["actions"]), self._instructions[text]))
        arrays = {
            name: np.concatenate([episode[name] for episode in episodes])
            for name in ("images", "proprioception", "grounding")
        }
        actions = np.concatenate([episode["actions"] for episode in episodes]).astype(np.float64)
        arrays |= {"bins": self._codec.encode(actions), "prompts": np.concatenate(prompts)}
        new, first = len(actions), min(len(actions), CAPACITY - self._at)
        for name, array in arrays.items():
            there, tensor = self._steps[name], torch.from_numpy(array)
            there[self._at : self._at + first].copy_(tensor[:first])
            there[: new - first].copy_(tensor[first:])
        self._at = (self._at + new) % CAPACITY
        self.total += new
        self._count.fill_(min(self.total, CAPACITY))

    def sample(self, size, brightness=0.0, shift=0, _=False):
        """Of all that is held."""
        rows = (torch.rand(size, device=self._device, dtype=torch.float64) * self._count).long()
        steps = self._steps
        inputs = self._inputs(rows, self._pixels(rows, brightness, shift))
        return sft.Batch(inputs, steps["bins"][rows], steps["grounding"][rows], None)


class Reader(threading.Thread):
    """Takes episodes from the pool; the trainer's thread alone talks to the GPU."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ready, self.corrections = [], 0

    def run(self):
        """Until the training ends."""
        while not stopped():
            for path in list(POOL.glob("*.episode")):
                with safe_open(str(path), framework="np") as file:
                    episode = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    episode["text"] = file.metadata()["text"]
                path.unlink()
                self.corrections += path.name.startswith("c")
                self.ready.append(episode)
            time.sleep(0.02)

    def take(self):
        """What has come since the last time."""
        ready, self.ready = self.ready, []
        return ready


class TimeUp(Exception):
    """The training has had its time."""


class TimedTrainer(sft.Trainer):
    """Trains until a moment on what the other processes record."""

    def start(self, trainable, reader, until):
        """Say what is trained, on what, and until when."""
        self.trainable, self.reader = trainable, reader
        self.began, self.until, self.share = time.monotonic(), until, 0.0
        self.last_average, self.last_bundle, self.last_word = 0.0, time.monotonic(), 0.0

    def _set_learning_rate(self, _):
        warm = min(1.0, (self._step + 1) / self._config.warmup_steps)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share)))
        super()._set_learning_rate(self._config.learning_rate * warm * cosine)

    def _correct(self, _):
        if self._step % 20:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        self.share = (now - self.began) / (self.until - self.began)
        if self.share >= 1:
            raise TimeUp
        if episodes := self.reader.take():
            self._batches.extend(episodes)
        if now - self.last_average > 12:
            self.last_average = now
            save_tensors(
                {k: v.contiguous() for k, v in self._average.items()}, out / "average.partial"
            )
            (out / "average.partial").rename(out / "average.safetensors")
        if now - self.last_bundle > 60:
            self.last_bundle = now
            self.save("latest")
        if now - self.last_word > 20:
            self.last_word = now
            taken = self._batches.total
            say(
                f"step {self._step}, share {self.share:.2f}: {taken} steps, of which "
                f"{self.reader.corrections} episodes of corrections;",
                json.dumps({k: round(v, 4) for k, v in self._metrics.items()}),
            )

    def save(self, name):
        """The average, as a bundle."""
        current = {name: value.clone() for name, value in self._current.items()}
        self._put(self._average)
        facts = {"seed": config.seed, **dataclasses.asdict(self._config), **self._metrics}
        facts |= {
            "steps": self._step,
            "demonstration_steps": self._batches.total,
            "corrections_episodes": self.reader.corrections,
        }
        shutil.rmtree(out / f"{name}.new", ignore_errors=True)
        self.trainable.save(out / f"{name}.new", "recovered", **facts)
        shutil.rmtree(out / name, ignore_errors=True)
        (out / f"{name}.new").rename(out / name)
        self._put(current)


def prepare(device):
    """The pruned policy, and the teacher's name."""
    source = "tabletop-original"
    if small or not (out / "pruned").exists():
        wanted = dataclasses.replace(config.demonstrations, episodes=8 if small else 640)
        collect_demonstrations(out / "calibration", wanted, cpu_count())
    if small:
        source = out / "original"
        new_trainable(config.model, read_proprioception(out / "calibration"), device).save(
            source, "original"
        )
    if not (out / "pruned").exists():
        trainable = load_trainable(source, device)
        batches = sft.DemonstrationBatches(trainable.processor, trainable.codec, device)
        batches.take(out / "calibration")
        seed_everything(config.seed)
        facts = prune.run(config.prune, trainable, batches, seed=config.seed)
        trainable.save(out / "pruned", "pruned", **facts)
    return source


def main():
    device = pick_device(None)
    (out / "stop").unlink(missing_ok=True)
    shutil.rmtree(POOL, ignore_errors=True)
    POOL.mkdir(parents=True)
    source = prepare(device)
    last = GPUS - 1
    others = [helper("--record", i, last) for i in range(RECORDERS)]
    others += [helper("--correct", i, last) for i in range(len(LATENCIES))]
    reader = Reader()
    reader.start()
    recovered = load_trainable(out / "pruned", device)
    teacher = load_trainable(source, device).model
    batches = None
    while batches is None or batches.total < START_AT:
        time.sleep(0.5)
        if episodes := reader.take():
            if batches is None:
                width = episodes[0]["grounding"].shape[1]
                batches = Ring(recovered.processor, recovered.codec, device, width)
            batches.extend(episodes)
    say(f"{batches.total} steps to begin with")
    seed_everything(config.seed)
    work = out / "work" / "recovered"
    trainer = TimedTrainer(recovered.model, batches, RECOVERY, device, work, teacher=teacher)
    trainer.start(recovered, reader, BEGAN + seconds)
    with contextlib.suppress(TimeUp):
        trainer.run()
    trainer.save("recovered")
    say("recovered: saved", json.dumps(trainer._metrics), trainer._step, batches.total)
    (out / "stop").touch()
    for other in others:
        other.terminate()


if __name__ == "__main__":
    {"": main, "--record": record, "--correct": correct}[role]()
    os._exit(0)
