"""Run 3, second part: the original goes on from the averaged weights of its first part's step 2000.

python docs/results/tabletop/run-3/continue.py AVERAGE OUT SECONDS [CONFIG]

The stages are those of `rlrc compress`, without RL. New scenes are recorded in the background while
the first ones are trained on; the recovery takes as many steps as fit into SECONDS.
"""

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

from safetensors.torch import load_file

from training import prune, sft
from training.bundles import load_trainable, new_trainable
from training.common import cpu_count, pick_device, seed_everything
from training.config import CorrectionsConfig, load_config
from training.data.collect import collect_corrections, collect_demonstrations
from training.data.demonstrations import read, read_proprioception
from training.rollout import Actor

BEGAN = time.monotonic()
average, out, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
config = load_config(Path(sys.argv[4] if sys.argv[4:] else "config/training/tabletop.yaml"))
small = config.model.layers < 12  # to try this script
FIRST, SECOND, STEPS = (8, 8, 12) if small else (4000, 6000, 4600)
MORE_AT, CORRECT_AT, CORRECTIONS = (4, 8, 4) if small else (2200, 3200, 768)
background = {}
RECOVERY_RATE, RESERVE = (5, 10) if small else (37, 30)  # steps a second; seconds for compiling


def say(*words):
    print(f"[{time.monotonic() - BEGAN:5.0f} s]", *words, flush=True)


def record(name, first, episodes, workers):
    wanted = dataclasses.replace(config.demonstrations, episodes=episodes, first_seed=first)
    collect_demonstrations(out / name, wanted, workers)
    say(f"{name}: {episodes} episodes recorded")


def in_background():
    record("more", 1_020_000, SECOND, max(1, cpu_count() - 2))
    background["data"] = read(out / "more")
    say("more: read")


def correct(trainable, model, seed, name):
    place = out / f"corrections-{name}"
    wanted = CorrectionsConfig(at_step=0, episodes=CORRECTIONS, first_seed=seed)
    environments = min(CORRECTIONS, 8 * cpu_count())
    actor = Actor(model, trainable.processor, trainable.codec, device, environments)
    rate = collect_corrections(place, actor, wanted, config.demonstrations.latency)
    say(f"corrections {name}: the policy solved {100 * rate:.1f}% of {CORRECTIONS} new scenes")
    batches.take(place)


def train(trainable, wanted, name, hook):
    seed_everything(config.seed)
    work = out / "work" / name
    metrics = sft.Trainer(trainable.model, batches, wanted, device, work, hook).run()
    facts = {"seed": config.seed, **dataclasses.asdict(wanted), **metrics}
    trainable.save(out / name, name, **facts)
    say(f"{name}: saved", json.dumps(metrics))


def main():
    global device, batches
    device = pick_device(None)
    record("demonstrations", 1_016_000, FIRST, cpu_count())
    worker = threading.Thread(target=in_background)
    worker.start()

    original = new_trainable(config.model, read_proprioception(out / "demonstrations"), device)
    if average.exists():
        weights = {k.removeprefix("average."): v for k, v in load_file(average).items()}
        original.model.load_state_dict(weights)
    batches = sft.DemonstrationBatches(original.processor, original.codec, device)
    batches.take(out / "demonstrations")
    say("training begins")

    never = CorrectionsConfig(at_step=MORE_AT, episodes=1, first_seed=0)
    rounds = (never, dataclasses.replace(never, at_step=CORRECT_AT))
    wanted = dataclasses.replace(
        config.sft, steps=STEPS, warmup_steps=100, corrections=rounds, checkpoint_every=10**9
    )

    def more_or_corrections(number, model):
        if number == 0:
            worker.join()
            batches.add(background.pop("data"))
            say("more: joined")
        else:
            correct(original, model, 2_300_000, "original")

    train(original, wanted, "original", more_or_corrections)

    pruned = load_trainable(out / "original", device)
    facts = prune.run(config.prune, pruned, batches, seed=config.seed)
    pruned.save(out / "pruned", "pruned", **facts)
    say("pruned: saved")

    recovered = load_trainable(out / "pruned", device)
    left = seconds - (time.monotonic() - BEGAN) - RESERVE
    halfway = left > 100
    steps = max(20, int(RECOVERY_RATE * (left - 35 * halfway)))
    rounds = (dataclasses.replace(never, at_step=steps // 2),) * halfway
    wanted = dataclasses.replace(
        config.recovery, steps=steps, corrections=rounds, checkpoint_every=10**9
    )
    say(f"recovery: {steps} steps")
    train(
        recovered,
        wanted,
        "recovered",
        lambda _, model: correct(recovered, model, 3_300_000, "recovered"),
    )
    say("done")


if __name__ == "__main__":
    main()
