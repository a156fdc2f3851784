import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.bundle import provenance, write_bundle
from rlrc_ros.vla.config import LayerWidths
from rlrc_ros.vla.openvla import layer_widths
from rlrc_ros.vla.pi0_engine import Pi0GraphEngine
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import WORDS
from tests.training.conftest import TEXTS
from tests.vla.pi0_policies import architecture, noise, observed, pi0_config, random_pi0
from tests.vla.test_pi0_engine import both
from training import prune_pi0
from training.bundles import Trainable, load_trainable
from training.config import PruneConfig
from training.prune import LayerCut

HEADS, FFN, EXPERT_FFN = 4, 128, 64


def config(part="llm", granularity="width", remove=0.5, importance="magnitude", **changes):
    return PruneConfig(
        part=part,
        granularity=granularity,
        remove=remove,
        importance=importance,
        ffn_multiple=16,
        calibration_samples=16,
        calibration_batch=8,
        **changes,
    )


@st.composite
def layer_cuts(draw, kv_heads, ffn):
    channels = draw(st.sets(st.integers(0, ffn - 1), max_size=ffn - 1))
    per_group = HEADS // kv_heads
    fewer = draw(st.integers(0, per_group - 1))
    heads = []
    for group in range(kv_heads):
        heads += [group * per_group + i for i in draw(st.permutations(range(per_group)))[:fewer]]
    return LayerCut((), tuple(sorted(heads)), tuple(sorted(channels)))


@st.composite
def plans(draw):
    """(key-value heads, layers that stay, their cuts in the VLM and in the expert) of 3 layers."""
    kv_heads = draw(st.sampled_from([1, 2]))
    layers = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
    cuts = [[draw(layer_cuts(kv_heads, ffn)) for _ in layers] for ffn in (FFN, EXPERT_FFN)]
    return kv_heads, layers, cuts


def mask(module, layers, cuts):
    """Zeros where something is to go; returns the layers that stay whole in the residual."""
    for index, layer in enumerate(module.model.layers):
        out, down = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
        if index not in layers:
            out.zero_()
            down.zero_()
            continue
        chosen = cuts[layers.index(index)]
        out.view(len(out), HEADS, -1)[:, list(chosen.heads)] = 0
        down[:, list(chosen.channels)] = 0


@settings(max_examples=20)
@given(plans(), st.integers(0, 100))
def test_cutting_equals_masking(plan, seed):
    """What is left computes what the whole does with all that was removed at zero."""
    kv_heads, layers, cuts = plan
    shape = {
        "layers": ((HEADS, kv_heads, FFN),) * 3,
        "expert": ((HEADS, kv_heads, EXPERT_FFN),) * 3,
    }
    model = random_pi0(architecture(**shape), seed)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for module, chosen in zip((masked.language_model, masked.expert), cuts, strict=True):
            mask(module, layers, chosen)
    prune_pi0.cut(model, layers, *cuts)
    for module, chosen, ffn in zip(
        (model.language_model, model.expert), cuts, (FFN, EXPERT_FFN), strict=True
    ):
        widths = [
            LayerWidths(HEADS - len(c.heads), kv_heads, ffn - len(c.channels)) for c in chosen
        ]
        assert layer_widths(module) == tuple(widths)
    inputs, start = observed(model.config), noise(model.config)
    found = model.generate(inputs, start)
    torch.testing.assert_close(found, masked.generate(inputs, start), atol=2e-5, rtol=0)
    assert (found - start).abs().max() > 0.05
    raw, normalised = both(model.config)
    expected = model.generate(normalised, start)
    engine = Pi0GraphEngine(model, start[0])
    torch.testing.assert_close(engine.chunk(raw), expected, atol=2e-5, rtol=0)


def test_the_last_layer_unprotected_is_as_any_other():
    model = random_pi0(architecture())
    prune_pi0.prune(model, config(protect=0), None)
    assert len({*model.config.decoder.layers}) == 1


def test_keys_and_values_stay_and_the_other_part_too():
    model = random_pi0(architecture())
    before = copy.deepcopy(model)
    plan = prune_pi0.prune(model, config(), None)
    assert model.config.expert == before.config.expert and plan.layers == (0, 1, 2)
    first, inner, last = model.config.decoder.layers
    assert first == LayerWidths(4, 1, 128) and inner.kv_heads == 1
    assert inner.heads < 4 or inner.ffn < 128
    assert last == LayerWidths(1, 1, 16)
    for old, new in zip(
        before.language_model.model.layers, model.language_model.model.layers, strict=True
    ):
        assert torch.equal(old.self_attn.k_proj.weight, new.self_attn.k_proj.weight)
        assert torch.equal(old.self_attn.v_proj.weight, new.self_attn.v_proj.weight)


def test_what_is_never_used_of_the_last_layer_goes_without_a_trace():
    model = random_pi0(architecture())
    inputs, start = observed(model.config), noise(model.config)
    before = model.generate(inputs, start)
    last = LayerCut(heads=(0, 1, 3), channels=tuple(range(112)))
    prune_pi0.cut(model, [0, 1, 2], llm=[LayerCut(), LayerCut(), last])
    assert torch.equal(model.generate(inputs, start), before)


def test_the_expert_alone():
    model = random_pi0(architecture())
    plan = prune_pi0.prune(model, config("expert", remove=0.2), None)
    assert model.config.decoder == architecture().decoder
    assert plan.removed >= 0.2
    assert [w.kv_heads for w in model.config.expert.layers] == [1, 1, 1]
    whole = LayerWidths(4, 1, 64)
    assert model.config.expert.layers[0] == model.config.expert.layers[-1] == whole


@pytest.mark.parametrize("part", ["llm", "expert"])
def test_whole_layers_go_from_both(part):
    shape = {"layers": ((4, 1, 128),) * 6, "expert": ((4, 1, 64),) * 6}
    model = random_pi0(architecture(**shape))
    with torch.no_grad():  # the expert's layer 2 and the language model's layer 3 hardly matter
        for layers, index in (
            (model.expert.model.layers, 2),
            (model.language_model.model.layers, 3),
        ):
            for parameter in layers[index].parameters():
                parameter *= 0.01
    plan = prune_pi0.prune(model, config(part, "depth", remove=0.3), None)
    assert plan.layers == (0, 1, 4, 5)
    assert len(model.config.decoder.layers) == len(model.config.expert.layers) == 4
    assert model.generate(observed(model.config), noise(model.config)).isfinite().all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (PruneConfig(remove=0.5, keep_layers=2), "give 'remove' or 'max_latency_ms', with"),
        (
            PruneConfig(remove_of_llm=0.5, granularity="width"),
            "give 'remove' or 'max_latency_ms', with",
        ),
        (config(attention="groups"), "which pi0's language model and action expert share"),
        (config(importance="activation"), "pi0 has importance 'taylor', 'magnitude' and 'random'"),
        (config(importance="taylor"), "is measured on demonstrations; give them"),
        (config(remove=0.9), "cannot be removed, at most"),
    ],
)
def test_what_cannot_be_pruned(how, message):
    model = random_pi0(architecture())
    before = model.config
    with pytest.raises(UserError, match=message):
        prune_pi0.prune(model, how, None)
    assert model.config == before


@pytest.fixture
def pi0_bundle(tmp_path):
    model_config = pi0_config(("front",))
    model = random_pi0(model_config.architecture)
    tokenizer = word_tokenizer([*WORDS, *" ".join(TEXTS).split()])
    origin = provenance(None, "original")
    return write_bundle(tmp_path / "pi0", model_config, model.state_dict(), tokenizer, origin)


@pytest.fixture
def pi0_demonstrations(demonstrations):
    demonstrations.images = demonstrations.images[:, ::2, ::2].copy()
    return demonstrations


def test_by_the_flows_gradients(pi0_bundle, pi0_demonstrations):
    from training.flow import FlowBatches

    trainable = load_trainable(pi0_bundle.path, torch.device("cpu"), pi0=True)
    expert = trainable.model.config.expert
    batches = FlowBatches(trainable.processor, trainable.codec, torch.device("cpu"), expert)
    batches.add(pi0_demonstrations)
    facts = prune_pi0.run(config(importance="taylor"), trainable, batches, seed=0)
    assert facts["part"] == "llm" and facts["removed_of_layers"] >= 0.5
    assert 0 < facts["removed_of_policy"] < facts["removed_of_layers"]
    assert all(p.requires_grad and p.grad is None for p in trainable.model.parameters())


def test_a_part_is_pi0s(trainable):
    from training import prune

    with pytest.raises(UserError, match="'part' is for pi0 policies"):
        prune.run(config(), trainable(), None, seed=0)


def test_saved_with_widths_of_its_own_it_acts_alike(pi0_bundle, tmp_path):
    trainable = load_trainable(pi0_bundle.path, torch.device("cpu"), pi0=True)
    prune_pi0.run(config(granularity="both"), trainable, None, seed=0)
    assert isinstance(trainable, Trainable)
    for parameter in trainable.model.parameters():
        parameter.data = parameter.data.half().float()  # as it will be stored
    saved = trainable.save(tmp_path / "pruned", "pruned")
    policy = load_policy(saved.path)
    inputs = observed(trainable.model.config)
    start = policy.engine._noise
    expected = trainable.model.generate(inputs, start[None])
    torch.testing.assert_close(policy.engine.chunk(inputs), expected, atol=1e-5, rtol=0)
