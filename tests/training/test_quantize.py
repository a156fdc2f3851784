import weakref

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import quantization
from rlrc_ros.vla.config import QuantizationConfig
from training import quantize
from training.bundles import load_trainable

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-int8"])
@pytest.mark.parametrize("parts", [("llm",), ("llm", "vision", "projector")])
def test_from_disk_and_from_memory_give_the_same_bundle(trainable, tmp_path, method, parts):
    config = QuantizationConfig(method=method, parts=parts)
    trainable().save(tmp_path / "whole", "original")
    loaded = load_trainable(tmp_path / "whole", CPU)
    facts = quantize.run(config, loaded)
    straight = quantize.load_quantized(tmp_path / "whole", config, CPU)
    assert quantize.facts(straight) == facts
    for name, policy in (("memory", loaded), ("disk", straight)):
        policy.save(tmp_path / name, "compressed", **facts)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        memory, disk = ((tmp_path / name / file).read_bytes() for name in ("memory", "disk"))
        assert memory == disk
    with pytest.raises(UserError, match="is quantized; quantize its parent"):
        quantize.load_quantized(tmp_path / "disk", config, CPU)


def test_no_two_matrices_are_held_in_full_precision(trainable, tmp_path, monkeypatch):
    trainable(((2, 2, 64),) * 4).save(tmp_path / "whole", "original")
    alive, most = weakref.WeakSet(), []
    convert = quantization._quantized

    def watched(linear, weight, bias, config):
        assert linear.weight.is_meta
        alive.add(weight)
        most.append(len(alive))
        return convert(linear, weight, bias, config)

    monkeypatch.setattr(quantization, "_quantized", watched)
    config = QuantizationConfig(method="bitsandbytes-nf4", parts=("llm",))
    quantize.load_quantized(tmp_path / "whole", config, CPU)
    assert len(most) == 4 * 7 and set(most) == {1} and not alive
