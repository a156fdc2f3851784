"""LoRA on the shape of OpenVLA-7B: memory and speed by micro-batch, with and without recomputing.

    python docs/results/training/lora_7b.py lora_7b.json

Random weights and demonstrations of nothing: neither memory nor speed hangs on what they are. Uses
`rlrc sft`'s own trainer, without compiling and CUDA graph, which take longer than the measurement.
A variant that does not fit says so; one that would begin too late is left out.
"""

import argparse
import csv
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rlrc_ros.cli.bench_shape import openvla_7b
from rlrc_ros.timing import machine
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.config import LayerWidths
from rlrc_ros.vla.policy import build_model
from rlrc_ros.vla.processor import Processor, word_tokenizer
from training.config import LoraConfig, SftConfig
from training.data.batches import DemonstrationBatches
from training.data.demonstrations import Demonstrations
from training.sft import Trainer

TEXT = "put the red block into the open box"
BATCH = 32
STEPS = 5
"""Of which the last three are counted."""
VARIANTS = [(8, True), (8, False), (32, True), (4, False), (16, True), (16, False), (4, True)]
"""Micro-batch, and whether blocks are computed anew."""
BUDGET = 110.0
"""s, after which no other variant begins."""


def small(config):
    """The same in every part and tiny, for a CPU."""
    towers = tuple(
        dataclasses.replace(tower, width=32, depth=3, heads=2, ffn=64, patch=56)
        for tower in config.architecture.towers
    )
    decoder = dataclasses.replace(
        config.architecture.decoder,
        hidden_size=64,
        head_dim=32,
        layers=(LayerWidths(2, 2, 128),) * 3,
    )
    architecture = dataclasses.replace(config.architecture, towers=towers, decoder=decoder)
    return dataclasses.replace(config, architecture=architecture)


def demonstrations(size, count=64):
    rng = np.random.default_rng(0)
    return Demonstrations(
        images=rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        proprioception=np.zeros((count, 1), np.float32),
        actions=rng.uniform(-1, 1, (count, 7)).astype(np.float32),
        grounding=np.full((count, 1), np.nan, np.float32),
        prompts=np.zeros(count, np.int64),
        instructions=[TEXT],
        episodes=[{"steps": count, "instruction": TEXT}],
    )


class Watched(Trainer):
    """Without a CUDA graph, and with a look at the memory before the adapters are folded in."""

    def _train(self):
        self._captured = None
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        super()._train()
        self.facts = {
            "learning_parameters": sum(p.numel() for p in self._learning.values()),
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        }


def measure(model, batches, config, device):
    """One variant; afterwards the policy is plain again."""
    for parameter in model.parameters():  # as the checkpoint's weights: what is folded in has more
        parameter.data = parameter.data.bfloat16().float()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as work:
        trainer = Watched(model, batches, config, device, Path(work))
        try:
            trainer.run()
        except torch.OutOfMemoryError:
            trainer._optimizer.zero_grad()
            trainer._adapters.fold()
            return {"fits": False}
        with (Path(work) / "log.csv").open() as file:
            rates = [float(row["samples_per_s"]) for row in csv.DictReader(file)]
    return {"fits": True, "samples_per_s": float(np.median(rates[2:])), **trainer.facts}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try it on a CPU")
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    config = small(openvla_7b()) if arguments.small else openvla_7b()
    with device:
        model = build_model(config)
    words = dataclasses.replace(
        config, instruction_template="in: {instruction} out:", prompt_suffix_token=None
    )
    processor = Processor(words, word_tokenizer(["in", ":", "out", *TEXT.split()]))
    batches = DemonstrationBatches(processor, ActionCodec(config.action_codec), device)
    size = config.architecture.towers[0].image_size
    batches.add(demonstrations(size))
    prompt = len(processor.token_ids(TEXT))
    tokens = config.architecture.context + prompt + config.action_codec.dimensions - 1
    rows = []
    for micro_batch, recompute in VARIANTS:
        row = {"micro_batch": micro_batch, "gradient_checkpointing": recompute}
        if time.perf_counter() - began > BUDGET:
            row["left_out"] = f"would have begun after {BUDGET:.0f} s"
        else:
            sft = SftConfig(
                steps=STEPS,
                batch_size=BATCH,
                learning_rate=5e-4,
                warmup_steps=0,
                average=0.0,
                micro_batch=micro_batch,
                gradient_checkpointing=recompute,
                lora=LoraConfig(),
            )
            row |= measure(model, batches, sft, device)
            if row["fits"]:
                row["tokens_per_s"] = row["samples_per_s"] * tokens
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    result = {
        "machine": machine() | {"device": name_of(device)},
        "torch": torch.__version__,
        "shape": "small" if arguments.small else "openvla-7b",
        "parameters": sum(p.numel() for p in model.parameters()),
        "decoder_tokens_per_sample": tokens,
        "batch_size": BATCH,
        "lora": dataclasses.asdict(LoraConfig()),
        "compiled": False,
        "rows": rows,
        "seconds": time.perf_counter() - began,
    }
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


def name_of(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
