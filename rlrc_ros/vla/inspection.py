"""What a bundle is, told from its files alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.policy import empty_model, parameter_counts, part_of


def inspect(policy: str | Path) -> dict[str, Any]:
    """Facts of a bundle, JSON-able. Loads no weights.

    Raises:
        UserError: there is no such bundle, or it is damaged.
    """
    bundle = open_bundle(policy)
    model = empty_model(bundle)
    stored = dict.fromkeys(model.parts, 0)
    for name, size in bundle.sizes().items():
        stored[part_of(name)] += size
    config, architecture = bundle.config, bundle.config.architecture
    chunked, expert = architecture.action_head or architecture.expert, architecture.expert
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "hash": bundle.hash,
        "parameters": parameter_counts(model),
        "bytes": stored | {"total": sum(stored.values())},
        "bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "layers": [asdict(widths) for widths in architecture.decoder.layers],
        "expert_layers": [asdict(widths) for widths in expert.layers] if expert else None,
        "dtype": config.dtype,
        "quantization": asdict(config.quantization) if config.quantization else None,
        "control_rate": config.control_rate,
        "chunk": chunked.chunk if chunked else 1,
        "cameras": [asdict(camera) for camera in config.cameras],
        "proprioception": config.proprioception.to_dict() if config.proprioception else None,
        "provenance": bundle.provenance,
    }
