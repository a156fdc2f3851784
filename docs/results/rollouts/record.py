"""Record a policy's rollouts over real nodes, and take over where it does not get on.

    python docs/results/rollouts/record.py POLICY OUT [SUCCESSES TAKEOVERS FIRST_SCENE]

Scene by scene the policy has 5 s. Where it is done by then, its bag is labelled a success. Where it
is not, the bag is labelled a failure and `operator_node` takes over: the scripted expert goes on
from there, in a bag of its own. Ends with so many successes of both; what came of every scene is in
OUT/scenes.jsonl.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rlrc.msg import TaskState
from rlrc.srv import LabelEpisode
from std_srvs.srv import Trigger

from rlrc_ros import bringup
from rlrc_ros.profile import load_profile
from rlrc_ros.trials.client import RobotClient
from rlrc_ros.trials.simulated import running_nodes

PATIENCE, TAKEOVER = 5.0, 15.0  # s


class _ExpertArm(bringup.NodeSpec):
    def command(self):
        script = str(Path(__file__).with_name("expert_arm.py"))
        return [sys.executable, script, "--ros-args", *self.ros_arguments()]


class _Operator:
    """Who stands beside the arm: takes over, hands back, labels."""

    def __init__(self):
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self._node = rclpy.create_node("somebody", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self.done = False
        self._node.create_subscription(TaskState, "sim_arm/task_state", self._on_task, 10)
        kinds = {"operator/take_over": Trigger, "operator/hand_back": Trigger}
        kinds["recorder/label"] = LabelEpisode
        self._clients = {name: self._node.create_client(kind, name) for name, kind in kinds.items()}

    def _on_task(self, state):
        self.done = state.success

    def wait(self, seconds, condition):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.02)
        return condition()

    def ask(self, name, **fields):
        client = self._clients[name]
        assert self.wait(10, client.service_is_ready), name
        future = client.call_async(client.srv_type.Request(**fields))
        assert self.wait(20, future.done), name
        return future.result()

    def label(self, uri, outcome):
        response = self.ask("recorder/label", uri=uri, outcome=outcome, notes="by ground truth")
        assert response.success, response.message


policy, out = sys.argv[1], Path(sys.argv[2])
successes, takeovers, scene = map(int, sys.argv[3:6] or (50, 25, 7_000_000))
profile = load_profile("sim")
bags = str((out / "bags").resolve())
specs = bringup.nodes(profile, output_dir=bags, policies={"policy": policy})
specs = [
    _ExpertArm(**vars(spec)) if spec.executable == "sim_arm_node" else spec for spec in specs
] + [bringup.NodeSpec("operator_node")]
count = Counter()
with running_nodes(specs, out / "logs") as alive, RobotClient() as robot:
    robot.wait_until_ready(alive)
    operator = _Operator()
    with (out / "scenes.jsonl").open("a") as log:
        while count["success"] < successes or count["takeover success"] < takeovers:
            instruction = robot.reset_scene(scene).instruction
            began = time.monotonic()
            ended = robot.run_episode(
                instruction,
                "policy",
                f"scene-{scene}",
                PATIENCE + 5,
                record=True,
                should_stop=lambda began=began: time.monotonic() - began > PATIENCE,
            )
            line = {"scene": scene, "instruction": instruction, "success": ended.success}
            line["termination_reason"] = ended.result.termination_reason
            operator.label(ended.result.bag_uri, "success" if ended.success else "failure")
            count["success" if ended.success else "failure"] += 1
            if not ended.success:
                taken = operator.ask("operator/take_over")
                line["takeover"], line["message"] = None, taken.message
                if taken.success:
                    operator.done = False
                    solved = operator.wait(TAKEOVER, lambda: operator.done)
                    back = operator.ask("operator/hand_back")
                    line |= {"takeover": solved, "message": Path(back.message).name}
                    operator.label(back.message, "success" if solved else "failure")
                    count[f"takeover {'success' if solved else 'failure'}"] += 1
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(dict(count), line, flush=True)
            scene += 1
