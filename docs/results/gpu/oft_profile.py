"""Where an action of OpenVLA-OFT's shape goes: its parts in graphs of their own, and its kernels.

    python docs/results/gpu/oft_profile.py > oft-profile.txt

`whole` is from the images' bytes to actions on the host; every other time is the GPU's alone, µs:
`graph` all of that, `embed` what comes before the decoder, `t0` and `t1` a tower, `see` both.
"""

import collections
from dataclasses import replace

import numpy as np
import torch
from tiles import microseconds
from torch.profiler import ProfilerActivity, profile

from rlrc_ros.cli import bench_shape

DEVICE = torch.device("cuda", 0)


def graph(function, times=1):
    """µs of one call, several in one graph."""

    def work():
        for _ in range(times):
            function()

    with torch.inference_mode():
        return microseconds(work, times)


def kernels(function):
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    total, count = collections.Counter(), collections.Counter()
    for event in seen.events():
        if event.device_time_total:
            total[event.name] += event.device_time_total
            count[event.name] += 1
    print("   all kernels", round(sum(total.values())))
    for name, us in total.most_common(16):
        print(f"{us:10.0f} {count[name]:5d} × {us / count[name]:6.1f}  {name[:100]}")


def look(name, config, images):
    decoder = config.architecture.decoder
    layers = bench_shape.layers_of(name, decoder.layers, decoder)
    architecture = replace(config.architecture, decoder=replace(decoder, layers=layers))
    changed = replace(config, architecture=architecture)
    variant = bench_shape._build(name, changed, DEVICE, torch.bfloat16, images)
    engine, room = variant.engine, variant.engine._room
    whole = [bench_shape._timed(variant, images[i % 8], DEVICE) for i in range(40)]
    slots, pixels = engine._graphs[24][3], torch.zeros(2, 3, 224, 224, device=DEVICE)
    tokens = engine._needed(24)
    x = torch.randn(tokens, 4096, device=DEVICE, dtype=torch.bfloat16) * 0.05
    features = torch.randn(512, 2176, device=DEVICE, dtype=torch.bfloat16)
    seen = torch.tensor([tokens - 4], device=DEVICE)

    def layer(number):
        return engine._layers[number].both_ways(x, room.cos, room.sin, seen, None)

    parts = {
        "whole": np.median(whole) * 1e3,
        "graph": graph(lambda: engine._act(slots)),
        "embed": graph(lambda: engine._embed(slots)),
        "t0": graph(lambda: engine._towers[0](pixels)),
        "t1": graph(lambda: engine._towers[1](pixels)),
        "see": graph(lambda: engine._see([pixels, pixels])),
        "projector": graph(lambda: engine._model.projector(features)),
        "layer0": graph(lambda: layer(0), 4),
        "layer1": graph(lambda: layer(1), 10),
    }
    print(name, tokens, {part: round(float(us), 1) for part, us in parts.items()})
    kernels(lambda: engine._act(slots))


def main():
    images = np.random.default_rng(0).integers(0, 256, (8, 2, 224, 224, 3), dtype=np.uint8)
    for name in ("pruned", "planned"):
        look(name, bench_shape.SHAPES["openvla-7b-oft"](), images)


if __name__ == "__main__":
    main()
