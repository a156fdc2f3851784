"""The file that describes a study: a grid of method × ratio × quantization, and how to judge it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict, read_yaml
from rlrc_ros.vla.config import QuantizationConfig
from training.config import (
    LAST_SEED,
    DemonstrationsConfig,
    PruneConfig,
    SftConfig,
    SparsifyConfig,
    _check,
)

Quantization = Literal["none", "nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class StructuredMethod:
    """Structured pruning; the keys mean what they mean in `training.config.PruneConfig`."""

    importance: Literal["taylor", "magnitude", "activation", "random"] = "taylor"
    granularity: Literal["width", "depth", "both"] = "both"
    attention: Literal["groups", "heads"] | None = None
    protect: int | None = None
    ffn_multiple: int = 32


@dataclass(frozen=True, kw_only=True)
class SparseMethod:
    """Zeros among the weights; the keys mean what they mean in `training.config.SparsifyConfig`."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    pattern: Literal["unstructured", "2:4"] = "unstructured"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One way to prune: structured or sparse."""

    name: str
    """As tables and figures say it."""
    structured: StructuredMethod | None = None
    sparse: SparseMethod | None = None
    ratios: tuple[float, ...] | None = None
    """For this method alone, instead of the study's."""

    def __post_init__(self) -> None:
        if (self.structured is None) == (self.sparse is None):
            raise UserError(f"methods: '{self.name}' must be either 'structured' or 'sparse'")


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Where policies are judged."""

    name: str
    environment: Literal["tabletop"] = "tabletop"
    latency: tuple[float, float] = (0.0, 0.0)
    """s; how late commands take effect, drawn for each step."""
    episodes: int
    first_seed: int = 0
    """Scenes `first_seed … first_seed + episodes - 1`, the same for every policy."""

    def __post_init__(self) -> None:
        _check(f"environment '{self.name}'", self, positive="episodes", natural="first_seed")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A grid of method × ratio × quantization over one policy and some environments."""

    policy: str
    """The original: a bundle directory, or the short name of a shipped one."""
    seed: int
    methods: tuple[MethodConfig, ...]
    ratios: tuple[float, ...]
    """Share of the decoder layers' parameters that is removed, or made zero."""
    quantizations: tuple[Quantization, ...] = ("none", "nf4")
    quantized_parts: tuple[Literal["llm", "vision", "projector"], ...] = ("llm",)
    demonstrations: DemonstrationsConfig
    """For calibration and recovery."""
    calibration_samples: int = 1024
    calibration_batch: int = 64
    recovery: SftConfig | None = None
    """Fine-tuning after pruning, the same for every cell; zeros of sparse methods stay zero."""
    environments: tuple[EnvironmentConfig, ...]
    latency_rounds: int = 50
    """Each policy acts so often beside the original, one observation at a time."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LAST_SEED:
            raise UserError(f"study: 'seed' is {self.seed}, and must be from 0 to {LAST_SEED}")
        for key in ("methods", "ratios", "quantizations", "environments"):
            if not getattr(self, key):
                raise UserError(f"study: '{key}' is empty")
        if "none" not in self.quantizations:
            raise UserError("study: 'quantizations' must have 'none', which others are compared to")
        numbers = "calibration_samples calibration_batch latency_rounds"
        _check("study", self, positive=numbers)
        slugs = Counter(slug(method.name) for method in self.methods)
        for name in ("original", ""):
            if name in slugs:
                raise UserError(f"study: a method cannot be called '{name}'")
        places = Counter(slug(place.name) for place in self.environments)
        twice = [name for names in (slugs, places) for name, n in names.items() if n > 1]
        if twice:
            raise UserError(f"study: two methods or environments are called '{twice[0]}'")
        for cell in self.cells:  # or say now what is wrong with one
            cell.prune_config(self)

    @property
    def cells(self) -> list[Cell]:
        """The original first, then method by method; quantizations of one policy together."""
        grid: list[tuple[MethodConfig | None, float]] = [(None, 0.0)]
        for method in self.methods:
            grid += [(method, ratio) for ratio in method.ratios or self.ratios]
        ordered = sorted(self.quantizations, key=lambda q: q != "none")
        return [Cell(m, ratio, q) for m, ratio in grid for q in dict.fromkeys(ordered)]


@dataclass(frozen=True)
class Cell:
    """One policy of the grid; without a method, the original."""

    method: MethodConfig | None
    ratio: float
    quantization: Quantization

    @property
    def pruned(self) -> str:
        """Name of what is quantized, fit for a directory."""
        return f"{slug(self.method.name)}-{self.ratio:g}" if self.method else "original"

    @property
    def name(self) -> str:
        """Its own name, fit for a directory."""
        return self.pruned if self.quantization == "none" else f"{self.pruned}-{self.quantization}"

    @property
    def kind(self) -> str:
        """What was done to the weights: `original`, `structured` or `sparse`."""
        if self.method is None:
            return "original"
        return "structured" if self.method.structured else "sparse"

    def prune_config(self, study: StudyConfig) -> PruneConfig | SparsifyConfig | None:
        """How it is pruned.

        Raises:
            UserError: the ratio does not fit the method.
        """
        shared: dict[str, Any] = {
            "calibration_samples": study.calibration_samples,
            "calibration_batch": study.calibration_batch,
        }
        if self.method is None:
            return None
        if self.method.sparse:
            return SparsifyConfig(sparsity=self.ratio, **vars(self.method.sparse), **shared)
        return PruneConfig(remove=self.ratio, **vars(self.method.structured), **shared)

    def quantization_config(self, study: StudyConfig) -> QuantizationConfig | None:
        """How it is quantized."""
        if self.quantization == "none":
            return None
        method: Literal["bitsandbytes-nf4", "bitsandbytes-int8"] = (
            "bitsandbytes-nf4" if self.quantization == "nf4" else "bitsandbytes-int8"
        )
        return QuantizationConfig(method=method, parts=study.quantized_parts)


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load_study(path: Path) -> StudyConfig:
    """Read a study's YAML.

    Raises:
        UserError: naming the file, the key and what is wrong.
    """
    return from_dict(StudyConfig, read_yaml(path), str(path))
