"""What an action of a 20 M-parameter policy takes on one thread of a CPU, engine by engine.

    OMP_NUM_THREADS=1 python docs/results/backbones/cpu_engines.py --rounds 30 --out FILE

Takes openvino, onnx and onnxruntime. Random weights; all engines act in every round, in random
order, on the same observation. Tokens are compared with eager's in float32: over random weights the
likeliest bins are near ties, so a share of different tokens says more of the arithmetic than of a
trained policy. `ratio` is the median of eager's times over that of the engine's, with a 95%
bootstrap interval.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from rlrc_ros.timing import machine, ratio_interval
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    LayerWidths,
    ProprioceptionConfig,
    TowerConfig,
)
from rlrc_ros.vla.engine import EagerEngine, UnrolledEngine
from rlrc_ros.vla.openvino_engine import OpenVINOEngine, _Action
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.policy import build_model, parameter_counts

PROMPT = 13


def config() -> BundleConfig:
    """A tower of 256 patches before six layers of 512."""
    half = (0.5,) * 3
    tower = TowerConfig(
        kind="vit", width=192, depth=4, heads=6, ffn=768, patch=14, image_size=224, mean=half,
        std=half,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=320,
        hidden_size=512,
        head_dim=64,
        layers=(LayerWidths(8, 8, 1344),) * 6,
        max_positions=512,
    )
    return BundleConfig(
        architecture=ArchitectureConfig(towers=(tower,), decoder=decoder, proprioception=8),
        action_codec=ActionCodecConfig(q01=(-1.0,) * 7, q99=(1.0,) * 7, mask=(True,) * 7),
        cameras=(CameraConfig(name="front", height=224, width=224),),
        proprioception=ProprioceptionConfig(
            joints=tuple("abcdefg"), gripper=True, mean=(0.0,) * 8, std=(1.0,) * 8
        ),
        control_rate=10.0,
        instruction_template="{instruction}",
        dtype="float32",
    )


class ONNXRuntime:
    """The same graph as OpenVINO's, through ONNX."""

    def __init__(self, model: OpenVLA, length: int) -> None:
        import onnxruntime

        file = Path(tempfile.mkdtemp()) / "action.onnx"
        self._length = length
        example = self._arguments(observation(0))
        with torch.no_grad():
            torch.onnx.export(
                _Action(model, length).eval(), example, str(file), dynamo=False, opset_version=17
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        self._names = [entry.name for entry in self._session.get_inputs()]
        file.unlink()

    def _arguments(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        pad = self._length - inputs.input_ids.shape[1]
        ids = torch.nn.functional.pad(inputs.input_ids, (0, pad))
        last = torch.tensor([inputs.input_ids.shape[1] + 256])
        return ids, last, inputs.pixel_values, inputs.proprioception

    def bins(self, inputs: Inputs) -> torch.Tensor:
        """Greedy action bins."""
        values = [tensor.numpy() for tensor in self._arguments(inputs)]
        out = self._session.run(None, dict(zip(self._names, values, strict=True)))[0]
        return torch.from_numpy(out)[None, :-1]


def observation(seed: int) -> Inputs:
    """Noise, and a prompt of PROMPT tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randint(3, 60, (1, PROMPT), generator=generator),
        None,
        torch.randn(1, 3, 224, 224, generator=generator),
        torch.randn(1, 8, generator=generator),
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(config()).eval()
    for parameter in model.language_model.parameters():
        parameter.data *= 3
    int8 = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
    )
    int8.language_model.lm_head = model.language_model.lm_head
    engines = {"eager": EagerEngine(model), "int8 (torch.ao dynamic)": EagerEngine(int8)}
    start_up = {}
    for precision in ("f32", "bf16"):
        engine = OpenVINOEngine(model, lengths=(16,), precision=precision)
        start_up[f"openvino {precision}"] = engine.prepare()
        engines[f"openvino {precision}"] = engine
    began = time.perf_counter()
    engines["onnxruntime"] = ONNXRuntime(model, 16)
    start_up["onnxruntime"] = time.perf_counter() - began
    engines["unrolled"] = UnrolledEngine(copy.deepcopy(model))
    times = {name: [] for name in engines}
    equal = {name: [] for name in engines}
    order = random.Random(0)
    for number in range(3 + arguments.rounds):
        inputs, found = observation(number), {}
        for name in order.sample(list(engines), len(engines)):
            began = time.perf_counter()
            found[name] = engines[name].bins(inputs)
            if number >= 3:
                times[name].append((time.perf_counter() - began) * 1e3)
        for name, bins in found.items():
            equal[name].append((bins == found["eager"]).double().mean().item())
    rows = []
    for name, taken in times.items():
        inverse = ratio_interval(taken, times["eager"])
        rows.append(
            {
                "engine": name,
                "p50_ms": float(np.median(taken)),
                "fastest_ms": min(taken),
                "ratio": float(np.median(times["eager"]) / np.median(taken)),
                "ratio_ci95": [1 / inverse[1], 1 / inverse[0]],
                "tokens_equal": float(np.mean(equal[name])),
                "seconds_to_start": start_up.get(name, 0.0),
                "times_ms": taken,
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "times_ms"})
    facts = {"machine": machine(), "parameters": parameter_counts(model), "engines": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
