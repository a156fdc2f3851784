import dataclasses

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla.policy import build_model
from tests.conftest import chunked, tower
from tests.training.test_flow import batches_of as flow_batches
from tests.training.test_flow import trainable as pi0
from training.bundles import Trainable
from training.config import SftConfig
from training.flow import FlowTrainer
from training.memory import recomputed, transformer_blocks
from training.sft import Trainer

CPU = torch.device("cpu")
CONFIG = SftConfig(
    steps=4, batch_size=12, learning_rate=1e-3, warmup_steps=1, grounding=0.5, label_width=2.0
)


def gradients(trainer):
    """Of one step, which is not taken."""
    trainer._optimizer.step = trainer._optimizer.zero_grad = lambda **_: None
    torch.manual_seed(3)
    seen = trainer._step_on_batch()
    return seen, {n: p.grad for n, p in trainer._learning.items() if p.grad is not None}


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(second[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def oft(policy):
    """The same as a policy of chunks behind towers as OpenVLA has them."""
    architecture = dataclasses.replace(
        policy.config.architecture, towers=(tower(kind="dinov2"), tower(kind="siglip"))
    )
    config = chunked(dataclasses.replace(policy.config, architecture=architecture))
    torch.manual_seed(0)
    return Trainable(build_model(config), config, policy.tokenizer, None)


@pytest.mark.parametrize("chunks", [False, True])
def test_neither_micro_batches_nor_recomputing_change_the_gradients(
    trainable, batches, tmp_path, chunks
):
    policy = oft(trainable()) if chunks else trainable()
    policy.model.train()
    data = batches(policy)
    config = dataclasses.replace(CONFIG, label_width=0.0) if chunks else CONFIG
    torch.manual_seed(1)
    whole = gradients(Trainer(policy.model, data, config, CPU, tmp_path))
    assert whole[1] and float(whole[1]["head.weight"].norm()) > 0
    policy.model.zero_grad()
    torch.manual_seed(1)
    trainer = Trainer(
        policy.model, data, dataclasses.replace(config, micro_batch=5), CPU, tmp_path / "parts"
    )
    blocks = [b for part in transformer_blocks(policy.model).values() for b in part]
    with recomputed(blocks, compiled=False):
        assert_same(whole, gradients(trainer))


def test_a_recomputed_block_keeps_its_input_alone(trainable, batches):
    policy = trainable()
    batch = batches(policy).sample(8)
    kept = []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for blocks in ([], [b for part in transformer_blocks(policy.model).values() for b in part]):
        kept.append(0)
        with (
            recomputed(blocks, compiled=False),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            policy.model(batch.inputs, batch.bins)
    assert kept[1] < 0.35 * kept[0]
    assert not any("forward" in vars(block) for block in policy.model.modules())


def test_micro_batches_of_a_flow_count_what_is_known(demonstrations, tmp_path):
    demonstrations.images = demonstrations.images[:, ::2, ::2].copy()
    demonstrations.episodes = [{"steps": n, "instruction": "push"} for n in (20, 4, 36)]
    policy, found = pi0(), []
    for size in (None, 3):
        policy.model.zero_grad()
        config = dataclasses.replace(CONFIG, micro_batch=size, grounding=0.0, label_width=0.0)
        data = flow_batches(policy, demonstrations)
        found.append(gradients(FlowTrainer(policy.model, data, config, CPU, tmp_path / str(size))))
    assert_same(*found)


def test_what_cannot_be_recomputed_is_refused(demonstrations, tmp_path):
    policy = pi0()
    demonstrations.images = demonstrations.images[:, ::2, ::2].copy()
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True)
    with pytest.raises(UserError, match="gradient_checkpointing"):
        FlowTrainer(policy.model, flow_batches(policy, demonstrations), config, CPU, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, "'micro_batch' is 0, and must be above 0"),
        ({"augmentation": "openvla", "shift": 4}, "leave 'shift' out"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
