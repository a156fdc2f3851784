import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.pi0 import Pi0, start_noise
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS
from tests.training.conftest import TEXTS
from tests.vla.pi0_policies import CAMERAS, pi0_config, random_pi0
from training import flow
from training.bundles import Trainable
from training.config import CorrectionsConfig, SftConfig
from training.flow import FlowBatches, FlowTrainer, flow_loss

CPU = torch.device("cpu")
CONFIG = SftConfig(
    steps=12, batch_size=8, learning_rate=1e-3, warmup_steps=2, average=0.5, checkpoint_every=4
)


def trainable(seed=0, fresh=False, **shape):
    config = pi0_config(("front",), **shape)
    torch.manual_seed(seed)
    model = Pi0(config.architecture) if fresh else random_pi0(config.architecture, seed)
    return Trainable(model, config, word_tokenizer([*WORDS, *" ".join(TEXTS).split()]), None)


@pytest.fixture
def short(demonstrations):
    """Three episodes, of 20, 4 and 36 steps."""
    demonstrations.images = demonstrations.images[:, ::2, ::2].copy()
    demonstrations.episodes = [{"steps": n, "instruction": TEXTS[0]} for n in (20, 4, 36)]
    return demonstrations


def batches_of(policy, *demonstrations):
    made = FlowBatches(policy.processor, policy.codec, CPU, policy.model.config.expert)
    for data in demonstrations:
        made.add(data)
    return made


def test_a_chunk_is_the_actions_that_follow_and_ends_with_the_episode(short):
    policy = trainable()
    more = dataclasses.replace(short, actions=short.actions + 0.001)
    batch = batches_of(policy, short, more).sample(200)
    scaled = ActionCodec(policy.config.action_codec).scale(
        np.concatenate([short.actions, more.actions]).astype(np.float64)
    )
    assert batch.actions.shape == (200, 6, 10) and (batch.actions[:, :, 7:] == 0).all()
    ends = np.cumsum([20, 4, 36] * 2)
    complete = 0
    for actions, known in zip(batch.actions.numpy(), batch.known.numpy(), strict=True):
        (row,) = np.nonzero(np.abs(scaled - actions[0, :7]).max(1) < 1e-5)[0]
        left = min(ends[ends > row][0] - row, 6)
        assert known.tolist() == [True] * left + [False] * (6 - left)
        np.testing.assert_allclose(actions[:left, :7], scaled[row : row + left], atol=1e-5)
        complete += left == 6
    assert 0 < complete < 200
    assert batch.inputs.pixel_values.shape == (200, 1, 3, 32, 32)


def test_the_loss_is_that_of_transformers_where_everything_is_known(short):
    from rlrc_ros.vla.pi0_upstream import upstream_inputs, upstream_model

    policy = trainable()
    batch = batches_of(policy, short).sample(4)
    batch.known[:] = True
    torch.manual_seed(3)
    found = flow_loss(policy.model, batch)
    torch.manual_seed(3)
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
    time, noise = beta.sample((4,)) * 0.999 + 0.001, torch.randn_like(batch.actions)
    given = upstream_inputs(policy.model.config, batch.inputs)
    expected = upstream_model(policy.model)(
        noise=noise, timestep=time, actions=batch.actions, **given
    ).loss
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_follows_the_episode_does_not_count(short):
    policy = trainable()
    batch = batches_of(policy, short).sample(64)
    assert not batch.known.all()
    torch.manual_seed(0)
    before = flow_loss(policy.model, batch)
    flow_of = policy.model.velocity

    def elsewhere_after_the_end(*arguments):
        return flow_of(*arguments) + 100.0 * ~batch.known[:, :, None]

    policy.model.velocity = elsewhere_after_the_end
    torch.manual_seed(0)
    assert torch.equal(flow_loss(policy.model, batch), before)


def test_it_learns_to_act(short, tmp_path):
    """Always the same chunk: after training that is what noise becomes."""
    policy = trainable(fresh=True, layers=((4, 1, 64),), expert=((4, 1, 64),))
    short.actions[:] = np.array([0.02, 0.0, -0.005, 0.01, 0.03, 0.02, 1.0], np.float32)
    data = batches_of(policy, short)
    config = dataclasses.replace(CONFIG, steps=120, batch_size=16, learning_rate=1e-2, average=0.0)
    FlowTrainer(policy.model, data, config, CPU, tmp_path).run()
    batch = data.sample(8)
    noise = start_noise(policy.model.config.expert).expand(8, -1, -1)
    found = policy.model.generate(batch.inputs, noise)
    assert F.mse_loss(noise, batch.actions) > 0.5
    assert F.mse_loss(found, batch.actions) < 0.05


def test_a_killed_run_goes_on_as_if_it_had_not_been(short, tmp_path):
    whole, broken, resumed = trainable(), trainable(), trainable(seed=9)

    class Mortal(FlowTrainer):
        def _update(self):
            if self._step == 7:
                raise KeyboardInterrupt
            return super()._update()

    torch.manual_seed(1)
    FlowTrainer(whole.model, batches_of(whole, short), CONFIG, CPU, tmp_path / "whole").run()
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        Mortal(broken.model, batches_of(broken, short), CONFIG, CPU, tmp_path / "broken").run()
    FlowTrainer(resumed.model, batches_of(resumed, short), CONFIG, CPU, tmp_path / "broken").run()
    other = resumed.model.state_dict()
    assert all(torch.equal(v, other[name]) for name, v in whole.model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"grounding": 0.1},
        {"label_width": 2.0},
        {"distillation": 0.5},
        {"freeze_vision": True},
        {"corrections": (CorrectionsConfig(at_step=2, episodes=1, first_seed=0),)},
    ],
)
def test_what_is_there_for_tokens_only(short, tmp_path, changes):
    policy, config = trainable(), dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=f"'{next(iter(changes))}' is not there for a pi0 policy"):
        flow.run(config, policy, batches_of(policy, short), seed=0, device=CPU, work=tmp_path)


def test_frames_of_several_cameras(short):
    policy = trainable()
    config = pi0_config(CAMERAS)
    policy.model, policy.config = random_pi0(config.architecture), config
    short.images = np.stack([short.images, 255 - short.images, 0 * short.images], 1)
    batch = batches_of(policy, short).sample(5, shift=2)
    pixels = batch.inputs.pixel_values
    assert pixels.shape == (5, 3, 3, 32, 32) and (pixels[:, 2] == -1).all()
    assert flow_loss(policy.model, batch).isfinite()


def test_demonstrations_that_do_not_fit(short, demonstrations):
    policy = trainable()
    short.images = short.images[:, :16]
    with pytest.raises(UserError, match="images are 16×32, and the policy's vision takes 32×32"):
        batches_of(policy, short)
    policy.config = pi0_config(CAMERAS)
    with pytest.raises(UserError, match="looks through 3 cameras, and the demonstrations hold the"):
        batches_of(policy, short)
