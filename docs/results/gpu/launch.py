"""How long this host takes to launch one small kernel, which is what `generate` waits for.

python docs/results/gpu/launch.py launch.json

The mean of 20,000 launches that nobody waits for one by one, seven times over, µs.
"""

import json
import sys
import time
from pathlib import Path

import torch

from rlrc_ros.files import write_atomically
from rlrc_ros.timing import machine

LAUNCHES = 20_000


def mean_us(x):
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        x.add_(0)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / LAUNCHES * 1e6


if __name__ == "__main__":
    values = torch.ones(64, device="cuda")
    mean_us(values)
    result = {**machine(), "launch_us": [round(mean_us(values), 3) for _ in range(7)]}
    write_atomically(Path(sys.argv[1]), json.dumps(result, indent=1) + "\n")
    print(result["launch_us"])
