"""How far pi0's actions here are from those of transformers' own class; prints one JSON object.

    OMP_NUM_THREADS=1 python docs/results/backbones/pi0_parity.py

Random weights, float32, the same noise: small shapes with one and with two key-value heads, and
pi0's own widths (three cameras at 224, ten steps, chunks of 50) with two layers a part.
"""

import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from rlrc_ros.cli.bench_pi0 import pi0
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0
from rlrc_ros.vla.pi0_engine import Pi0GraphEngine
from rlrc_ros.vla.pi0_upstream import upstream_inputs, upstream_model
from tests.vla.pi0_policies import architecture, random_pi0

CAMERAS, OBSERVATIONS, PROMPT = 3, 3, 12


def pi0s_own_widths():
    whole = pi0().architecture
    tower = replace(whole.towers[0], depth=2)
    decoder = replace(whole.decoder, layers=whole.decoder.layers[:2], vocab_size=1024)
    expert = replace(whole.expert, layers=whole.expert.layers[:2])
    return replace(whole, towers=(tower,), decoder=decoder, expert=expert, proprioception=8)


def compare(name, model):
    config, expert = model.config, model.config.expert
    theirs, differences, engines, moved = upstream_model(model), [], [], []
    generator = torch.Generator().manual_seed(0)
    size = config.towers[0].image_size
    seen = []
    for _ in range(OBSERVATIONS):
        images = torch.randint(0, 256, (1, CAMERAS, size, size, 3), generator=generator)
        ids = torch.randint(3, config.decoder.vocab_size, (1, PROMPT), generator=generator)
        state = torch.randn(1, 8, generator=generator)
        start = torch.randn(1, expert.chunk, expert.action_width, generator=generator)
        pixels = images.permute(0, 1, 4, 2, 3) / 127.5 - 1
        inputs = Inputs(ids, None, pixels, state)
        expected = theirs.sample_actions(noise=start.clone(), **upstream_inputs(config, inputs))
        differences.append((model.generate(inputs, start) - expected).abs().max().item())
        moved.append((expected - start).abs().max().item())
        seen.append((Inputs(ids, None, images.to(torch.uint8), state), start[0], expected))
    engine = Pi0GraphEngine(model)
    for raw, start, expected in seen:
        engine._noise = start
        engines.append((engine.chunk(raw) - expected).abs().max().item())
    return {
        "shape": name,
        "observations": OBSERVATIONS,
        "max_difference": max(differences),
        "max_difference_of_the_static_engine": max(engines),
        "max_distance_of_actions_from_noise": max(moved),
    }


def main():
    two = {"layers": ((4, 2, 64),) * 2, "expert": ((2, 2, 32),) * 2}
    torch.manual_seed(0)
    rows = [
        compare("small, one key-value head", random_pi0(architecture())),
        compare("small, two key-value heads", random_pi0(architecture(**two))),
        compare("pi0's own widths, two layers", Pi0(pi0s_own_widths()).eval()),
    ]
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
