"""A directory as OpenVLA publishes it (`openvla/openvla-7b`), read as a policy's configuration.

Widths and depths are read off the stored tensors' shapes; `config.json` adds what no shape tells:
head sizes, the padding of the vocabulary, and the statistics of the actions, one set a data set.
Reference: openvla/prismatic/extern/hf/{configuration,modeling}_prismatic.py. What OpenVLA-OFT puts
beside that is read by `rlrc_ros.vla.oft_checkpoint`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.schema import read_json
from rlrc_ros.vla import oft_checkpoint
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.weights import WeightFiles

CONFIG, PREPROCESSOR, STATISTICS = (
    "config.json",
    "preprocessor_config.json",
    "dataset_statistics.json",
)
FILES = (CONFIG, PREPROCESSOR, STATISTICS, "tokenizer.json")
"""What makes a policy of the weights; its hash is over these and them."""
CAMERA = "front"
"""Upstream does not name the camera it looks through: a third-person view of the scene."""
CONTROL_RATE = 5.0
"""Hz. Upstream does not store it either: this is BridgeData V2's (arXiv 2308.12952)."""
TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"
PROMPT_SUFFIX = 29871
LLAMA_2 = {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0} | {
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "bos_token_id": 1,
}
"""What `LlamaConfig` of transformers 4.40 takes where `text_config` is silent."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory's `config.json` says that it is one."""
    if not (directory / CONFIG).is_file():
        return False
    config = read_json(directory / CONFIG)
    return isinstance(config, dict) and config.get("model_type") == "openvla"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, its weights not loaded.

    Attributes:
        path: the directory.
        weights: where its tensors are.
        architecture: the module tree.
        statistics: how actions are scaled, by data set (upstream's `unnorm_key`).
        dtype: of the stored tensors.
        norm_stats: the statistics as they stand, and the file that they stand in.
    """

    path: Path
    weights: WeightFiles
    architecture: ArchitectureConfig
    statistics: dict[str, ActionCodecConfig]
    dtype: str
    norm_stats: tuple[dict[str, Any], Path]

    def bundle_config(self, unnorm_key: str | None) -> BundleConfig:
        """As a bundle's `config.json` would say it.

        Where there are several sets of statistics and none is chosen, actions stay in [-1, 1].

        Raises:
            UserError: there are no statistics of that name, or not those that the policy takes.
        """
        if unnorm_key is None and len(self.statistics) == 1:
            (unnorm_key,) = self.statistics
        if unnorm_key is None:
            tokens = next(iter(self.statistics.values())).dimensions
            codec = ActionCodecConfig(
                q01=(-1.0,) * tokens, q99=(1.0,) * tokens, mask=(False,) * tokens
            )
        elif unnorm_key in self.statistics:
            codec = self.statistics[unnorm_key]
        else:
            raise UserError(
                f"{self.path}: norm_stats has no '{unnorm_key}'; there are: "
                f"{', '.join(sorted(self.statistics))}"
            )
        size = self.architecture.towers[0].image_size
        cameras = (CAMERA, *oft_checkpoint.MORE_CAMERAS)[: self.architecture.images]
        proprioception, (sets, file) = None, self.norm_stats
        if length := self.architecture.proprioception:
            where = f"{file}: norm_stats of '{unnorm_key}'"
            proprioception = (
                oft_checkpoint.unscaled(length)
                if unnorm_key is None
                else oft_checkpoint.proprioception(sets[unnorm_key], where, length)
            )
        return BundleConfig(
            architecture=self.architecture,
            action_codec=codec,
            cameras=tuple(CameraConfig(name=name, height=size, width=size) for name in cameras),
            proprioception=proprioception,
            control_rate=CONTROL_RATE,
            instruction_template=TEMPLATE,
            dtype=self.dtype,  # type: ignore[arg-type]
            prompt_suffix_token=PROMPT_SUFFIX,
        )


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the configuration, and the headers of the weights.

    Raises:
        UserError: a file is missing, damaged, or asks for what OpenVLA's module tree has not.
    """
    file = directory / CONFIG
    config = _Fields(read_json(file), file)
    weights = oft_checkpoint.with_parts(WeightFiles.find(directory), directory)
    headers = weights.headers()
    for name, (_, dtype) in headers.items():
        if dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            raise UserError(f"{weights.path}: {name} is {dtype}; expected one of {known}")
    shapes = _Shapes(weights.path, {name: shape for name, (shape, _) in headers.items()})
    towers, decoder = _towers(directory, config, shapes), _decoder(config, shapes)
    architecture = ArchitectureConfig(
        towers=towers, decoder=decoder, **oft_checkpoint.architecture(weights, towers, decoder)
    )
    _, dtype = headers["language_model.model.embed_tokens.weight"]
    norm_stats = _norm_stats(directory, config)
    codecs = _statistics(*norm_stats, config)
    return Checkpoint(directory, weights, architecture, codecs, DTYPES[dtype], norm_stats)


class _Fields:
    """A JSON object, its values checked as they are taken."""

    def __init__(self, content: Any, file: Path, place: str = "") -> None:
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected keys and values{f' at {place!r}' * bool(place)}")
        self.content, self.file, self.place = content, file, place

    def __call__(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.content.get(key)
        value = default if value is None else value
        name = f"{self.place}.{key}".lstrip(".")
        if value is None:
            raise UserError(f"{self.file}: '{name}' is missing")
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise UserError(f"{self.file}: '{name}' makes no sense: {json.dumps(value)[:60]}")
        return value

    def inside(self, key: str) -> _Fields:
        name = f"{self.place}.{key}".lstrip(".")
        return _Fields(self.content.get(key, {}), self.file, name)


class _Shapes:
    """Of the stored tensors, by name; `kind` is what they should be."""

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], kind: str = "OpenVLA"
    ) -> None:
        self.path, self.all, self._kind = path, shapes, kind

    def __call__(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = self.all.get(name)
        if shape is None:
            raise UserError(f"{self.path}: has no tensor {name}, which every {self._kind} has")
        if len(shape) != dimensions or 0 in shape:
            raise UserError(f"{self.path}: {name} is {shape}, expected {dimensions} dimensions")
        return shape

    def blocks(self, prefix: str) -> int:
        """How many numbered blocks there are; the highest number counts where one is missing."""
        numbers = {
            int(rest)
            for name in self.all
            if name.startswith(f"{prefix}.")
            and (rest := name[len(prefix) + 1 :].partition(".")[0]).isdecimal()
        }
        return max(numbers, default=-1) + 1


def _towers(directory: Path, config: _Fields, shapes: _Shapes) -> tuple[TowerConfig, ...]:
    file = directory / PREPROCESSOR
    images = _Fields(read_json(file), file)
    strategy = images("image_resize_strategy", str, "resize-naive")
    modes = images("interpolations", list, ["bicubic"])
    if strategy != "resize-naive" or set(modes) != {"bicubic"}:
        raise UserError(
            f"{file}: images are resized by '{strategy}' and {modes}; this program can do "
            "'resize-naive' and bicubic only"
        )
    names = ["featurizer"]
    if any(name.startswith("vision_backbone.fused_featurizer.") for name in shapes.all):
        names.append("fused_featurizer")
    means, deviations, models = (
        fields(key, list)
        for fields, key in ((images, "means"), (images, "stds"), (config, "timm_model_ids"))
    )
    if not len(names) == len(means) == len(deviations) == len(models):
        raise UserError(
            f"{directory}: the weights hold {len(names)} vision towers, timm_model_ids names "
            f"{len(models)}, and {PREPROCESSOR} has {len(means)} means and {len(deviations)} stds"
        )
    return tuple(
        _tower(f"vision_backbone.{name}", str(model), mean, std, shapes)
        for name, model, mean, std in zip(names, models, means, deviations, strict=True)
    )


def _tower(prefix: str, model: str, mean: Any, std: Any, shapes: _Shapes) -> TowerConfig:
    width, _, patch, _ = shapes(f"{prefix}.patch_embed.proj.weight", 4)
    _, patches, _ = shapes(f"{prefix}.pos_embed", 3)
    side = round(patches**0.5)
    head = 72 if "so400m" in model else 64  # of every ViT of the DINOv2 and SigLIP families
    if width % head:
        raise UserError(
            f"{shapes.path}: {prefix} is {width} wide, which does not divide into {model}'s heads "
            f"of {head}"
        )
    try:
        scale = {name: tuple(map(float, values)) for name, values in (("mean", mean), ("std", std))}
    except (TypeError, ValueError):
        raise UserError(f"{PREPROCESSOR}: means and stds must be lists of three numbers") from None
    return TowerConfig(
        kind="dinov2" if f"{prefix}.cls_token" in shapes.all else "siglip",
        width=width,
        depth=shapes.blocks(f"{prefix}.blocks"),
        heads=width // head,
        ffn=shapes(f"{prefix}.blocks.0.mlp.fc1.weight", 2)[0],
        patch=patch,
        image_size=side * patch,
        **scale,
    )


def _decoder(config: _Fields, shapes: _Shapes) -> DecoderConfig:
    text, llama = config.inside("text_config"), "language_model.model"
    rows, hidden = shapes(f"{llama}.embed_tokens.weight", 2)
    attention = f"{llama}.layers.0.self_attn"
    if text.content.get("rope_scaling") is not None or _of(text, "hidden_act") != "silu":
        raise UserError(
            f"{text.file}: rope_scaling, or an activation that is not silu, is not known here"
        )
    heads = _of(text, "num_attention_heads")
    head = text("head_dim", int, shapes(f"{attention}.q_proj.weight", 2)[0] // heads)
    if head < 1:
        raise UserError(f"{text.file}: {heads} attention heads do not fit {attention}.q_proj")
    found = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "num_key_value_heads": shapes(f"{attention}.k_proj.weight", 2)[0] // head,
        "intermediate_size": shapes(f"{llama}.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": shapes.blocks(f"{llama}.layers"),
    }
    size = {name: text(name, int, value) for name, value in found.items()}
    layer = LayerWidths(heads, size["num_key_value_heads"], size["intermediate_size"])
    return DecoderConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        head_dim=head,
        layers=(layer,) * size["num_hidden_layers"],
        pad_to_multiple_of=config("pad_to_multiple_of", int, 64),
        rms_norm_eps=float(_of(text, "rms_norm_eps")),
        rope_theta=float(_of(text, "rope_theta")),
        max_positions=_of(text, "max_position_embeddings"),
        bos_token_id=_of(text, "bos_token_id"),
        pad_token_id=config("pad_token_id", int, 32000),
    )


def _of(text: _Fields, key: str) -> Any:
    """A value of `text_config`, or Llama-2's."""
    usual = LLAMA_2[key]
    return text(key, (int, float) if isinstance(usual, float) else type(usual), usual)


def _norm_stats(directory: Path, config: _Fields) -> tuple[dict[str, Any], Path]:
    """By data set; fine-tuned checkpoints keep their own in a file of its own, which rules."""
    sets, file = config.inside("norm_stats").content, config.file
    if (directory / STATISTICS).is_file():
        file = directory / STATISTICS
        sets = _Fields(read_json(file), file).content
    if not sets:
        raise UserError(f"{file}: has no norm_stats, so actions have no unit")
    return sets, file


def _statistics(sets: dict[str, Any], file: Path, config: _Fields) -> dict[str, ActionCodecConfig]:
    codecs = {}
    for name in sets:
        action = _Fields(sets, file).inside(name).inside("action")
        low, high = action("q01", list), action("q99", list)
        mask = action("mask", list, [True] * len(low))
        try:
            codecs[name] = ActionCodecConfig(
                n_bins=config("n_action_bins", int, 256),
                q01=tuple(map(float, low)),
                q99=tuple(map(float, high)),
                mask=tuple(map(bool, mask)),
            )
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"{file}: norm_stats of '{name}': {error}") from None
    return codecs
