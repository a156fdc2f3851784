"""What `config.json` of a policy bundle says.

Architecture, action codec, contract with the robot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlrc_ros.errors import UserError

FORMAT_VERSION = 1


def _refuse_below(least: int, where: str, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{where}: {name} is {value}, and must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer.

    `dinov2` has a class token, four registers and LayerScale; `siglip` carries a pooling head that
    is never run. Both give the features of their last block but one, as OpenVLA does, without the
    final norm. `vit` is neither: every block runs, and the final norm. `paligemma` is SigLIP as
    PaliGemma runs it: every block, the final norm, and no pooling head; pi0 has it.
    """

    kind: Literal["dinov2", "siglip", "vit", "paligemma"]
    width: int
    depth: int
    heads: int
    ffn: int
    patch: int
    image_size: int
    mean: tuple[float, ...]
    """Subtracted from RGB in [0, 1]; one value a channel."""
    std: tuple[float, ...]

    @property
    def patches(self) -> int:
        """How many tokens an image becomes."""
        return (self.image_size // self.patch) ** 2

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "depth", "heads", "ffn", "patch")}
        _refuse_below(1, "vision tower", **sizes, image_size=self.image_size)
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not len(self.mean) == len(self.std) == 3 or not finite or min(self.std) <= 0:
            raise UserError(
                "vision tower: mean and std need three values each, those of std positive"
            )
        if self.image_size % self.patch or self.width % self.heads:
            raise UserError(
                f"vision tower: {self.image_size} px must divide into patches of {self.patch} px, "
                f"and width {self.width} into {self.heads} heads"
            )


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer; they differ between layers after pruning."""

    heads: int
    kv_heads: int
    ffn: int

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.ffn) < 1 or self.heads % self.kv_heads:
            raise UserError(
                f"decoder layer: {self} is not possible; query heads must be a multiple of kv heads"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model's decoder: Llama's; in a policy with an `expert`, Gemma's."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    head_dim: int
    layers: tuple[LayerWidths, ...]
    pad_to_multiple_of: int = 0
    """Rows at the end of the vocabulary that stand for no token.

    The action tokens end before them.
    """
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    bos_token_id: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("decoder: 'layers' is empty")
        _refuse_below(1, "decoder", vocab_size=self.vocab_size, hidden_size=self.hidden_size)
        _refuse_below(1, "decoder", max_positions=self.max_positions)
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"decoder: head_dim is {self.head_dim}, and must be even and positive")
        first, last = sorted((self.bos_token_id, self.pad_token_id))
        if first < 0 or last >= self.vocab_size:
            raise UserError(f"decoder: a token id is outside the {self.vocab_size} of vocab_size")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The action expert of pi0 (Black et al., arXiv 2410.24164): a Gemma that denoises actions.

    Its layer i attends to the keys and values of the decoder's layer i. So there are as many, with
    as many key-value heads, of the decoder's `head_dim`.
    """

    hidden_size: int
    layers: tuple[LayerWidths, ...]
    chunk: int = 50
    """Actions of a chunk, one a control step."""
    action_width: int = 32
    """Of an action as the model gives it; the dimensions after the action codec's are padding."""
    state_width: int = 32
    """Of the proprioception as the model takes it, padded with zeros."""
    steps: int = 10
    """Euler steps from noise to actions."""
    min_period: float = 4e-3
    """Of the sinusoids that tell the expert the time in [0, 1]."""
    max_period: float = 4.0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("action_width", "state_width", "steps")}
        _refuse_below(1, "expert", chunk=self.chunk, **sizes)
        if self.hidden_size < 2 or self.hidden_size % 2:
            raise UserError(f"expert: hidden_size is {self.hidden_size}, and must be even")
        if not 0 < self.min_period < self.max_period < math.inf:
            raise UserError("expert: min_period must be above 0 and below max_period")


@dataclass(frozen=True, kw_only=True)
class ActionHeadConfig:
    """OpenVLA-OFT's head: a chunk of continuous actions from one pass over the decoder."""

    chunk: int
    """Actions that an inference gives, one a control step."""
    dimensions: int
    """Length of an action."""
    blocks: int = 2
    """Residual blocks."""
    stop_token_id: int = 2
    """Of the token that ends the sequence, after the places of the actions."""

    @property
    def places(self) -> int:
        """Numbers in a chunk, and tokens of the sequence that stand for them."""
        return self.chunk * self.dimensions

    def __post_init__(self) -> None:
        sizes = {"chunk": self.chunk, "dimensions": self.dimensions, "blocks": self.blocks}
        _refuse_below(1, "action head", **sizes)


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """The module tree of OpenVLA; with an `action_head` of OpenVLA-OFT, with an `expert` of pi0."""

    towers: tuple[TowerConfig, ...]
    decoder: DecoderConfig
    proprioception: int = 0
    """Length of the proprioception vector; 0: the policy takes none."""
    images: int = 1
    """How many cameras the policy looks through at once: the first ones of its contract."""
    action_head: ActionHeadConfig | None = None
    """None: the actions are tokens of the decoder's vocabulary."""
    expert: ExpertConfig | None = None

    @property
    def context(self) -> int:
        """How many tokens images and proprioception become; pi0's goes to the expert."""
        state = bool(self.proprioception) and self.expert is None
        return self.images * self.towers[0].patches + state

    def __post_init__(self) -> None:
        _refuse_below(1, "architecture", images=self.images)
        kinds = [tower.kind for tower in self.towers]
        if self.expert is not None:
            self._check_expert(self.expert, kinds)
        elif "paligemma" in kinds:
            raise UserError("architecture: a vision tower 'paligemma' takes an expert beside it")
        stop = self.action_head.stop_token_id if self.action_head else 0
        if not 0 <= stop < self.decoder.vocab_size:
            raise UserError(f"action head: stop_token_id {stop} is outside the vocabulary")
        if len({tower.patches for tower in self.towers}) != 1:
            raise UserError("architecture: the vision towers must give the same number of patches")

    def _check_expert(self, expert: ExpertConfig, kinds: Sequence[str]) -> None:
        if kinds != ["paligemma"]:
            raise UserError("architecture: with an expert there is one vision tower, 'paligemma'")
        mine, theirs = ([w.kv_heads for w in x.layers] for x in (expert, self.decoder))
        if mine != theirs:
            raise UserError(
                "architecture: the expert attends to the decoder layer by layer, so they need as "
                f"many layers and in each the same kv_heads; the expert has {mine}, the decoder "
                f"{theirs}"
            )
        if self.proprioception > expert.state_width:
            raise UserError(
                f"architecture: {self.proprioception} proprioception values do not fit the "
                f"expert's state_width of {expert.state_width}"
            )


@dataclass(frozen=True, kw_only=True)
class ActionCodecConfig:
    """How continuous actions become tokens.

    OpenVLA's uniform bins on [-1, 1] after scaling by quantiles. With an `expert` there are no
    bins: q01 and q99 are mean − and + standard deviation, which become -1 and +1.
    """

    n_bins: int = 256
    q01: tuple[float, ...]
    """The value that becomes -1, per dimension: metres, radians, or gripper opening in [0, 1]."""
    q99: tuple[float, ...]
    """The value that becomes +1."""
    mask: tuple[bool, ...]
    """False: the dimension is left in [-1, 1]."""

    def __post_init__(self) -> None:
        _refuse_below(2, "action codec", n_bins=self.n_bins)
        if not len(self.q01) == len(self.q99) == len(self.mask):
            raise UserError("action codec: q01, q99 and mask must have the same length")
        if any(m and not lo <= hi for lo, hi, m in zip(self.q01, self.q99, self.mask, strict=True)):
            raise UserError(
                "action codec: q01 must be below q99 in every dimension that mask scales, or equal "
                "where that does not move"
            )

    @property
    def dimensions(self) -> int:
        """Length of an action, and number of tokens it takes."""
        return len(self.q01)


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """A camera the policy looks through."""

    name: str
    height: int
    width: int

    def __post_init__(self) -> None:
        _refuse_below(1, f"camera '{self.name}'", height=self.height, width=self.width)


EE_POSE_NAMES = ("ee_x", "ee_y", "ee_z", "ee_rx", "ee_ry", "ee_rz")
"""What an end effector's pose is to a policy: position in m, rotation vector in rad."""


@dataclass(frozen=True, kw_only=True)
class ProprioceptionConfig:
    """What a policy feels: the values of `names`, in this order.

    The end effector's pose if `ee_pose`, positions of joints (rad or m), and the gripper's opening
    (0 closed to 1 open) if `gripper`.
    """

    joints: tuple[str, ...]
    gripper: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    limit: float | None = None
    """Normalised values beyond ± this are clipped to it; None: they are not."""
    ee_pose: bool = False
    """Position (m) and rotation vector (rad) of the robot profile's `ee_pose`, in its base frame.

    Of the two rotation vectors of an orientation the one nearer to `mean`
    (`rlrc_ros.messages.ee_pose`)."""

    @property
    def names(self) -> list[str]:
        """Of all values."""
        pose = EE_POSE_NAMES if self.ee_pose else ()
        return [*pose, *self.joints, *(["gripper"] if self.gripper else [])]

    @property
    def takes_joint_states(self) -> bool:
        """Whether any value comes from joint states, the gripper's opening among them."""
        return bool(self.joints) or self.gripper

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it: without what older versions do not know, unless it is used."""
        values = asdict(self)
        if not self.ee_pose:
            del values["ee_pose"]
        return values

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.names):
            raise UserError(
                "proprioception: mean and std need one value a joint, one for the gripper, and six "
                "for the end effector's pose"
            )
        if min(self.std, default=1.0) <= 0:
            raise UserError("proprioception: std must be positive")
        if self.limit is not None and not self.limit > 0:
            raise UserError("proprioception: limit must be positive")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the weights of some parts are stored."""

    method: Literal["bitsandbytes-nf4", "bitsandbytes-int8"]
    parts: tuple[Literal["llm", "vision", "projector", "expert"], ...]
    block_size: int = 64
    """Weights that share a scale, in NF4; int8 has one scale a row."""
    double_quantization: bool = True
    """Whether NF4's scales are quantized too."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("quantization: 'parts' is empty")


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Everything that is needed to run a policy, apart from weights and tokenizer."""

    architecture: ArchitectureConfig
    action_codec: ActionCodecConfig
    cameras: tuple[CameraConfig, ...]
    proprioception: ProprioceptionConfig | None
    control_rate: float
    """Hz; one action a period."""
    instruction_template: str
    """Has `{instruction}` in it, which is put in lower case."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the weights that are not quantized, as stored."""
    center_crop: float = 1.0
    """Share of an image's area that is looked at, about its centre, scaled up to the whole.

    Below 1 for a policy that was trained on random crops of that size (upstream's `image_aug`).
    """
    prompt_suffix_token: int | None = None
    """A token put after the prompt: OpenVLA was trained with 29871 there."""
    quantization: QuantizationConfig | None = None
    format: Literal["rlrc-bundle"] = "rlrc-bundle"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise UserError(
                f"format_version {self.format_version} is newer than this program's "
                f"{FORMAT_VERSION}; update rlrc-ros"
            )
        if "{instruction}" not in self.instruction_template:
            raise UserError("instruction_template must contain {instruction}")
        if not self.cameras:
            raise UserError("'cameras' is empty, and a policy looks through one")
        if len(self.cameras) < self.architecture.images:
            raise UserError(
                f"the architecture looks through {self.architecture.images} cameras, the contract "
                f"names {len(self.cameras)}"
            )
        head = self.architecture.action_head
        if head and head.dimensions != self.action_codec.dimensions:
            raise UserError(
                f"the action head gives {head.dimensions} values an action, the action codec "
                f"scales {self.action_codec.dimensions}"
            )
        if not 0.0 < self.center_crop <= 1.0:
            raise UserError(f"center_crop is {self.center_crop}, and must be above 0 and at most 1")
        if not self.control_rate > 0:
            raise UserError("control_rate must be positive")
        expected = self.architecture.proprioception
        found = len(self.proprioception.mean) if self.proprioception else 0
        if expected != found:
            raise UserError(
                f"the architecture takes {expected} proprioception values, the contract names "
                f"{found}"
            )
        expert, actions = self.architecture.expert, self.action_codec.dimensions
        if expert is not None and actions > expert.action_width:
            raise UserError(
                f"the action codec scales {actions} values, and the expert's action_width is "
                f"{expert.action_width}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        values = asdict(self)
        if self.proprioception is not None:
            values["proprioception"] = self.proprioception.to_dict()
        return values
