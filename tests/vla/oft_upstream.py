"""What upstream's OpenVLA-OFT makes of weights and observations that are told by seeds alone.

`python oft_upstream.py actions CODE FILE` runs upstream's own modules, for `data/openvla_oft.json`:
`modeling_prismatic`, `processing_prismatic`, `action_heads`, `projectors`, and `normalize_proprio`
of `openvla_utils`, out of a checkout CODE of github.com/moojink/openvla-oft, in float32, on the
transformers fork that it asks for (github.com/moojink/transformers-openvla-oft) and timm 0.9.10.
`python oft_upstream.py crop CODE FILE` runs its `center_crop_image`, for `data/center_crop.json`,
on TensorFlow 2.15. That takes environments of their own. The tests import the rest.
"""

import ast
import importlib
import json
import sys
import zlib
from pathlib import Path
from typing import Union

import numpy as np

VOCABULARY, HIDDEN, LAYERS, HEADS, FFN, IMAGE = 32064, 32, 2, 2, 48, 56
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"embed_dim": 64, "depth": 3, "num_heads": 1},
    "vit_so400m_patch14_siglip_224": {"embed_dim": 72, "depth": 3, "num_heads": 1},
}
MEANS, STDS = ([0.485, 0.456, 0.406], [0.5] * 3), ([0.229, 0.224, 0.225], [0.5] * 3)
KEYS = ("libero_object_no_noops", "toy_arm")
VARIANTS = {
    "two images and proprioception": {"images": 2, "proprioception": 8},
    "one image": {"images": 1, "proprioception": 0},
}
CASES = 2
CROPPED = 24
"""Pixels."""


def weights(name, shape):
    """A tensor that hangs on its name and shape alone; the legacy generator never changes."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape)
    if name.endswith(
        ("norm.weight", "norm1.weight", "norm2.weight", "ffn.0.weight", "layernorm.weight")
    ):
        return (1 + 0.1 * values).astype(np.float32)
    fan_in = shape[-1] if len(shape) > 1 else 100
    return (values / fan_in**0.5).astype(np.float32)


def statistics(key):
    rng = np.random.RandomState(zlib.crc32(key.encode()))

    def bounds(length):
        low, high = rng.uniform(-1, -0.2, length).tolist(), rng.uniform(0.2, 1, length).tolist()
        return {"q01": low, "q99": high}

    action = {**bounds(7), "mask": [True] * 6 + [False]}
    return {"action": action, "proprio": bounds(8)}


def observation(case, images):
    """Images of several sizes, a prompt's token ids, and a state partly beyond its quantiles."""
    rng = np.random.RandomState(100 + case)
    shapes = [(IMAGE, IMAGE, 3), (40, 90, 3)]
    seen = [rng.randint(0, 256, shapes[(case + i) % 2]).astype(np.uint8) for i in range(images)]
    ids = [1, *rng.randint(3, 31000, 8 + 3 * case).tolist(), 29871]
    return seen, ids, 0.8 * rng.standard_normal(8)


def config():
    return {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "norm_stats": {key: statistics(key) for key in KEYS},
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "timm_model_ids": list(TOWERS),
        "text_config": {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "rms_norm_eps": 1e-6,
        },
    }


def preprocessor_config():
    return {
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, IMAGE, IMAGE]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": list(MEANS),
        "stds": list(STDS),
    }


def cropped():
    """An image to crop."""
    return np.random.RandomState(7).randint(0, 256, (CROPPED, CROPPED, 3)).astype(np.uint8)


def functions(code, names, given):
    """Some functions of upstream's `openvla_utils`, without what that module imports."""
    source = ast.parse((code / "experiments/robot/openvla_utils.py").read_text())
    wanted = [node for node in source.body if getattr(node, "name", "") in names]
    exec(compile(ast.Module(wanted, []), "openvla_utils.py", "exec"), given)
    return [given[name] for name in names]


def crop(code, file):
    from PIL import Image

    tf = importlib.import_module("tensorflow")  # of upstream's environments, not of this project

    given = {"tf": tf, "np": np, "Image": Image, "Union": Union, "OPENVLA_IMAGE_SIZE": CROPPED}
    function, _ = functions(code, ("center_crop_image", "crop_and_resize"), given)
    values = np.asarray(function(cropped())).tolist()
    facts = {"tensorflow": tf.__version__, "image": values}
    file.write_text(json.dumps(facts, separators=(",", ":")) + "\n")


def actions(code, file):
    import torch
    import transformers
    from PIL import Image

    timm = importlib.import_module("timm")

    sys.path.insert(0, str(code))
    for package in ("prismatic", "prismatic.training", "prismatic.vla", "prismatic.models"):
        # Without what their __init__ imports: training's data loaders, TensorFlow among them.
        module = type(sys)(package)
        module.__path__ = [str(code / package.replace(".", "/"))]
        sys.modules[package] = module
    modeling = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    configuration = importlib.import_module("prismatic.extern.hf.configuration_prismatic")
    processing = importlib.import_module("prismatic.extern.hf.processing_prismatic")
    heads = importlib.import_module("prismatic.models.action_heads")
    projectors = importlib.import_module("prismatic.models.projectors")
    constants = importlib.import_module("prismatic.vla.constants")

    create = timm.create_model
    timm.create_model = lambda name, **options: create(
        name, **{**options, "img_size": IMAGE, "mlp_ratio": 2.0, **TOWERS[name]}
    )
    settings = configuration.OpenVLAConfig(
        **{k: v for k, v in config().items() if k not in ("model_type", "timm_model_ids")}
    )
    settings._attn_implementation = "sdpa"
    vla = modeling.OpenVLAForActionPrediction(settings).float().eval()
    head = heads.L1RegressionActionHead(input_dim=HIDDEN, hidden_dim=HIDDEN, action_dim=7).eval()
    projector = projectors.ProprioProjector(llm_dim=HIDDEN, proprio_dim=8).eval()
    modules = {"": vla, "action_head.": head, "proprio_projector.": projector}
    for prefix, module in modules.items():
        told = {
            name: torch.from_numpy(weights(prefix + name, tuple(tensor.shape)))
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(told)
    given = {**vars(constants), "np": np, "Dict": dict, "Any": object}
    (normalize_proprio,) = functions(code, ("normalize_proprio",), given)
    image_processor = processing.PrismaticImageProcessor(**preprocessor_config())

    results = []
    for name, variant in VARIANTS.items():
        vla.vision_backbone.set_num_images_in_input(variant["images"])
        for case in range(CASES):
            images, ids, state = observation(case, variant["images"])
            pixels = [
                image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
                for image in images
            ]
            for key in KEYS:
                proprio = normalize_proprio(state, vla.norm_stats[key]["proprio"])
                given = {"proprio": proprio, "proprio_projector": projector}
                with torch.inference_mode():
                    chunk, states = vla.predict_action(
                        input_ids=torch.tensor([ids]),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                        pixel_values=torch.cat(pixels, 1),
                        unnorm_key=key,
                        action_head=head,
                        **(given if variant["proprioception"] else {}),
                    )
                results.append(
                    {
                        "variant": name,
                        "case": case,
                        "unnorm_key": key,
                        "actions": chunk.tolist(),
                        "states_mean": states.mean().item(),
                        "states_std": states.std().item(),
                    }
                )
    versions = {"transformers": transformers.__version__, "timm": timm.__version__}
    tensors = {
        prefix + name: list(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    facts = {"versions": {**versions, "torch": torch.__version__}, "tensors": tensors}
    file.write_text(json.dumps({**facts, "results": results}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    {"actions": actions, "crop": crop}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
