"""A directory as lerobot or `transformers` publishes pi0, read as a policy's configuration.

Widths and depths are read off the stored tensors' shapes. `config.json` adds what no shape tells;
the processors' files add how state and actions are normalised. The tokenizer is PaliGemma's, which
neither puts beside the weights: `tokenizer.json` has to be copied there to read instructions.
References: lerobot/src/lerobot/policies/pi0; transformers/models/pi0 (also for the names' mapping,
transformers/conversion_mapping.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.schema import read_json
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    ExpertConfig,
    LayerWidths,
    ProprioceptionConfig,
    TowerConfig,
)
from rlrc_ros.vla.openvla_checkpoint import DTYPES, _Fields, _Shapes
from rlrc_ros.vla.weights import WeightFiles, opened

CONFIG, HF_PROCESSOR = "config.json", "processor_config.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
FILES = (CONFIG, HF_PROCESSOR, PREPROCESSOR, POSTPROCESSOR, "tokenizer.json")
"""What makes a policy of the weights, beside the files of statistics that these name."""
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""Those that pi0 was trained with, where a checkpoint names none."""
CONTROL_RATE = 20.0
"""Hz. Neither stores it: this is LIBERO's (arXiv 2306.03310)."""
TEMPLATE = "{instruction}\n"
BOS = 2
HEAD, VISION_HEAD = 256, 72
"""Of both Gemmas, and of SigLIP so400m, where the configuration is silent, as lerobot's is."""
STD_ADDED = 1e-8
"""What both add to standard deviations that they divide by."""

_EXPERT = "state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out|action_out_proj"
_OURS = (
    (r"(?:vlm|paligemma)\.(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_backbone."),
    (r"(?:vlm|paligemma)\.(?:model\.)?multi_modal_projector\.", "projector."),
    (r"(?:vlm|paligemma)\.(?:model\.)?language_model\.(?:model\.)?", "language_model.model."),
    (r"paligemma\.(?=lm_head\.)", "language_model.model."),
    (r"(?:dit|gemma_expert\.model)\.", "expert.model."),
    (r"gemma_expert\.(?=lm_head\.)", "expert."),
    (rf"(?:embed_action_time\.)?(?=(?:{_EXPERT})\.)", "expert."),
)
"""What tensors begin with, without `model.` and `paligemma_with_expert.`; and our names for it."""
_EMBEDDING = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.model.lm_head.weight"
"""The embedding's other name: lerobot stores it once, under that of the head."""
_UNUSED = ("expert.lm_head.weight", "expert.model.embed_tokens.weight")


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory's `config.json` says that it is one."""
    if not (directory / CONFIG).is_file():
        return False
    config = read_json(directory / CONFIG)
    return isinstance(config, dict) and "pi0" in (config.get("model_type"), config.get("type"))


def renamed(weights: WeightFiles) -> WeightFiles:
    """The weights under our names, without what pi0 never uses; unknown names stay as they are."""
    names = {_our_name(stored): stored for stored in weights.files}
    for unused in _UNUSED:
        names.pop(unused, None)
    if (head := names.pop(_HEAD, None)) is not None:
        names.setdefault(_EMBEDDING, head)
    return weights.under(names)


def _our_name(stored: str) -> str:
    bare = stored.removeprefix("model.").removeprefix("paligemma_with_expert.")
    for pattern, ours in _OURS:
        if match := re.match(pattern, bare):
            return ours + bare[match.end() :]
    return stored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, its weights not loaded.

    Attributes:
        weights: where its tensors are, under our names.
        config: as a bundle's `config.json` would say it.
        files: what makes a policy of the weights, apart from them.
    """

    weights: WeightFiles
    config: BundleConfig
    files: tuple[Path, ...]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the configuration, and the headers of the weights.

    Raises:
        UserError: a file is missing, damaged, or asks for what pi0's module tree has not.
    """
    fields = _Fields(read_json(directory / CONFIG), directory / CONFIG)
    weights = renamed(WeightFiles.find(directory))
    headers = weights.headers()
    for name, (_, dtype) in headers.items():
        if dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            raise UserError(f"{weights.path}: {name} is {dtype}; expected one of {known}")
    shapes = _Shapes(weights.path, {name: shape for name, (shape, _) in headers.items()}, "pi0")
    state, action, files = _statistics(directory)
    architecture = _architecture(fields, shapes, len(state[0]) if state else 0)
    cameras = _cameras(fields, architecture.towers[0].image_size)
    _, dtype = headers["expert.action_out_proj.weight"]
    low, high = action
    config = BundleConfig(
        architecture=replace(architecture, images=len(cameras)),
        action_codec=ActionCodecConfig(q01=low, q99=high, mask=(True,) * len(low)),
        cameras=cameras,
        proprioception=_proprioception(*state) if state else None,
        control_rate=CONTROL_RATE,
        instruction_template=TEMPLATE,
        dtype=DTYPES[dtype],  # type: ignore[arg-type]
    )
    listed = [directory / name for name in FILES]
    return Checkpoint(weights, config, (*listed, *files))


def _architecture(config: _Fields, shapes: _Shapes, proprioception: int) -> ArchitectureConfig:
    vlm, expert = config.inside("vlm_config"), config.inside("dit_config")
    text, vision = vlm.inside("text_config"), vlm.inside("vision_config")
    head = text("head_dim", int, HEAD)
    if (other := expert("head_dim", int, head)) != head:
        raise UserError(f"{config.file}: heads of {head} and {other} cannot attend to each other")
    rows, hidden = shapes(_EMBEDDING, 2)
    decoder = DecoderConfig(
        vocab_size=rows,
        hidden_size=hidden,
        head_dim=head,
        layers=_layers("language_model.model", head, shapes),
        rms_norm_eps=text("rms_norm_eps", (int, float), 1e-6),
        rope_theta=_rope_theta(text),
        max_positions=text("max_position_embeddings", int, 8192),
        bos_token_id=BOS,
    )
    actions, width = shapes("expert.action_out_proj.weight", 2)
    flow = ExpertConfig(
        hidden_size=width,
        layers=_layers("expert.model", head, shapes),
        chunk=config("chunk_size", int, 50),
        action_width=actions,
        state_width=shapes("expert.state_proj.weight", 2)[1],
        steps=config("num_inference_steps", int, config("num_steps", int, 10)),
        min_period=config("min_period", (int, float), 4e-3),
        max_period=config("max_period", (int, float), 4.0),
    )
    return ArchitectureConfig(
        towers=(_tower(vision, shapes),),
        decoder=decoder,
        proprioception=proprioception,
        expert=flow,
    )


def _rope_theta(text: _Fields) -> float:
    rope = text.inside("rope_parameters")
    if (kind := rope("rope_type", str, "default")) != "default":
        raise UserError(f"{text.file}: rope_type '{kind}' is not known here")
    return float(rope("rope_theta", (int, float), text("rope_theta", (int, float), 10000.0)))


def _layers(prefix: str, head: int, shapes: _Shapes) -> tuple[LayerWidths, ...]:
    widths = []
    for i in range(shapes.blocks(f"{prefix}.layers")):
        layer = f"{prefix}.layers.{i}"
        rows = [shapes(f"{layer}.self_attn.{p}_proj.weight", 2)[0] for p in "qk"]
        if any(number % head for number in rows):
            raise UserError(f"{shapes.path}: {layer}.self_attn has no heads of {head}")
        ffn = shapes(f"{layer}.mlp.gate_proj.weight", 2)[0]
        widths.append(LayerWidths(rows[0] // head, rows[1] // head, ffn))
    if not widths:
        raise UserError(f"{shapes.path}: has no {prefix}.layers, which every pi0 has")
    return tuple(widths)


def _tower(vision: _Fields, shapes: _Shapes) -> TowerConfig:
    width, _, patch, _ = shapes("vision_backbone.embeddings.patch_embedding.weight", 4)
    patches, _ = shapes("vision_backbone.embeddings.position_embedding.weight", 2)
    layers = "vision_backbone.encoder.layers"
    heads = vision("num_attention_heads", int, max(1, width // VISION_HEAD))
    half = (0.5, 0.5, 0.5)
    return TowerConfig(
        kind="paligemma",
        width=width,
        depth=shapes.blocks(layers),
        heads=heads,
        ffn=shapes(f"{layers}.0.mlp.fc1.weight", 2)[0],
        patch=patch,
        image_size=round(patches**0.5) * patch,
        mean=half,
        std=half,
    )


def _cameras(config: _Fields, size: int) -> tuple[CameraConfig, ...]:
    """Of lerobot's image features, in order; its empty cameras are left out, as it masks them."""
    features = config.inside("input_features")
    found = []
    for key in features.content:
        feature = features.inside(key)
        if feature("type", str) != "VISUAL" or ".empty_camera_" in key:
            continue
        shape = feature("shape", list)
        if len(shape) != 3 or not all(type(number) is int for number in shape):
            raise UserError(f"{config.file}: {key}: shape {shape} is no image's")
        name = key.removeprefix("observation.images.")
        found.append(CameraConfig(name=name, height=shape[1], width=shape[2]))
    return tuple(found) or tuple(CameraConfig(name=n, height=size, width=size) for n in CAMERAS)


def _proprioception(mean: tuple[float, ...], std: tuple[float, ...]) -> ProprioceptionConfig:
    """What the state's values are, no checkpoint says: they are numbered."""
    names = tuple(f"state_{i}" for i in range(len(mean)))
    return ProprioceptionConfig(joints=names, gripper=False, mean=mean, std=std)


Pair = tuple[tuple[float, ...], tuple[float, ...]]


def _statistics(directory: Path) -> tuple[Pair | None, Pair, list[Path]]:
    """Mean and deviation of the state, if any; what of the actions is -1 and +1; files read.

    Raises:
        UserError: there are none of the actions, or they make no sense.
    """
    if (directory / POSTPROCESSOR).is_file():
        action, file = _lerobot(directory, POSTPROCESSOR, "unnormalizer_processor", "action")
        files, state = [file], None
        if action is not None and (directory / PREPROCESSOR).is_file():
            key = "observation.state"
            state, file = _lerobot(directory, PREPROCESSOR, "normalizer_processor", key)
            files.append(file)
    else:
        action, state, files = *_transformers(directory), []
    if action is None:
        raise UserError(
            f"{directory}: neither {POSTPROCESSOR} nor {HF_PROCESSOR} has statistics of the "
            "actions, so actions have no unit; take a checkpoint that was fine-tuned"
        )
    mean, deviation = action
    pairs = list(zip(mean, deviation, strict=True))
    scaled = tuple(m - d for m, d in pairs), tuple(m + d for m, d in pairs)
    if state is not None:
        state = state[0], tuple(d + STD_ADDED for d in state[1])
    return state, scaled, files


def _lerobot(directory: Path, name: str, step: str, key: str) -> tuple[Pair | None, Path]:
    """Mean and deviation that a step of a processor stores for a feature, whatever its method."""
    file = directory / name
    steps = _Fields(read_json(file), file)("steps", list)
    found = [_Fields(s, file) for s in steps if isinstance(s, dict) and s.get("state_file")]
    for fields in found:
        if fields("registry_name", str, "") == step:
            break
    else:
        return None, file
    state_file = fields("state_file", str)
    if Path(state_file).name != state_file or not (directory / state_file).is_file():
        raise UserError(f"{file}: names '{state_file}', which is no file of this directory")
    feature = "ACTION" if key == "action" else "STATE"
    method = fields.inside("config").inside("norm_map")(feature, str, "MEAN_STD")
    names = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}
    if method not in names:
        known = ", ".join(names)
        raise UserError(f"{file}: {feature} is normalised by {method}; known are {known}")
    with opened(directory / state_file) as stored:
        held = {name: f"{key}.{name}" for name in names[method]}
        if not {*held.values()} <= {*stored.keys()}:
            return None, directory / state_file
        first, second = (stored.get_tensor(name).double().flatten() for name in held.values())
    if first.shape != second.shape or not (first.isfinite() & second.isfinite()).all():
        raise UserError(f"{directory / state_file}: {key} has statistics that make no sense")
    if method != "MEAN_STD":
        first, second = (first + second) / 2, (second - first) / 2
    return (tuple(first.tolist()), tuple(second.tolist())), directory / state_file


def _transformers(directory: Path) -> tuple[Pair | None, Pair | None]:
    """Of the actions and of the state, as the processor of `transformers` keeps them."""
    file = directory / HF_PROCESSOR
    if not file.is_file():
        return None, None
    fields = _Fields(read_json(file), file)
    found: list[Pair | None] = []
    for feature in ("actions", "state"):
        if fields.content.get(f"{feature}_mean") is None:
            found.append(None)
            continue
        pair = [_floats(fields, f"{feature}_{name}") for name in ("mean", "std")]
        if len(pair[0]) != len(pair[1]):
            raise UserError(f"{file}: {feature}_mean and {feature}_std differ in length")
        found.append((pair[0], pair[1]))
    return found[0], found[1]


def _floats(fields: _Fields, key: str) -> tuple[float, ...]:
    values: list[Any] = fields(key, list)
    if not all(type(value) in (int, float) for value in values):
        raise UserError(f"{fields.file}: '{key}' must be a list of numbers")
    return tuple(map(float, values))
