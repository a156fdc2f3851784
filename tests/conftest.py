"""Small policies with random weights, real in every part."""

import dataclasses
import logging
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in a shell's background; processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("MUJOCO_GL", "egl")

import hypothesis
import numpy as np
import pytest
import torch

from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ActionHeadConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    LayerWidths,
    ProprioceptionConfig,
    QuantizationConfig,
    TowerConfig,
)
from rlrc_ros.vla.policy import build_model
from rlrc_ros.vla.processor import Observation, word_tokenizer

torch.set_num_threads(1)
# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")
# ROS's launch, which its pytest plugins import, makes loggers that pytest's caplog does not hear.
logging.setLoggerClass(logging.Logger)

WORDS = [
    *("in", ":", "out", "put", "push", "stack", "the", "on", "into"),
    *("red", "green", "blue", "cube", "cylinder", "plate", "square"),
]
NF4 = QuantizationConfig(method="bitsandbytes-nf4", parts=("llm",))


def tower(**changes):
    shape = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "ffn": 64, "patch": 16}
    scale = {"image_size": 64, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return TowerConfig(**{**shape, **scale, **changes})


def bundle_config(layers=((2, 2, 64),) * 3, **changes):
    widths = tuple(LayerWidths(*layer) for layer in layers)
    decoder = DecoderConfig(
        vocab_size=64 + 256, hidden_size=64, head_dim=32, layers=widths, max_positions=128
    )
    fields = {
        "architecture": ArchitectureConfig(towers=(tower(),), decoder=decoder, proprioception=8),
        "action_codec": ActionCodecConfig(
            q01=(-0.03,) * 3 + (-0.15,) * 3 + (0.0,),
            q99=(0.03,) * 3 + (0.15,) * 3 + (1.0,),
            mask=(True,) * 7,
        ),
        "cameras": (CameraConfig(name="front", height=64, width=64),),
        "proprioception": ProprioceptionConfig(
            joints=tuple(f"joint{i}" for i in range(1, 8)),
            gripper=True,
            mean=(0.0,) * 8,
            std=(1.0,) * 8,
        ),
        "control_rate": 10.0,
        "instruction_template": "in: {instruction} out:",
        "dtype": "float32",
    }
    return BundleConfig(**{**fields, **changes})


def posed_config(joints=7, **changes):
    """The same for a policy that takes the end effector's pose, and so many joints beside it."""
    count = 6 + joints + 1
    architecture = dataclasses.replace(bundle_config().architecture, proprioception=count)
    contract = ProprioceptionConfig(
        joints=tuple(f"joint{i}" for i in range(1, joints + 1)),
        gripper=True,
        mean=(0.0,) * 3 + (3.0,) + (0.0,) * (count - 4),
        std=(1.0,) * count,
        ee_pose=True,
    )
    return bundle_config(architecture=architecture, proprioception=contract, **changes)


def chunked(config, images=1):
    """The same as an OpenVLA-OFT: chunks of 8."""
    head = ActionHeadConfig(chunk=8, dimensions=config.action_codec.dimensions)
    architecture = dataclasses.replace(config.architecture, images=images, action_head=head)
    names = ("front", "wrist")[:images]
    cameras = tuple(dataclasses.replace(config.cameras[0], name=name) for name in names)
    return dataclasses.replace(config, architecture=architecture, cameras=cameras)


def random_model(config, seed=0):
    """Weights large enough that the argmax of the logits does not hang on the last bit."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    for parameter in model.language_model.parameters():
        parameter.data *= 3
    return model


@pytest.fixture
def make_bundle(tmp_path):
    """make_bundle(name, layers=…, quantized=…, …) → Bundle."""

    def make(name="bundle", quantized=False, seed=0, **changes):
        config = bundle_config(quantization=NF4 if quantized else None, **changes)
        model = random_model(config, seed)
        if quantized:
            quantization.quantize(model, NF4)
        origin = provenance(None, "original")
        tensors = quantization.stored(model)
        return write_bundle(tmp_path / name, config, tensors, word_tokenizer(WORDS), origin)

    return make


@pytest.fixture
def observation():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Observation({"front": image}, "put the red cube on the blue plate", rng.normal(size=8))
