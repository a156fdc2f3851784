"""The policy node, with a note of every image it got and of when its policy began and ended.

    python -m rlrc_ros.ros_bench.watched_policy NOTES CAMERA,CAMERA --ros-args …

Its actions are replaced by a steady motion, since an arm must move to be stopped, and a policy that
sees noise may stand still. Nothing else about the node is changed. NOTES is a file as `stamps`
reads it: the stamps of images by their camera's place among those named, and under BEGAN and ENDED
the times of each action.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rlrc_ros.messages.observation import ObservationBuffer
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes import policy_node
from rlrc_ros.ros_bench.stamps import StampWriter
from rlrc_ros.vla.policy import Policy

BEGAN, ENDED = 10, 11
MOTION = (0.005, 0.0, 0.0, 0.0, 0.0, 0.0)
"""What is commanded in each control step: m, then rad."""


def watch(notes: StampWriter, cameras: list[str]) -> None:
    """Have every buffer and every policy of this process note what it does."""
    add, act = ObservationBuffer.add, Policy.act

    def noted_add(buffer: ObservationBuffer, source: str, message: Any) -> None:
        if source in cameras:
            notes.write(cameras.index(source), to_nanoseconds(message.header.stamp))
        add(buffer, source, message)

    def noted_act(policy: Policy, *arguments: Any, **keywords: Any) -> Any:
        began = time.time_ns()
        chunk = act(policy, *arguments, **keywords)
        ended = time.time_ns()
        notes.write(BEGAN, began)
        notes.write(ENDED, ended)
        notes.flush()
        chunk.actions[:, :6] = MOTION
        return chunk

    setattr(ObservationBuffer, "add", noted_add)  # noqa: B010  (mypy refuses the plain form)
    setattr(Policy, "act", noted_act)  # noqa: B010


def main() -> int:
    """Run the node."""
    notes = StampWriter(Path(sys.argv.pop(1)))
    watch(notes, sys.argv.pop(1).split(","))
    try:
        return policy_node.main()
    finally:
        notes.flush()


if __name__ == "__main__":
    sys.exit(main())
