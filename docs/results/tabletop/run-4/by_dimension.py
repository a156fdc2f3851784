"""Held-out cross-entropy and accuracy of each action token, and how often it is far off.

python docs/results/tabletop/run-4/by_dimension.py DEMONSTRATIONS BUNDLE …
"""

import json
import sys
from pathlib import Path

import torch

from training.bundles import load_trainable
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import read

CPU = torch.device("cpu")
FAR = 12  # bins of 256

data = read(Path(sys.argv[1]))
for name in sys.argv[2:]:
    policy = load_trainable(name, CPU)
    batches = DemonstrationBatches(policy.processor, policy.codec, CPU)
    batches.add(data)
    torch.manual_seed(5)
    batch = batches.sample(2304)
    with torch.no_grad():
        logits = policy.model.eval()(batch.inputs, batch.bins)[0].float()
    distance = torch.arange(logits.shape[-1]) - batch.bins[..., None]
    targets = (-0.5 * (distance / 2.0) ** 2).softmax(-1)  # as trained: label_width 2
    error = (logits.argmax(-1) - batch.bins).abs()
    found = {
        "soft_cross_entropy": -(targets * logits.log_softmax(-1)).sum(-1),
        "accuracy": (error == 0).float(),
        "far": (error > FAR).float(),
    }
    rounded = {key: [round(x, 3) for x in value.mean(0).tolist()] for key, value in found.items()}
    print(json.dumps({"bundle": name, **rounded}))
