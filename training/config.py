"""The file that describes a whole run of `rlrc compress`, as dataclasses: one for each stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict, read_yaml
from rlrc_ros.vla.config import LayerWidths, QuantizationConfig, TowerConfig

PRUNE_TARGETS = ("remove", "remove_of_llm", "max_bytes", "max_latency_ms")

BENCHMARK_SCENES = 500
"""Of a LIBERO suite: 10 tasks in 50 initial states."""
TOGETHER = "libero_object+libero_spatial"
"""The suites that there is a scripted expert for, as one environment."""

LAST_SEED = 2**32 - 1
"""The largest seed that NumPy's global generator takes."""


def suites_of(environment: str) -> tuple[str, ...]:
    """The LIBERO suites that an environment's name stands for."""
    return tuple(environment.split("+"))


def benchmark_scenes(environment: str) -> int:
    """How many scenes of a LIBERO environment are the benchmark's own: the first ones."""
    return BENCHMARK_SCENES * len(suites_of(environment))


def _check(where: str, config: Any, *, positive: str = "", natural: str = "") -> None:
    """Refuse values of the fields named that are not above 0, or below 0, or no number."""
    for name in positive.split():
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{where}: '{name}' is {getattr(config, name)}, and must be above 0")
    for name in natural.split():
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{where}: '{name}' is {getattr(config, name)}, and must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ExpertModelConfig:
    """The shape of a new pi0's action expert; layers and heads are as many as the decoder's."""

    hidden_size: int
    ffn: int
    chunk: int
    """Actions of a chunk."""
    steps: int = 10
    """Of denoising."""

    def __post_init__(self) -> None:
        _check("expert", self, positive="hidden_size ffn chunk steps")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The original policy's shape.

    Vocabulary and contract with the robot follow from the environment.
    """

    tower: TowerConfig
    hidden_size: int
    head_dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    chunk: int | None = None
    """Actions that one pass gives (OpenVLA-OFT; default: one, as tokens, as OpenVLA)."""
    expert: ExpertModelConfig | None = None
    """Makes it a pi0, whose tower is of kind `paligemma`."""

    def __post_init__(self) -> None:
        _check("model", self, positive="hidden_size head_dim layers heads kv_heads ffn")
        if self.chunk is not None:
            _check("model", self, positive="chunk")
            if self.expert is not None:
                raise UserError("model: 'chunk' and 'expert' are two kinds of policy; give one")
        if (self.expert is None) == (self.tower.kind == "paligemma"):
            raise UserError("model: an 'expert' and a tower of kind 'paligemma' belong together")

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        """The same widths in every decoder layer."""
        return (LayerWidths(self.heads, self.kv_heads, self.ffn),) * self.layers


@dataclass(frozen=True, kw_only=True)
class JumpsConfig:
    """Things that are elsewhere all of a sudden, while the hand is away from them.

    An episode then shows several arrangements, and a policy must look where things are instead of
    going where they mostly are.
    """

    share: float
    """Probability that there is one in a control step."""
    distance: float
    """Standard deviation of how far, m along each horizontal axis."""

    def __post_init__(self) -> None:
        _check("jumps", self, positive="share distance")


@dataclass(frozen=True, kw_only=True)
class DemonstrationsConfig:
    """Episodes of the scripted expert, disturbed on the way so that recoveries are seen too.

    Noise is added to what is executed; the label stays the expert's own action (DART, Laskey et
    al., arXiv 1703.09327).
    """

    episodes: int
    first_seed: int
    """Scenes `first_seed … first_seed + episodes - 1`.

    Keep them apart from the ones evaluated on.
    """
    disturbed_share: float
    """Share of the episodes that have noise."""
    translation_noise: float
    """Standard deviation, m a control step."""
    rotation_noise: float
    """Standard deviation, rad a control step."""
    gripper_flips: float
    """Probability that a control step's gripper command is inverted."""
    vary_view: bool = True
    """Give every step its own light and camera displacement.

    A policy that remembers nothing cannot tell, and sees as many views as there are steps.
    """
    latency: tuple[float, float] = (0.0, 0.08)
    """s; how late commands take effect, drawn for each step."""
    jumps: JumpsConfig | None = None
    """Of LIBERO's things (default: none)."""

    def __post_init__(self) -> None:
        noise = "disturbed_share translation_noise rotation_noise gripper_flips"
        _check("demonstrations", self, positive="episodes", natural=f"first_seed {noise}")


@dataclass(frozen=True, kw_only=True)
class CorrectionsConfig:
    """A round of DAgger (Ross et al., arXiv 1011.0686).

    The policy acts, the expert says what it would have done.
    """

    at_step: int
    """Before which training step the episodes are added."""
    episodes: int
    first_seed: int
    max_steps: int = 60
    """Control steps after which an episode ends: a policy that is lost shows little more."""
    takeover: tuple[int, int] | None = None
    """Control steps after which the expert acts too, drawn for each episode (default: never).

    Then only successes are kept: from what the policy gets into, the way out is shown as well.
    """

    def __post_init__(self) -> None:
        _check("corrections", self, positive="episodes max_steps", natural="at_step first_seed")
        if self.takeover and not 0 <= self.takeover[0] <= self.takeover[1] < self.max_steps:
            raise UserError(
                f"corrections: 'takeover' is {list(self.takeover)}, and must rise from 0 or more "
                f"to less than 'max_steps', {self.max_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train small matrices beside a frozen policy's linear layers, see `training.lora`.

    The defaults are OpenVLA's.
    """

    rank: int = 32
    alpha: int = 16
    """What the matrices give is scaled by alpha / rank."""
    targets: tuple[Literal["decoder", "vision"], ...] = ("decoder",)
    """Whose layers: the decoder's, with pi0 those of the action expert as well; the towers'."""

    def __post_init__(self) -> None:
        _check("lora", self, positive="rank alpha")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError("lora: 'targets' must name at least one part, and each once")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on action tokens."""

    steps: int
    batch_size: int
    """Of all processes together, where several train."""
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    average: float = 0.999
    """Decay of the moving average of the weights, which is what is kept.

    0 keeps the last weights.
    """
    label_width: float = 0.0
    """Standard deviation, in bins, of the target about the right bin; 0 is plain cross-entropy."""
    grounding: float = 0.0
    """Weight of the grounding loss, see `training.sft.GroundingHead`."""
    brightness: float = 0.15
    """Images are brightened and their contrast changed by up to this share."""
    shift: int = 0
    """Images are moved by up to so many pixels either way.

    What keeps a policy that learns from pixels alone from knowing its demonstrations by heart
    (Mandlekar et al., arXiv 2108.03298).
    """
    distillation: float = 0.0
    """Share of the loss that imitates another policy's distribution over the tokens (its teacher's)
    instead of the demonstrated action: a target that is the same function of what is seen in all
    scenes leaves less to know by heart (Hinton et al., arXiv 1503.02531; Beyer et al., arXiv
    2106.05237)."""
    freeze_vision: bool = False
    """Leave the vision towers as they are: a pruned policy's have seen more than a recovery
    shows."""
    augmentation: Literal["openvla"] | None = None
    """In place of `brightness` and `shift`, how OpenVLA changes images: a crop of 90% of the area,
    brightness, contrast, saturation and hue. The policy then looks at the centre of its images."""
    micro_batch: int | None = None
    """Samples in a device's memory at a time (default: its whole share of the batch); gradients add
    up to the batch's."""
    gradient_checkpointing: bool | None = None
    """Compute what is inside a block anew in the backward pass: less memory, a third more time."""
    lora: LoraConfig | None = None
    """Train adapters alone (default: every weight)."""
    corrections: tuple[CorrectionsConfig, ...] = ()
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        self._check_combination()
        positive = "steps batch_size learning_rate max_grad_norm checkpoint_every"
        natural = "warmup_steps weight_decay average label_width grounding brightness shift"
        _check("sft", self, positive=positive, natural=f"{natural} distillation")
        if self.distillation > 1:
            raise UserError("sft: 'distillation' is a share, at most 1")
        for corrections in self.corrections:
            if corrections.at_step >= self.steps:
                raise UserError(
                    f"sft: corrections are due at step {corrections.at_step}, and there are "
                    f"{self.steps} steps"
                )

    def _check_combination(self) -> None:
        """Refuse what cannot be had together, or would have no effect."""
        if self.micro_batch is not None:
            _check("sft", self, positive="micro_batch")
        if self.lora is not None and self.freeze_vision:
            raise UserError(
                "sft: with 'lora' all weights are frozen; leave 'freeze_vision' out, and 'vision' "
                "out of its 'targets'"
            )
        if self.augmentation and self.shift:
            raise UserError("sft: 'augmentation' moves images by itself; leave 'shift' out")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Structured pruning of the decoder, towards exactly one target.

    `remove` with `keep_layers` and nothing else gives every layer that stays the same widths, the
    first and the last included. `granularity` and the other targets plan what to give up by
    importance, see `training.planning`.
    """

    remove: float | None = None
    """Target: share of the decoder layers' parameters to remove at least."""
    keep_layers: int | None = None
    """Whole layers left, the first and the last among them; the rest of the share goes by width."""
    importance: Literal["taylor", "magnitude", "activation", "random"] = "taylor"
    ffn_multiple: int = 32
    """Feed-forward widths are multiples of this."""
    calibration_samples: int = 1024
    granularity: Literal["width", "depth", "both"] | None = None
    """Heads and channels, or whole layers, or both."""
    attention: Literal["groups", "heads"] | None = None
    """What attention gives up: key-value heads with the queries that share them (the default), or
    query heads alone, as many in every group.
    """
    attention_multiple: int | None = None
    """Widths of queries, keys and values are multiples of this (default: the head size)."""
    protect: int | None = None
    """Layers at either end that stay whole (default 1)."""
    remove_of_llm: float | None = None
    """Target: share of the whole LLM's parameters, embedding and head included."""
    max_bytes: int | None = None
    """Target: bytes of the whole LLM's weights as stored."""
    weight_bits: float | None = None
    """Bits of a layer's weight as `max_bytes` counts them (default 16).

    4.13 if the policy is to be NF4 with double quantization. Embedding, head and norms have 16.
    """
    max_latency_ms: float | None = None
    """Target: median time of a whole action, or chunk of them, at batch 1, ms."""
    latency_of: str | None = None
    """The device it is meant for.

    `cpu`, `cuda`: measured here and now. Or a file that `python -m training.latency` wrote there.
    """
    calibration_batch: int | None = None
    """Demonstration steps at a time in calibration (default 64); fewer take less memory."""
    part: Literal["llm", "expert"] | None = None
    """Of a pi0 policy: its language model (the default), or its action expert."""

    def __post_init__(self) -> None:
        targets = [name for name in PRUNE_TARGETS if getattr(self, name) is not None]
        if len(targets) != 1:
            given = f"; given: {', '.join(targets)}" if targets else ""
            raise UserError(f"prune: give exactly one of {', '.join(PRUNE_TARGETS)}{given}")
        for name in ("remove", "remove_of_llm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise UserError(f"prune: '{name}' is a share, above 0 and below 1")
        self._check_combination(targets[0])
        optional = "max_bytes weight_bits max_latency_ms attention_multiple calibration_batch"
        given = " ".join(name for name in optional.split() if getattr(self, name) is not None)
        _check("prune", self, positive=f"ffn_multiple calibration_samples {given}")
        if self.protect is not None:
            _check("prune", self, natural="protect")

    def _check_combination(self, target: str) -> None:
        """Refuse keys that would have no effect."""
        if self.keep_layers is not None and self.keep_layers < 2:
            raise UserError("prune: 'keep_layers' must be at least 2, the first and the last")
        planned = ("granularity", "attention", "attention_multiple", "protect")
        if self.granularity is None:
            without = [name for name in planned if getattr(self, name) is not None]
            if target != "remove" or without:
                raise UserError(f"prune: '{(without or [target])[0]}' also takes 'granularity'")
            if self.keep_layers is None:
                raise UserError("prune: 'remove' also takes 'keep_layers' or 'granularity'")
        elif self.keep_layers is not None:
            raise UserError("prune: 'granularity' decides how many layers stay; no 'keep_layers'")
        if (self.max_latency_ms is None) != (self.latency_of is None):
            raise UserError("prune: 'max_latency_ms' and 'latency_of' belong together")
        if self.weight_bits is not None and self.max_bytes is None:
            raise UserError("prune: 'weight_bits' is for 'max_bytes'")


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """Zeros among the weights of the decoder's layers: what structured pruning is compared with."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    sparsity: float
    """Share of the weights that become zero."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """2:4: two of every four neighbouring inputs, which GPUs can make use of."""
    calibration_samples: int = 256
    calibration_batch: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError("sparsify: 'sparsity' is a share, above 0 and below 1")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise UserError(f"sparsify: 2:4 is a sparsity of 0.5, not {self.sparsity}")
        _check("sparsify", self, positive="calibration_samples calibration_batch")


@dataclass(frozen=True, kw_only=True)
class CoolingConfig:
    """The rest of PPO nearer to how the policy acts, which is greedily.

    Sampling at a temperature of 1 walks out of states that greedy decoding stays in for ever; at a
    low one PPO meets them, and learns to leave them (docs/results/tabletop.md, run 5).
    """

    at_update: int
    """The first such update."""
    temperature: float
    learning_rate: float
    """The actor's. A step moves log-probabilities by the more, the lower the temperature is."""

    def __post_init__(self) -> None:
        _check("cooling", self, positive="temperature learning_rate", natural="at_update")


@dataclass(frozen=True, kw_only=True)
class FlowRlConfig:
    """How PPO samples a pi0 policy, whose ODE becomes an SDE: see `training.flow_policy`."""

    noise_level: float = 0.5
    """The SDE's a, at a temperature of 1; πRL's (arXiv 2510.25889)."""
    replan_steps: int = 0
    """Actions of a chunk that are executed before the policy looks again, one of PPO's steps.

    0: half of the chunk. The same as the nodes' parameter of that name.
    """

    def __post_init__(self) -> None:
        _check("flow", self, positive="noise_level", natural="replan_steps")


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """PPO with critic warm-up and BC regularization.

    RLRC does not publish its settings. The defaults start from RL4VLA's published code; critic
    warm-up and the BC coefficient are ours.
    """

    seeds: tuple[int, ...]
    """One run each, from the same recovered policy.

    The first one's result goes on to quantization.
    """
    updates: int
    environments: int
    """Of all processes together, where several train; so are `minibatch` and `bc_batch`."""
    steps_per_update: int
    """Decisions per environment."""
    minibatch: int
    epochs: int = 1
    learning_rate: float = 1e-5
    value_learning_rate: float = 3e-4
    critic_warmup: int = 4
    """Updates in which the value head alone learns."""
    bc_coefficient: float = 0.1
    bc_final: float | None = None
    """What the coefficient comes to with the last update, in a straight line from the first after
    the warm-up (default: it stays)."""
    bc_batch: int = 512
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    huber_delta: float = 10.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    """At which actions are sampled, and their log-probabilities taken; pi0's noise is scaled by it.
    """
    cooling: CoolingConfig | None = None
    """Another temperature and learning rate from some update on (default: none)."""
    first_seed: int = 5_000_000
    """Scenes of the rollouts, counted up from here."""
    micro_batch: int | None = None
    """Samples in a device's memory at a time (default: its whole share of a minibatch)."""
    bfloat16: bool | None = None
    """Learn with matrices in bfloat16 (default: float32). The log-probabilities that the ratio
    starts from are then taken once more before an update, for those of the rollout are float32."""
    lora: LoraConfig | None = None
    """Train adapters and the value head alone (default: every weight)."""
    flow: FlowRlConfig | None = None
    """Of a pi0 policy (default: as `FlowRlConfig` has it)."""

    def __post_init__(self) -> None:
        optional = "" if self.bc_final is None else "bc_final"
        if self.micro_batch is not None:
            _check("rl", self, positive="micro_batch")
        counts = "updates environments steps_per_update minibatch epochs bc_batch"
        rates = "learning_rate value_learning_rate max_grad_norm temperature"
        natural = f"critic_warmup bc_coefficient first_seed {optional}"
        _check("rl", self, positive=f"{counts} {rates}", natural=natural)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("rl: 'seeds' must name at least one, and each once")
        if not 0 <= min(self.seeds) <= max(self.seeds) <= LAST_SEED:
            raise UserError(f"rl: 'seeds' must be from 0 to {LAST_SEED}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How each stage's policy is evaluated."""

    episodes: int
    first_seed: int

    def __post_init__(self) -> None:
        _check("evaluate", self, positive="episodes", natural="first_seed")


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Everything from demonstrations to the quantized policy."""

    environment: Literal[
        "tabletop", "libero_object", "libero_spatial", "libero_object+libero_spatial"
    ]
    """Where demonstrations are recorded and policies tried: where there is a scripted expert."""
    seed: int
    model: ModelConfig
    demonstrations: DemonstrationsConfig
    sft: SftConfig
    prune: PruneConfig
    recovery: SftConfig
    rl: RlConfig
    quantize: QuantizationConfig
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LAST_SEED:
            raise UserError(f"'seed' is {self.seed}, and must be from 0 to {LAST_SEED}")
        if self.sft.lora is not None:
            raise UserError(
                "sft: 'lora' adapts a trained policy, and this stage makes one; 'recovery' can "
                "have it"
            )
        if self.environment != "tabletop":
            self._check_libero()
        elif self.demonstrations.jumps:
            raise UserError("demonstrations: 'jumps' are of LIBERO's things; leave it out")

    def _check_libero(self) -> None:
        """Keep to the published protocol, and its initial states to the evaluation."""
        demonstrations, judged = self.demonstrations, self.evaluate
        scenes = benchmark_scenes(self.environment)
        if any(demonstrations.latency) or demonstrations.vary_view:
            raise UserError(
                f"demonstrations: {self.environment} is simulated as published; set 'latency' to "
                "[0, 0] and 'vary_view' to false"
            )
        corrections = (*self.sft.corrections, *self.recovery.corrections)
        seeds = [demonstrations.first_seed, self.rl.first_seed]
        for first in (*seeds, *(each.first_seed for each in corrections)):
            if first < scenes:
                raise UserError(
                    f"'first_seed' is {first}: {self.environment}'s scenes below {scenes} are the "
                    "benchmark's own, and only for 'evaluate'"
                )
        if judged.first_seed + judged.episodes > scenes:
            raise UserError(
                f"evaluate: {self.environment} has {scenes} scenes; 'first_seed' and "
                "'episodes' go beyond them"
            )


def stated(config: Any) -> dict[str, Any]:
    """A configuration as keys and values, without the options that were left open.

    So a run's directory and a bundle's provenance say the same after an option is added.
    """
    return asdict(config, dict_factory=lambda items: {key: v for key, v in items if v is not None})


def load_config(path: Path) -> CompressConfig:
    """Read a pipeline's YAML.

    Raises:
        UserError: naming the file, the key and what is wrong.
    """
    return from_dict(CompressConfig, read_yaml(path), str(path))
