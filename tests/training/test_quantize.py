import json
import subprocess
import sys

import pytest
import torch

from rlrc_ros.errors import UserError
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


WATCH = """
import json, sys, threading, time
from pathlib import Path
import torch
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.quantization import bitsandbytes, quantizable, weight_bytes
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.policy import empty_model
from training.quantize import load_quantized

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

config = QuantizationConfig(method=sys.argv[2], parts=("llm", "vision", "projector"))
bitsandbytes().functional.quantize_4bit(torch.randn(64, 64))  # what it imports when first used
empty_model(open_bundle(sys.argv[1]))  # the modules themselves take some memory
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
policy = load_quantized(sys.argv[1], config, torch.device("cpu"))
done.set()
thread.join()
held = sum(weight_bytes(part) for part in policy.model.parts.values())
print(json.dumps({"rise": peak[0] - before, "held": held}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_full_precision_copy_is_made_on_the_way(trainable, tmp_path):
    """The file is memory-mapped, so what matters is memory that is not the file's."""
    policy = trainable(((32, 32, 4096),) * 20)
    bundle = policy.save(tmp_path / "whole", "original")
    stored = (bundle.path / "model.safetensors").stat().st_size
    words = [sys.executable, "-c", WATCH, str(bundle.path), "bitsandbytes-nf4"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["held"] < 0.35 * stored
    assert found["rise"] < found["held"] + 0.5 * stored  # a half-precision copy is all of it
