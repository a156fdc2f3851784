import sys

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import load_policy, quantization
from rlrc_ros.vla.engine import EagerEngine
from tests.conftest import NF4, bundle_config, random_model
from tests.vla.test_graph_engine import observed, openvla

pytest.importorskip("openvino")
from rlrc_ros.vla.openvino_engine import OpenVINOEngine


def test_it_gives_eager_tokens_of_quantized_and_uneven_layers():
    config = bundle_config(((2, 1, 64), (1, 1, 32)))
    model = random_model(config)
    quantization.quantize(model, NF4)
    eager, engine = EagerEngine(model), OpenVINOEngine(model, lengths=(16,))
    for seed, tokens in enumerate((9, 16, 12)):
        _, inputs = observed(config, tokens, seed)
        assert torch.equal(eager.bins(inputs), engine.bins(inputs)), seed
    broken = observed(config)[1]
    broken.pixel_values[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        engine.bins(broken)


def test_the_towers_of_openvla_and_a_prompt_longer_than_any_prepared_for(caplog):
    config, model = openvla(layers=1)
    eager, engine = EagerEngine(model), OpenVINOEngine(model, lengths=(8,))
    _, inputs = observed(config)
    assert torch.equal(eager.bins(inputs), engine.bins(inputs))
    assert "longer than any that was prepared for" in caplog.text


def test_without_openvino_it_says_what_to_install(make_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        load_policy(make_bundle().path, engine="openvino")
