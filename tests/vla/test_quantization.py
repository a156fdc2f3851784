import torch

from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.policy import load_model
from tests.conftest import NF4, bundle_config, random_model
from tests.vla.test_openvla import batch


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


def test_nf4_keeps_the_weights_nearly_and_a_seventh_of_their_bytes():
    model, original = random_model(bundle_config()), random_model(bundle_config())
    quantization.quantize(model, NF4)
    layers, whole = model.language_model.model.layers, original.language_model.model.layers
    dequantize = quantization.bitsandbytes().functional.dequantize_4bit
    for layer, reference in zip(layers, whole, strict=True):
        weight = layer.mlp.gate_proj.weight
        found, expected = (
            dequantize(weight.data, weight.quant_state),
            reference.mlp.gate_proj.weight,
        )
        assert (found - expected).norm() / expected.norm() < 0.12
    small = quantization.weight_bytes(layers[0].mlp.gate_proj)
    # 64 × 64 weights: the tables for double quantization, about 1.2 kB a matrix, weigh as much.
    assert small < quantization.weight_bytes(whole[0].mlp.gate_proj) / 4
