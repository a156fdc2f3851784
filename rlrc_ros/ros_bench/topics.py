"""What the processes of a measurement agree on."""

from __future__ import annotations

FRONT, SIDE = "/bench/front/image_raw", "/bench/side/image_raw"
JOINT_STATES, EE_POSE = "/bench/joint_states", "/bench/ee_pose"
RELAY_AT_RATE, RELAY_ON_ARRIVAL = "/bench/relay/at_rate", "/bench/relay/on_arrival"
CAMERAS = (FRONT, SIDE)

WIDTH, HEIGHT = 640, 480
CAMERA_RATE = 30.3
"""Hz: not a whole multiple of a control rate, or the phase between a camera and a policy that looks
every so often would be the same all through a run, and the age of images a matter of luck."""
JOINT_RATE = 100.0
"""Hz."""
