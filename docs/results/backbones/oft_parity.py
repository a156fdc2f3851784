"""How far OpenVLA-OFT here is from what upstream's own modules gave.

    PYTHONPATH=. python docs/results/backbones/oft_parity.py

Prints JSON: of each variant of inputs and each engine the largest difference of an action, over all
prompts and both sets of statistics. tests/vla/oft_upstream.py says how upstream's were made.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from rlrc_ros.vla import load_policy
from rlrc_ros.vla.conversion import convert
from tests.vla import oft_upstream
from tests.vla.test_openvla_oft import EXPECTED, act, expected, write_checkpoint


def main():
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for number, (variant, inputs) in enumerate(oft_upstream.VARIANTS.items()):
            source = write_checkpoint(Path(directory) / f"oft-{number}", variant)
            cameras = ["front", "wrist"][: inputs["images"]]
            for engine in ("eager", "graph"):
                differences = []
                for key in oft_upstream.KEYS:
                    out = Path(directory) / f"{number}-{engine}-{key}"
                    convert(source, out, unnorm_key=key, cameras=cameras)
                    policy = load_policy(out, engine=engine)
                    for case in range(oft_upstream.CASES):
                        actions = act(policy, case, inputs["images"])
                        differences.append(np.abs(actions - expected(variant, case, key)).max())
                row = {"variant": variant, "engine": engine, "chunks": len(differences)}
                found.append({**row, "max_action_diff": float(max(differences))})
    print(json.dumps({"upstream": EXPECTED["versions"], "differences": found}, indent=1))


if __name__ == "__main__":
    main()
