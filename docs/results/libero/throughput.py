"""Environment steps per second of a LIBERO suite, rendered, by the number of processes.

python docs/results/libero/throughput.py libero_object --processes 1 8 16 > throughput.json
"""

import argparse
import json
import sys
import time

import numpy as np

from training.envs.registry import ENVIRONMENTS
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", choices=ENVIRONMENTS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rows = []
    for processes in arguments.processes:
        rows.append(measure(arguments.suite, processes, arguments.image_size, arguments.steps))
        print(rows[-1], file=sys.stderr)
    json.dump({**vars(arguments), "rows": rows}, sys.stdout)
