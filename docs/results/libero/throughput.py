"""Environment steps per second of a LIBERO suite, rendered, by the number of processes.

And what a step is made of where there is one process: physics with its controller, and the picture.

python docs/results/libero/throughput.py libero_object --processes 1 8 16 > throughput.json
"""

import argparse
import json
import sys
import time
from functools import partial

import numpy as np

from training.envs.registry import ENVIRONMENTS, make_environment
from training.envs.vector import make_vector

FIRST = 9_000_000  # sampled scenes, 100 in a row of one task


def scenes(index, _):
    return range(FIRST + 100 * index, FIRST + 100 * index + 100)


def measure(suite, count, size, steps):
    began = time.perf_counter()
    venv = make_vector(scenes, count, suite, image_size=size)
    try:
        venv.reset()
        ready = time.perf_counter()
        rng = np.random.default_rng(0)
        low, high = venv.action_space.low, venv.action_space.high
        for _ in range(steps):
            venv.step(rng.uniform(low, high, (count, 7)))
        seconds = time.perf_counter() - ready
    finally:
        venv.close()
    return {"processes": count, "steps_per_s": count * steps / seconds, "start_s": ready - began}


def parts(suite, size, steps):
    env = make_environment(suite, [FIRST], image_size=size)
    env.reset()
    rng, spent = np.random.default_rng(0), np.zeros(2)
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high)
        times = [time.perf_counter()]
        for part in (partial(env.world.step, action), env.world.render):
            part()
            times.append(time.perf_counter())
        spent += 1e3 * np.diff(times) / steps
    env.close()
    return dict(zip(("physics_ms", "picture_ms"), spent.tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", choices=ENVIRONMENTS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rows = [parts(arguments.suite, arguments.image_size, arguments.steps)]
    print(rows[0], file=sys.stderr)
    for processes in arguments.processes:
        rows.append(measure(arguments.suite, processes, arguments.image_size, arguments.steps))
        print(rows[-1], file=sys.stderr)
    json.dump({**vars(arguments), "rows": rows}, sys.stdout)
