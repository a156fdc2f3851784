import dataclasses

import numpy as np
import pytest
import torch

from rlrc_ros.errors import UserError
from training.config import CorrectionsConfig, LoraConfig, SftConfig
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import Episode, encode_png, write_shard
from training.sft import (
    GroundingHead,
    Trainer,
    bc_loss,
    schedule,
    sft_losses,
)

CPU = torch.device("cpu")
CONFIG = SftConfig(
    steps=12,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=3,
    checkpoint_every=5,
    grounding=0.5,
    label_width=2.0,
)


class Killed(Exception):
    pass


def killed_at(step):
    """A Trainer that dies before the given step."""

    class Mortal(Trainer):
        def _update(self):
            if self._step == step:
                raise Killed
            return super()._update()

    return Mortal


def test_the_loss_falls(trainable, batches, tmp_path):
    policy = trainable()
    data = batches(policy)
    torch.manual_seed(0)
    before = bc_loss(policy.model, data.sample(60))
    config = dataclasses.replace(CONFIG, steps=100, batch_size=32, label_width=0.0, average=0.0)
    Trainer(policy.model, data, config, CPU, tmp_path).run()
    assert bc_loss(policy.model, data.sample(60)) < 0.7 * before


EVERYTHING = {
    "micro_batch": 4,
    "gradient_checkpointing": True,
    "lora": LoraConfig(rank=4, targets=("decoder", "vision")),
    "augmentation": "openvla",
}


@pytest.mark.parametrize(("step", "options"), [(3, {}), (5, {}), (11, {}), (7, EVERYTHING)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(trainable, batches, tmp_path, step, options):
    config = dataclasses.replace(CONFIG, **options)
    whole, broken, resumed = trainable(), trainable(), trainable(seed=0 if options else 9)
    torch.manual_seed(1)
    Trainer(whole.model, batches(whole), config, CPU, tmp_path / "whole").run()
    torch.manual_seed(1)
    with pytest.raises(Killed):
        killed_at(step)(broken.model, batches(broken), config, CPU, tmp_path / "broken").run()
    if step < 5:  # before the first checkpoint everything starts anew
        resumed = trainable()
        torch.manual_seed(1)
    Trainer(resumed.model, batches(resumed), config, CPU, tmp_path / "broken").run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    rows = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "broken")]
    timeless = [[row.rsplit(",", 1)[0] for row in run] for run in rows]
    assert timeless[0] == timeless[1]


def test_corrections_are_collected_once_with_the_averaged_policy(trainable, batches, tmp_path):
    rounds = (CorrectionsConfig(at_step=4, episodes=1, first_seed=0),)
    config = dataclasses.replace(CONFIG, corrections=rounds)
    policy = trainable()
    seen = []

    def correct(number, model):
        seen.append((number, model.training, model.projector.fc1.weight.clone()))

    Trainer(policy.model, batches(policy), config, CPU, tmp_path, correct).run()
    ((number, training, weight),) = seen
    assert number == 0 and not training
    assert not torch.equal(weight, policy.model.projector.fc1.weight)


def test_unknown_grounding_weighs_nothing(trainable, batches):
    policy = trainable()
    head = GroundingHead(64, 4)
    batch = batches(policy).sample(8)
    known = sft_losses(policy.model, head, batch, CONFIG)
    batch.grounding[:] = float("nan")
    unknown = sft_losses(policy.model, head, batch, CONFIG)
    assert known.grounding > 0 and unknown.grounding == 0
    assert unknown.total.isfinite()
    unknown.total.backward()
    assert all(p.grad.isfinite().all() for p in policy.model.parameters() if p.grad is not None)


def test_a_narrow_label_width_is_plain_cross_entropy(trainable, batches):
    policy = trainable()
    batch, head = batches(policy).sample(8), GroundingHead(64, 4)
    plain = dataclasses.replace(CONFIG, grounding=0.0, label_width=0.0)
    narrow = dataclasses.replace(plain, label_width=0.05)
    expected = sft_losses(policy.model, head, batch, plain).total
    torch.testing.assert_close(sft_losses(policy.model, head, batch, narrow).total, expected)
    torch.testing.assert_close(bc_loss(policy.model, batch), expected)


def test_the_learning_rate_warms_up_and_comes_down():
    config = dataclasses.replace(CONFIG, steps=100, warmup_steps=10)
    rates = [schedule(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.06


def test_joined_steps_keep_their_images_and_instructions(trainable, tmp_path):
    policy = trainable()
    batches = DemonstrationBatches(policy.processor, policy.codec, CPU)
    texts = ("push the red cube", "put the red cube on the blue plate")
    for i, text in enumerate(texts):
        frames = np.full((2, 64, 64, 3), 100 * i, np.uint8)
        numbers = [np.full((2, n), float(i), np.float32) for n in (8, 7, 4)]
        (tmp_path / text).mkdir()
        episode = Episode([encode_png(frame) for frame in frames], *numbers, {"instruction": text})
        write_shard(tmp_path / text / "shard-00000.safetensors", [episode])
        for _ in range(2):  # the second time it is there already
            batches.take(tmp_path / text)
        assert batches.grounding_size == 4
    batch = batches.sample(64)
    second = batch.grounding[:, 0] == 1
    assert 0 < second.sum() < 64
    for rows, text, brightness in zip((~second, second), texts, (0, 100), strict=True):
        ids = policy.processor.token_ids(text)
        assert (batch.inputs.input_ids[rows, : len(ids)] == torch.tensor(ids)).all()
        assert (batch.inputs.attention_mask[rows].sum(1) == len(ids)).all()
        shown = policy.processor.pixel_values(np.full((1, 64, 64, 3), brightness, np.uint8))
        assert (batch.inputs.pixel_values[rows] == shown).all()


def test_frozen_vision_stays_and_the_rest_learns(trainable, batches, tmp_path):
    policy = trainable()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    config = dataclasses.replace(CONFIG, freeze_vision=True)
    Trainer(policy.model, batches(policy), config, CPU, tmp_path).run()
    moved = {
        name
        for name, value in policy.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved and not any(name.startswith("vision_backbone") for name in moved)
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


def test_a_policy_that_is_its_own_teacher_has_nothing_to_learn(trainable, batches):
    policy = trainable()
    batch, head = batches(policy).sample(8), GroundingHead(64, 4)
    config = dataclasses.replace(CONFIG, grounding=0.0, distillation=1.0)
    loss = sft_losses(policy.model, head, batch, config, teacher=policy.model).total
    loss.backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    plain = sft_losses(policy.model, head, batch, dataclasses.replace(config, distillation=0.0))
    expected = torch.autograd.grad(plain.total, policy.model.projector.fc1.weight)[0].norm()
    assert max(float(gradient.norm()) for gradient in gradients) < 1e-4 * expected


def test_distillation_brings_a_policy_near_its_teacher(trainable, batches, tmp_path):
    teacher, pupil = trainable(), trainable(seed=9)
    data = batches(pupil)
    torch.manual_seed(0)
    batch = data.sample(32)

    def distance():
        with torch.no_grad():
            told, said = (
                policy.model.eval()(batch.inputs, batch.bins)[0].log_softmax(-1)
                for policy in (teacher, pupil)
            )
        return float((told.exp() * (told - said)).sum(-1).mean())

    before = distance()
    config = dataclasses.replace(
        CONFIG, steps=100, batch_size=32, grounding=0.0, average=0.0, distillation=1.0
    )
    Trainer(pupil.model, data, config, CPU, tmp_path, teacher=teacher.model).run()
    assert distance() < 0.5 * before


def test_distillation_without_a_teacher_is_refused(trainable, batches, tmp_path):
    policy = trainable()
    config = dataclasses.replace(CONFIG, distillation=0.5)
    with pytest.raises(UserError, match="--teacher"):
        Trainer(policy.model, batches(policy), config, CPU, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_are_those_they_were_captured_from(trainable, demonstrations, tmp_path):
    device, found = torch.device("cuda"), []
    for name in ("captured", "eager"):
        policy = trainable()
        policy.model.to(device)
        data = DemonstrationBatches(policy.processor, policy.codec, device)
        data.add(demonstrations)
        torch.manual_seed(1)
        trainer = Trainer(policy.model, data, CONFIG, device, tmp_path / name)
        if name == "eager":
            trainer._captured = None
        trainer.run()
        found.append(policy.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
