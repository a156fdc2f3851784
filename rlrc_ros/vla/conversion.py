"""A checkpoint as upstream publishes it, to a bundle that says what a robot has to provide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlrc_ros.errors import UserError
from rlrc_ros.vla.bundle import SUMS, Bundle, open_bundle, provenance, write_bundle
from rlrc_ros.vla.config import EE_POSE_NAMES, BundleConfig
from rlrc_ros.vla.policy import empty_model


def convert(
    checkpoint: str | Path,
    out: Path,
    *,
    unnorm_key: str | None = None,
    cameras: Sequence[str] = (),
    joints: Sequence[str] = (),
    ee_pose: bool = False,
    control_rate: float | None = None,
    chunk: int | None = None,
    center_crop: float = 1.0,
) -> Bundle:
    """Write a bundle with a checkpoint's weights as they are stored, in safetensors alone.

    Args:
        checkpoint: a directory as OpenVLA, OpenVLA-OFT or pi0 is published; `DIR#KEY` for
            `unnorm_key`.
        out: the new bundle's directory.
        unnorm_key: the data set of `norm_stats` that scales actions and proprioception.
        cameras: names of the cameras that the policy looks through, in order; OpenVLA-OFT and pi0
            take as many images as there are names.
        joints: names of the values of its proprioception, in order.
        ee_pose: six values before them are the end effector's pose.
        control_rate: Hz, of the data that it was trained on.
        chunk: actions in a chunk of OpenVLA-OFT.
        center_crop: share of an image's area to look at; 0.9 where upstream trained with
            `image_aug`.

    Raises:
        UserError: the checkpoint is no such checkpoint, is damaged, or does not fit what is asked;
            nothing is written then.
    """
    source = open_bundle(checkpoint, unnorm_key)
    if (source.path / SUMS).is_file():
        raise UserError(f"{source.path}: is a bundle already")
    source.require_action_scale()
    if not source.has_tokenizer:
        raise UserError(f"{source.path}: has no tokenizer.json; copy it from the checkpoint")
    config = _contract(source.config, str(source.path), cameras, joints, ee_pose, chunk)
    config = replace(config, center_crop=center_crop)
    if control_rate is not None:
        config = replace(config, control_rate=control_rate)
    empty_model(replace(source, config=config))  # or say now what does not fit
    tensors = {name: tensor.contiguous() for name, tensor in source.tensors().items()}
    origin = provenance(source, "converted", unnorm_key=unnorm_key)
    return write_bundle(out, config, tensors, source.tokenizer(), origin)


def _contract(
    config: BundleConfig,
    where: str,
    cameras: Sequence[str],
    joints: Sequence[str],
    ee_pose: bool,
    chunk: int | None,
) -> BundleConfig:
    architecture, head = config.architecture, config.architecture.action_head
    if cameras:
        if head is None and architecture.expert is None and len(cameras) != 1:
            raise UserError(f"{where}: OpenVLA looks through one camera, {len(cameras)} are named")
        if len(set(cameras)) < len(cameras):
            raise UserError(f"{where}: a camera is named twice: {', '.join(cameras)}")
        architecture = replace(architecture, images=len(cameras))
        like = config.cameras[0]
        config = replace(
            config,
            architecture=architecture,
            cameras=tuple(replace(like, name=name) for name in cameras),
        )
    if joints or ee_pose:
        contract = config.proprioception
        takes = len(contract.mean) if contract else 0
        named = len(joints) + len(EE_POSE_NAMES) * ee_pose
        if contract is None or named != takes:
            raise UserError(
                f"{where}: the policy takes {takes} proprioception values, {named} are named"
            )
        contract = replace(contract, joints=tuple(joints), ee_pose=ee_pose)
        config = replace(config, proprioception=contract)
    if chunk is not None:
        if head is None:
            raise UserError(f"{where}: gives no chunks to choose the length of")
        head = replace(head, chunk=chunk)
        config = replace(config, architecture=replace(config.architecture, action_head=head))
    return config
