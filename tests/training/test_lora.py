import dataclasses

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla.policy import load_policy
from tests.training.test_flow import trainable as pi0
from training import sft
from training.bundles import load_trainable
from training.config import CorrectionsConfig, LoraConfig, SftConfig, load_config
from training.lora import Adapters
from training.rollout import Decoder
from training.sft import Trainer

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8, targets=("decoder", "vision"))
CONFIG = SftConfig(
    steps=6, batch_size=8, learning_rate=1e-2, warmup_steps=1, average=0.5, lora=LORA
)


def disturbed(model):
    """Adapters as they are after training: a fresh one adds nothing."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_adapters_alone_learn_and_are_folded_in(trainable, batches, tmp_path):
    policy = trainable()
    before = weights(policy.model)
    trainer = Trainer(policy.model, batches(policy), CONFIG, CPU, tmp_path)
    learning = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    state = sum(value.numel() for value in trainer._average.values())
    assert state < 0.15 * sum(value.numel() for value in before.values())
    trainer.run()
    after = weights(policy.model)
    assert after.keys() == before.keys()
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    linear = ("_proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    blocks = ("language_model.model.layers", "vision_backbone.featurizer.blocks")
    assert moved == {n for n in before if n.startswith(blocks) and n.endswith(linear)}


def test_a_saved_policy_acts_as_the_adapted_one_did(trainable, batches, tmp_path, observation):
    policy = trainable()
    adapters = Adapters(policy.model, LORA, torch.float32)
    disturbed(policy.model)
    batch = batches(policy).sample(8)
    with torch.no_grad():
        adapted, _ = policy.model.eval()(batch.inputs, batch.bins)
    adapters.fold()
    saved = policy.save(tmp_path / "bundle", "recovered")
    read = load_trainable(saved.path, CPU)
    with torch.no_grad():
        found, _ = read.model(batch.inputs, batch.bins)
    torch.testing.assert_close(found, adapted, atol=5e-3, rtol=5e-3)  # it is stored in float16
    assert (found.argmax(-1) == adapted.argmax(-1)).float().mean() > 0.95
    assert load_policy(saved.path).act(observation).actions.shape == (1, 7)


def test_a_folded_policy_decodes_as_the_adapted_one_and_comes_back_to_the_bit(trainable, batches):
    policy = trainable()
    batch = batches(policy).sample(4)
    batch.inputs.attention_mask = None
    adapters = Adapters(policy.model, LORA, torch.float32)
    disturbed(policy.model)
    before = weights(policy.model.eval())
    with torch.no_grad():
        adapted, state = policy.model(batch.inputs, batch.bins)
    with adapters.folded():
        assert not any("lora" in name for name in policy.model.state_dict())
        bins, _, seen = Decoder(policy.model, 4)(batch.inputs)
    torch.testing.assert_close(seen, state, atol=1e-4, rtol=1e-4)
    assert torch.equal(bins[:, 0], adapted[:, 0].argmax(-1))
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_a_base_kept_in_half_the_bytes_loses_nothing(trainable, batches, source):
    policy = trainable()
    policy.model.to(source).float()
    before = weights(policy.model)
    batch = batches(policy).sample(4)
    adapters = Adapters(policy.model, LORA, torch.bfloat16)
    held = policy.model.state_dict()
    halved = {name for name, value in held.items() if value.dtype == torch.bfloat16}
    # Towers and decoder but for what is run in float32: norms, embeddings and what is learnt.
    assert len(halved) == 2 * 4 + 3 * 7 and all(name.endswith("weight") for name in halved)
    assert any(len(lost) for lost in adapters._lost.values()) == (source == torch.float16)
    policy.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        policy.model(batch.inputs, batch.bins)[0].float().sum().backward()
    adapters.fold()
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_corrections_are_collected_with_a_plain_policy(trainable, batches, tmp_path):
    rounds = (CorrectionsConfig(at_step=3, episodes=1, first_seed=0),)
    policy, seen = trainable(), []

    def correct(_, model):
        seen.append((weights(model), model.training))

    config = dataclasses.replace(CONFIG, corrections=rounds)
    plain = weights(policy.model)
    Trainer(policy.model, batches(policy), config, CPU, tmp_path, correct).run()
    ((during, training),) = seen
    assert during.keys() == plain.keys() and not training
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(during[name], plain[name])
    assert not torch.equal(during[name], policy.model.state_dict()[name])


def test_both_decoders_of_a_pi0_are_adapted():
    policy = pi0()
    names = set(policy.model.state_dict())
    adapters = Adapters(policy.model, LORA, torch.float32)
    parts = {n.split(".")[0] for n, p in policy.model.named_parameters() if p.requires_grad}
    assert parts == {"language_model", "expert", "vision_backbone"}
    adapters.fold()
    assert set(policy.model.state_dict()) == names


def test_a_new_policy_has_nothing_to_adapt(trainable, batches, tmp_path):
    policy = trainable()
    with pytest.raises(UserError, match="'lora' adapts a trained policy; name one with --policy"):
        sft.run(
            CONFIG,
            policy,
            batches(policy),
            seed=0,
            device=CPU,
            work=tmp_path,
            latency=(0.0, 0.0),
        )


def test_lora_stands_in_a_configuration(tmp_path):
    from rlrc_ros.paths import config_file

    text = config_file("training", "tiny").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(
        text.replace("recovery:\n", "recovery:\n  lora: {rank: 8, targets: [vision]}\n")
    )
    assert load_config(path).recovery.lora == LoraConfig(rank=8, targets=("vision",))
    path.write_text(text.replace("sft:\n", "sft:\n  lora: {}\n"))
    with pytest.raises(UserError, match="'recovery' can have it"):
        load_config(path)
    path.write_text(text.replace("recovery:\n", "recovery:\n  lora: {}\n  freeze_vision: true\n"))
    with pytest.raises(UserError, match="leave 'freeze_vision' out"):
        load_config(path)
