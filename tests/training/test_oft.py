"""Training a policy that gives chunks (OpenVLA-OFT)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.paths import config_file
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import layer_widths
from rlrc_ros.vla.policy import build_model
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS, bundle_config, chunked, random_model
from tests.training.conftest import batches_of
from tests.training.test_prune import FFN, KV, planned, plans
from tests.training.test_sft import CONFIG, CPU
from tests.vla.test_openvla import batch
from training import prune, rl
from training.bundles import Trainable, load_trainable, new_trainable
from training.compress import Pipeline
from training.config import SparsifyConfig, load_config
from training.data.demonstrations import Episode, encode_png, read, write_shard
from training.rollout import Actor
from training.sft import Trainer, bc_loss
from training.sparsify import sparsify

LAYERS = ((4, 4, 128),) * 4


def policy_of(images=1, layers=LAYERS, seed=0):
    config = chunked(bundle_config(layers), images)
    torch.manual_seed(seed)
    return Trainable(build_model(config), config, word_tokenizer(WORDS), None)


@settings(max_examples=10)
@given(plans(), st.integers(0, 100))
def test_cutting_equals_masking(plan, seed):
    per_group, layers, cuts = plan
    whole = chunked(bundle_config(((KV * per_group, KV, FFN),) * 3))
    model, masked = (random_model(whole, seed) for _ in range(2))
    with torch.no_grad():
        for index, layer in enumerate(masked.language_model.model.layers):
            heads = layer.self_attn.o_proj.weight.view(64, KV * per_group, 32)
            if index not in layers:
                heads.zero_()
                layer.mlp.down_proj.weight.zero_()
                continue
            chosen = cuts[layers.index(index)]
            heads.view(64, KV, -1)[:, list(chosen.groups)] = 0
            heads[:, list(chosen.heads)] = 0
            layer.mlp.down_proj.weight[:, list(chosen.channels)] = 0
    prune.cut(model, layers, cuts)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), masked(batch()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", ["taylor", "activation", "magnitude"])
def test_a_pruned_policy_reads_back_with_its_widths(
    demonstrations, observation, importance, tmp_path
):
    policy = policy_of()
    asked = planned("both", importance, remove_of_llm=0.3)
    facts = prune.run(asked, policy, batches_of(demonstrations, policy), seed=0)
    assert facts["removed_of_llm"] >= 0.3
    widths = layer_widths(policy.model.language_model)
    bundle = policy.save(tmp_path / "pruned", "pruned", **facts)
    assert (
        bundle.config.architecture.decoder.layers
        == widths
        != layer_widths(policy_of().model.language_model)
    )
    again = load_trainable(bundle.path, CPU)
    torch.testing.assert_close(again.model(batch()), policy.model(batch()), atol=0.01, rtol=0.01)
    eager, graph = (load_policy(bundle.path, engine=engine) for engine in ("eager", "graph"))
    actions = eager.act(observation).actions
    assert actions.shape == (8, 7)
    np.testing.assert_allclose(graph.act(observation).actions, actions, atol=1e-5)


def test_sparsity_is_calibrated_on_it_too(demonstrations):
    policy = policy_of(layers=((2, 2, 64),) * 2)
    config = SparsifyConfig(method="sparsegpt", sparsity=0.5, calibration_samples=32)
    sparsify(policy.model, batches_of(demonstrations, policy), config)
    weight = policy.model.language_model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_the_l1_distance_falls(demonstrations, tmp_path):
    policy = policy_of(layers=((2, 2, 64),) * 2)
    data = batches_of(demonstrations, policy)
    torch.manual_seed(0)
    seen = data.sample(60)
    before = bc_loss(policy.model, seen)
    config = dataclasses.replace(CONFIG, steps=50, batch_size=16, label_width=0.0, average=0.0)
    metrics = Trainer(policy.model, data, config, CPU, tmp_path).run()
    assert bc_loss(policy.model, seen) < 0.7 * before
    assert metrics["loss"] > 0 and 0 <= metrics["token_accuracy"] <= 1


def test_a_chunk_goes_on_from_its_step_and_ends_with_its_episode(demonstrations):
    policy = policy_of()
    data = batches_of(
        dataclasses.replace(demonstrations, episodes=[{"steps": n} for n in (3, 50, 7)]), policy
    )
    data.add(dataclasses.replace(demonstrations, episodes=[{"steps": 60}]))
    codec = ActionCodec(policy.config.action_codec)
    scaled = np.tile(codec.scale(demonstrations.actions.astype(np.float64)).clip(-1, 1), (2, 1))
    starts = torch.arange(120)
    chunks = data._chunks(starts)
    ends = np.repeat([2, 52, 59, 119], [3, 50, 7, 60])
    for start, end in enumerate(ends):
        rows = np.minimum(start + np.arange(8), end)
        np.testing.assert_allclose(chunks[start], scaled[rows], atol=1e-6)


def test_frames_of_two_cameras_stay_apart(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 2, 64, 64, 3), dtype=np.uint8)
    numbers = (rng.normal(size=(5, n)).astype(np.float32) for n in (8, 7, 1))
    facts = {"instruction": "put the red cube on the blue plate"}
    episode = Episode([encode_png(image) for step in frames for image in step], *numbers, facts)
    write_shard(tmp_path / "shard-00000.safetensors", [episode])
    read_back = read(tmp_path)
    assert (read_back.images == frames).all() and read_back.episodes[0]["steps"] == 5

    policy = policy_of(images=2)
    data = batches_of(read_back, policy)
    assert data.sample(4, brightness=0.1, shift=3).inputs.pixel_values.shape == (4, 6, 64, 64)
    pixels = data.sample(1).inputs.pixel_values[0]
    step = next(i for i in range(5) if torch.equal(_pixels(policy, frames[i]), pixels))
    assert bc_loss(policy.model, data.sample(3)).isfinite() and 0 <= step < 5
    with pytest.raises(UserError, match="looks through 1 cameras, and the demonstrations hold the"):
        batches_of(read_back, policy_of())
    write_shard(tmp_path / "shard-00001.safetensors", [_of_one_camera(episode)])
    with pytest.raises(UserError, match="some shards hold frames of 1 camera, others of 2"):
        read(tmp_path)


def _pixels(policy, frames):
    return policy.processor.stacked(frames)[0]


def _of_one_camera(episode):
    return dataclasses.replace(episode, images=episode.images[::2])


def test_in_rollouts_the_first_action_of_each_chunk_is_taken():
    policy = policy_of()
    policy.model.eval()
    inputs = batch(2)
    actor = Actor(policy.model, policy.processor, policy.codec, CPU, 2)
    actor._batch = lambda _: inputs
    with torch.no_grad():
        first = policy.codec.unscale(policy.model(inputs)[:, 0].double().numpy())
    np.testing.assert_array_equal(actor.act({}), first)


def test_a_new_policy_gives_chunks_where_its_shape_says_so(tmp_path):
    config = load_config(config_file("training", "tiny"))
    shape = dataclasses.replace(config.model, chunk=4)
    policy = new_trainable(shape, np.zeros((2, 8), np.float32), CPU)
    assert policy.model.config.action_head.chunk == 4
    with pytest.raises(UserError, match="compress: its PPO takes probabilities"):
        Pipeline(dataclasses.replace(config, model=shape), tmp_path / "run", "cpu", print)
    assert not (tmp_path / "run").exists()


def test_what_needs_tokens_is_refused(tmp_path, demonstrations):
    policy = policy_of()
    data = batches_of(demonstrations, policy)
    with pytest.raises(UserError, match="rl: PPO takes probabilities of actions"):
        rl.run(None, policy, data, seed=0, device=CPU, work=tmp_path, latency=(0.0, 0.0))
    with pytest.raises(UserError, match="label_width is about tokens"):
        Trainer(policy.model, data, CONFIG, CPU, tmp_path)
