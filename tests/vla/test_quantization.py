from dataclasses import replace

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices, quantization
from rlrc_ros.vla.bundle import open_bundle, provenance, write_bundle
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.engine import EagerEngine, UnrolledEngine
from rlrc_ros.vla.policy import load_model, parameter_counts
from rlrc_ros.vla.processor import word_tokenizer
from tests.conftest import NF4, WORDS, bundle_config, random_model
from tests.vla.test_openvla import batch

EVERYTHING = ("llm", "vision", "projector")
INT8 = QuantizationConfig(method="bitsandbytes-int8", parts=EVERYTHING)


def written(path, config, **changes):
    """A policy quantized in memory, and the same in a bundle."""
    whole = bundle_config(quantization=config, **changes)
    model = random_model(whole)
    quantization.quantize(model, config)
    tensors, words = quantization.stored(model), word_tokenizer(WORDS)
    bundle = write_bundle(path, whole, tensors, words, provenance(None, "original"))
    return model, bundle


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-int8"])
@pytest.mark.parametrize("parts", [("llm",), ("vision",), ("projector",), EVERYTHING])
def test_any_parts_load_bit_for_bit_and_no_others_are_quantized(tmp_path, method, parts):
    config = QuantizationConfig(method=method, parts=parts)
    model, bundle = written(tmp_path / "bundle", config)
    loaded, inputs = load_model(open_bundle(bundle.path)), batch()
    with torch.no_grad():
        assert torch.equal(loaded.state(inputs), model.state(inputs))
        assert torch.equal(loaded.generate(inputs)[0], model.generate(inputs)[0])
    for name, part in loaded.parts.items():
        found = any(quantization.is_quantized(module) for module in part.modules())
        assert found == (name in parts)
    assert parameter_counts(loaded) == parameter_counts(random_model(bundle_config()))


def test_int8_is_a_quarter_of_the_bytes_and_close(tmp_path):
    model, _ = written(tmp_path / "bundle", INT8, layers=((2, 2, 256),) * 3)
    original = random_model(bundle_config(((2, 2, 256),) * 3))
    ours, whole = (m.language_model.model.layers[1].mlp.up_proj for m in (model, original))
    assert quantization.weight_bytes(ours) < 0.27 * quantization.weight_bytes(whole)
    torch.manual_seed(0)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        found, expected = ours(x), whole(x)
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < 0.02
        # The arithmetic that GPUs use, on this processor.
        quantized, scales, _ = quantization.bitsandbytes().functional.int8_vectorwise_quant(
            x.reshape(-1, 64).half()
        )
        other = torch.ops.bitsandbytes.int8_scaled_mm.default(
            quantized, ours.weight, scales, ours.SCB, bias=None, dtype=torch.float32
        )
    assert (other.view_as(expected) - expected).norm() / expected.norm() < 0.02


def test_int8_runs_fused_and_eager_alike_and_tells_what_it_holds(tmp_path):
    _, bundle = written(tmp_path / "bundle", INT8)
    one = batch()[:1]
    one.attention_mask = None
    eager, unrolled = EagerEngine(load_model(bundle)), UnrolledEngine(load_model(bundle))
    assert torch.equal(eager.bins(one), unrolled.bins(one))
    # Beside the weights as they are stored, the form in which this processor multiplies them.
    assert (
        unrolled.weight_bytes()["llm"]
        < 0.5 * EagerEngine(random_model(bundle_config())).weight_bytes()["llm"]
    )


def test_the_graph_engine_takes_int8_as_it_is_stored(tmp_path):
    model, _ = written(tmp_path / "bundle", INT8)
    attention = model.language_model.model.layers[0].self_attn
    whole = random_model(bundle_config()).language_model.model.layers[0].self_attn
    linears, exact = ([getattr(block, f"{p}_proj") for p in "qkv"] for block in (attention, whole))
    found = matrices.held(linears, torch.float32)
    expected = torch.cat([linear.weight for linear in exact])
    assert found.data.dtype == torch.int8 and found.shape == tuple(expected.shape)
    assert found.nbytes < 0.3 * expected.nbytes
    meant = matrices.unpack(found, torch.float32)
    assert (meant - expected).abs().max() <= 0.6 * expected.abs().max() / 127


def test_a_bias_and_other_dtypes(tmp_path):
    model, _ = written(tmp_path / "bundle", INT8)
    layer, whole = model.projector.fc1, random_model(bundle_config()).projector.fc1
    assert layer.bias is not None
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert (layer(x) - whole(x)).norm() / whole(x).norm() < 0.02
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_bundle_that_lacks_its_scales_is_refused(tmp_path):
    model, bundle = written(tmp_path / "bundle", INT8)
    tensors = quantization.stored(model)
    del tensors["projector.fc1.weight.SCB"]
    config = replace(bundle.config)
    write_bundle(tmp_path / "bad", config, tensors, word_tokenizer(WORDS), {})
    with pytest.raises(UserError, match=r"projector\.fc1 is int8, and .* no such weights"):
        load_model(open_bundle(tmp_path / "bad"))


def test_what_is_stored_loads_bit_for_bit(make_bundle):
    bundle = make_bundle(quantized=True)
    model = random_model(bundle_config())
    quantization.quantize(model, NF4)
    loaded = load_model(open_bundle(bundle.path))
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(loaded.state(inputs), model.state(inputs))


def test_only_the_decoders_projections_are_quantized():
    model = random_model(bundle_config())
    quantization.quantize(model, NF4)
    quantized = {n for n, module in model.named_modules() if quantization.is_quantized(module)}
    expected = {
        f"language_model.model.layers.{i}.{name}"
        for i in range(3)
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert quantized == expected


@pytest.mark.parametrize("width", [96, 224])
def test_blocks_of_nf4_that_go_on_in_the_next_row_stand_for_their_weights(width):
    """bitsandbytes' CPU kernel begins a new block with every row."""
    config = bundle_config(((2, 2, width),) * 3)
    model, original = random_model(config), random_model(config)
    quantization.quantize(model, NF4)
    torch.manual_seed(0)
    for name, module in model.language_model.model.layers.named_modules():
        if not quantization.is_quantized(module):
            continue
        whole = original.language_model.model.layers.get_submodule(name)
        stood_for = quantization.nf4_weight(module, torch.float32)
        assert (stood_for - whole.weight).norm() / whole.weight.norm() < 0.12
        assert torch.equal(matrices.held([module], torch.float32).data, stood_for) or (
            whole.in_features % 64 == 0
        )
        x = torch.randn(5, whole.in_features)
        torch.testing.assert_close(module(x), x @ stood_for.T)
        whole.weight.data = stood_for
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(model.state(inputs), original.state(inputs))
    one = batch(1)
    assert torch.equal(UnrolledEngine(model).bins(one), EagerEngine(original).bins(one))


def test_nf4_keeps_the_weights_nearly_and_a_seventh_of_their_bytes():
    model, original = random_model(bundle_config()), random_model(bundle_config())
    quantization.quantize(model, NF4)
    layers, whole = model.language_model.model.layers, original.language_model.model.layers
    for layer, reference in zip(layers, whole, strict=True):
        found = quantization.nf4_weight(layer.mlp.gate_proj, torch.float32)
        expected = reference.mlp.gate_proj.weight
        assert (found - expected).norm() / expected.norm() < 0.12
    small = quantization.weight_bytes(layers[0].mlp.gate_proj)
    # 64 × 64 weights: the tables for double quantization, about 1.2 kB a matrix, weigh as much.
    assert small < quantization.weight_bytes(whole[0].mlp.gate_proj) / 4
