"""One trial after the other on the nodes of a robot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlrc_ros import bringup
from rlrc_ros.execution import POLICY_ERROR
from rlrc_ros.profile import RobotProfile
from rlrc_ros.trials import seal
from rlrc_ros.trials.client import RobotClient
from rlrc_ros.trials.session import Ended, Trial, TrialSession


def never() -> bool:
    """What nobody asks for."""
    return False


def trial_nodes(session: TrialSession, profile: RobotProfile) -> list[bringup.NodeSpec]:
    """The nodes to start for a trial: its policies sealed, its bags in its directory."""
    sealed = str((session.directory / seal.FILE).resolve())
    return bringup.nodes(profile, output_dir=str(session.bags.resolve()), sealed=sealed)


def run_current(
    session: TrialSession,
    robot: RobotClient,
    should_stop: Callable[[], bool] = never,
    should_finish: Callable[[], bool] = never,
    on_running: Callable[[Trial], None] | None = None,
) -> Trial:
    """Run the current step of a trial; afterwards it awaits its label.

    A simulated scene is set up first; on a real arm a person has done that.

    Args:
        session: the trial, in state "ready".
        robot: the nodes, ready.
        should_stop: asked about 50 times a second; True stops the arm: operator_stop.
        should_finish: the same where the operator sees that the episode is over: finished.
        on_running: called when the trial has begun.

    Raises:
        UserError: the nodes refuse or do not answer: the trial is then interrupted, its step
            current again. Or the session is not ready.
    """
    step = session.current()
    instruction = ""
    if session.state == "ready" and step is not None:
        robot.idle()
        instruction = step.task.instruction
        if step.start.seed is not None:
            scene = robot.reset_scene(step.start.seed, step.task.family)
            instruction = instruction or scene.instruction
    trial = session.start(instruction)
    assert step is not None
    try:
        if on_running is not None:
            on_running(trial)
        outcome = robot.run_episode(
            instruction,
            step.policy_label,
            trial.episode_id,
            session.plan.max_duration,
            record=True,
            should_stop=should_stop,
            should_finish=should_finish,
        )
    except BaseException as error:
        session.interrupt(trial.number, str(error) or type(error).__name__)
        raise
    result = outcome.result
    measurements = {
        "steps": result.steps,
        "latency_ms_p50": result.latency_ms_p50,
        "latency_ms_p99": result.latency_ms_p99,
        "deadline_misses": result.deadline_misses,
        "skipped_steps": result.skipped_steps,
        "guard": outcome.guard,
    }
    message = result.message
    if result.termination_reason == POLICY_ERROR:
        # It may tell how long the policy took, or what it is.
        message, measurements["message"] = "", result.message
    return session.stop(
        trial.number,
        Ended(
            termination_reason=result.termination_reason,
            message=message,
            duration=outcome.duration,
            bag=Path(result.bag_uri).name,
            judged={None: "", True: "success", False: "failure"}[outcome.success],
            measurements=measurements,
        ),
    )
