"""Training things of the smallest size."""

import numpy as np
import pytest
import torch

from rlrc_ros.vla.policy import build_model
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS, bundle_config, tower
from training.bundles import Trainable
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import Demonstrations

TEXTS = ["put the red cube on the blue plate", "push the green cylinder into the red square"]


def batches_of(demonstrations, policy):
    made = DemonstrationBatches(policy.processor, policy.codec, torch.device("cpu"))
    made.add(demonstrations)
    return made


def small_trainable(layers=((2, 2, 64),) * 3, seed=0, image_size=64):
    architecture = bundle_config(layers).architecture
    architecture = type(architecture)(
        towers=(tower(image_size=image_size),), decoder=architecture.decoder, proprioception=8
    )
    config = bundle_config(layers, architecture=architecture)
    torch.manual_seed(seed)
    return Trainable(build_model(config), config, word_tokenizer(WORDS), None)


def small_demonstrations():
    rng = np.random.default_rng(0)
    proprioception = rng.normal(size=(60, 8)).astype(np.float32)
    actions = np.tanh(proprioception[:, :7]).astype(np.float32) * 0.03
    actions[:, 6] = proprioception[:, 6] > 0
    return Demonstrations(
        images=rng.integers(0, 256, (60, 64, 64, 3), dtype=np.uint8),
        proprioception=proprioception,
        actions=actions,
        grounding=rng.normal(size=(60, 4)).astype(np.float32),
        prompts=rng.integers(0, 2, 60),
        instructions=TEXTS,
        episodes=[{"steps": 60, "instruction": TEXTS[0]}],
    )


@pytest.fixture
def trainable():
    """trainable(layers, seed, …) → a policy that can be trained."""
    return small_trainable


@pytest.fixture
def demonstrations():
    """60 steps whose action follows from what is seen."""
    return small_demonstrations()


@pytest.fixture
def batches(demonstrations):
    def make(policy):
        return batches_of(demonstrations, policy)

    return make
