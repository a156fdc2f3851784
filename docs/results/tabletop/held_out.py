"""How well bundles predict the expert in scenes they have not seen, teacher-forced.

python docs/results/tabletop/held_out.py DEMONSTRATIONS BUNDLE …
"""

import json
import sys
from pathlib import Path

import torch

from training.bundles import load_trainable
from training.config import SftConfig
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import read
from training.sft import GroundingHead, sft_losses

CPU = torch.device("cpu")
# As the runs were trained; the grounding loss is left out, its head is not in the bundle.
CONFIG = SftConfig(steps=1, batch_size=1, learning_rate=1.0, warmup_steps=0, label_width=2.0)

data = read(Path(sys.argv[1]))
for name in sys.argv[2:]:
    policy = load_trainable(name, CPU)
    batches = DemonstrationBatches(policy.processor, policy.codec, CPU)
    batches.add(data)
    torch.manual_seed(5)
    batch = batches.sample(768)
    head = GroundingHead(policy.model.config.decoder.hidden_size, batches.grounding_size)
    with torch.no_grad():
        losses = sft_losses(policy.model.eval(), head, batch, CONFIG)
    found = {"soft_cross_entropy": losses.total.item(), "accuracy": losses.token_accuracy.item()}
    print(json.dumps({"bundle": name, "scenes": len(data.episodes), "steps": 768, **found}))
