"""Small checkpoints laid out as upstream publishes them, with what is to be expected of them."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from rlrc_ros.vla.config import ArchitectureConfig, DecoderConfig, LayerWidths, TowerConfig
from rlrc_ros.vla.openvla import OpenVLA

VOCABULARY, PADDING = 32064, 64
KEYS = ("bridge_orig", "toy_arm")
MEANS, STDS = ([0.48, 0.46, 0.41], [0.5] * 3), ([0.23, 0.22, 0.22], [0.5] * 3)


def architecture(dino=(64, 2), siglip=(72, 3), hidden=32, heads=2, kv_heads=2, layers=2, ffn=48):
    """Each tower as (width, depth); `dino` may be None."""
    towers = []
    for kind, shape, head, index in (("dinov2", dino, 64, 0), ("siglip", siglip, 72, 1)):
        if shape:
            width, depth = shape
            sizes = {"width": width, "depth": depth, "heads": width // head, "ffn": width * 2}
            scale = {"mean": tuple(MEANS[index]), "std": tuple(STDS[index])}
            towers.append(TowerConfig(kind=kind, patch=14, image_size=56, **sizes, **scale))
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        pad_to_multiple_of=PADDING,
        hidden_size=hidden,
        head_dim=hidden // heads,
        layers=(LayerWidths(heads, kv_heads, ffn),) * layers,
        pad_token_id=32000,
    )
    return ArchitectureConfig(towers=tuple(towers), decoder=decoder)


def statistics(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(-1, -0.2, 7).tolist(), rng.uniform(0.2, 1, 7).tolist()
    return {"action": {"q01": low, "q99": high, "mask": [True] * 6 + [False]}}


def upstream_config(config):
    decoder, layer = config.decoder, config.decoder.layers[0]
    names = {"dinov2": "vit_large_patch14_reg4_dinov2", "siglip": "vit_so400m_patch14_siglip_224"}
    return {
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": {key: statistics(seed) for seed, key in enumerate(KEYS)},
        "pad_to_multiple_of": PADDING,
        "pad_token_id": 32000,
        "text_config": {
            "model_type": "llama",
            "hidden_size": decoder.hidden_size,
            "intermediate_size": layer.ffn,
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "num_hidden_layers": len(decoder.layers),
            "vocab_size": decoder.vocab_size,
        },
        "timm_model_ids": [names[tower.kind] for tower in config.towers],
        "torch_dtype": "float32",
    }


def preprocessor_config(config):
    return {
        "image_resize_strategy": "resize-naive",
        "interpolations": ["bicubic"] * len(config.towers),
        "means": [tower.mean for tower in config.towers],
        "stds": [tower.std for tower in config.towers],
    }


def write_checkpoint(path, shards=1, seed=0, **shape):
    """Returns the model whose weights were written."""
    config = architecture(**shape)
    torch.manual_seed(seed)
    model = OpenVLA(config, 256, 7).eval()
    # As in a trained checkpoint, an action token is always the likeliest.
    for parameter in model.language_model.parameters():
        parameter.data *= 3
    model.language_model.lm_head.weight.data[: model.first_action_id] *= 0.01
    model.language_model.lm_head.weight.data[model.first_action_id + 256 :] *= 0.01
    path.mkdir()
    write_json(path / "config.json", upstream_config(config))
    write_json(path / "preprocessor_config.json", preprocessor_config(config))
    tensors = dict(model.state_dict())
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return model
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return model


def write_expected(path, model, cases=2):
    """What the model gives, without this package's decoding, codec and preprocessing."""
    rng, expected = np.random.default_rng(0), []
    config = json.loads((path / "config.json").read_text())
    for number in range(cases):
        image = rng.integers(0, 256, (40 + 30 * number, 90, 3), dtype=np.uint8)
        Image.fromarray(image).save(path / f"image_{number}.png")
        small = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC))
        pixels = torch.cat(
            [
                torch.from_numpy(((small / 255 - t.mean) / t.std).transpose(2, 0, 1))
                for t in model.config.towers
            ]
        ).float()
        ids = [1, *rng.integers(3, 31000, 8 + number).tolist(), 29871]
        tokens, first = _greedy(model, ids, pixels[None])
        top = first.topk(5)
        edges = np.linspace(-1, 1, 256)
        scaled = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - np.array(tokens) - 1, 0, 254)]
        actions = {}
        for key, stats in config["norm_stats"].items():
            low, high = np.array(stats["action"]["q01"]), np.array(stats["action"]["q99"])
            whole = 0.5 * (scaled + 1) * (high - low) + low
            actions[key] = np.where(stats["action"]["mask"], whole, scaled).tolist()
        expected.append(
            {
                "image": f"image_{number}.png",
                "input_ids": ids,
                "generated": tokens,
                "actions": actions,
                "first_logits_top5": {"ids": top.indices.tolist(), "values": top.values.tolist()},
                "pixel_values_mean": pixels.mean().item(),
                "pixel_values_std": pixels.std().item(),
            }
        )
    write_json(path / "expected.json", expected)


@torch.no_grad()
def _greedy(model, ids, pixels):
    """Over the whole vocabulary, everything computed anew for each token."""
    embed, tokens, first = model.language_model.model.embed_tokens, [], None
    seen = model.projector(model.vision_backbone(pixels))
    for _ in range(7):
        text = embed(torch.tensor([ids + tokens]))
        x = torch.cat([text[:, :1], seen, text[:, 1:]], 1)
        logits = model.language_model(inputs_embeds=x, use_cache=False).logits[0, -1]
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
    return tokens, first


def write_json(path, content):
    path.write_text(json.dumps(content))
