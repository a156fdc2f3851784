"""What a policy is, with no ROS in it: architecture, action codec, bundle, engines."""

from rlrc_ros.vla.policy import ActionChunk, Policy, load_policy
from rlrc_ros.vla.processor import Observation

__all__ = ["ActionChunk", "Observation", "Policy", "load_policy"]
