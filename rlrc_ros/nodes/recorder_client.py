"""The recorder as a node's coroutines see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.client import Client
from rclpy.node import Node
from rlrc.msg import RecorderStatus
from rlrc.srv import StartRecording, StopRecording
from std_msgs.msg import String

from rlrc_ros.errors import UserError
from rlrc_ros.nodes import common
from rlrc_ros.nodes.attendance import attending

PATIENCE = 10.0
"""s for the recorder to answer; less where it has not been heard of for a while."""
DISCOVERY_TIME = 2.0
"""s for it to be found, where it has only just started."""
ASKING_AGAIN = 1.0
"""s without an answer after which it is asked again to start. One that was killed stays in the
graph for `leaseDuration` (fastdds.xml), and what is asked meanwhile may have gone to it alone; one
that has just started may not know yet where to answer."""
SILENCE = 3.0
"""s without a word that it still records, which comes once a second; then it is taken for dead."""


class RecorderClient:
    """Starts and stops recordings; await its methods in a callback of the node's.

    Args:
        node: Whose callbacks they are.
        on_lost: Called once, with the reason, when a recording has ended before `stop`: the disk is
            full, or the recorder is dead.
    """

    def __init__(self, node: Node, on_lost: Callable[[str], None]) -> None:
        self._node, self._on_lost = node, on_lost
        self._start: Client[Any, Any] = node.create_client(StartRecording, "recorder/start")
        self._stop: Client[Any, Any] = node.create_client(StopRecording, "recorder/stop")
        self._attended = attending(node, "recorder")
        self._episode_id = ""
        """Of the recording that goes on; empty where none does."""
        self._heard = 0.0
        self._unanswered: StopRecording.Request | None = None
        """To stop, where the recorder was too late to answer, or has never heard of it."""
        self._patience = self._most_patience = PATIENCE
        node.create_subscription(RecorderStatus, "recorder/status", self._on_status, 10)
        node.create_timer(0.5, self._watch, clock=common.STEADY_CLOCK)

    def hurry(self, patience: float) -> None:
        """The process is about to end: no answer is waited for any longer than so many s."""
        self._patience = self._most_patience = patience

    def _on_status(self, status: RecorderStatus) -> None:
        if self._episode_id and status.episode_id == self._episode_id:
            self._heard = time.monotonic()
            if status.state == "failed":
                self._lose(status.message)
        elif self._unanswered and status.episode_id == self._unanswered.episode_id:
            self._stop.call_async(self._unanswered)  # it was frozen, and still records it

    def _watch(self) -> None:
        if self._episode_id and time.monotonic() - self._heard > SILENCE:
            self._patience = DISCOVERY_TIME
            self._lose(f"{SILENCE:g} s without a word that it records {self._episode_id}")

    def _lose(self, reason: str) -> None:
        self._episode_id = ""
        self._on_lost(f"the recorder: {reason}")

    async def start(self, request: StartRecording.Request) -> str:
        """Begin a bag; its URI.

        Raises:
            UserError: the recorder is missing, silent or refuses.
        """
        self._patience = self._most_patience
        self._attended.publish(String(data=request.episode_id))
        request.attended_on = self._attended.topic_name
        response = await self._ask(self._start, request, ASKING_AGAIN)
        if not response.success:
            raise UserError(f"the recorder: {response.message}")
        self._episode_id, self._heard = request.episode_id, time.monotonic()
        self._unanswered = None
        return response.uri

    async def stop(self, episode_id: str, termination_reason: str) -> str:
        """Finish that episode's bag; what went wrong, empty where nothing did.

        A recorder that does not answer is told again when it says that it still records it.
        """
        self._episode_id = ""
        request = StopRecording.Request(
            episode_id=episode_id, termination_reason=termination_reason
        )
        try:
            response = await self._ask(self._stop, request)
        except UserError as error:
            self._unanswered = request
            return str(error)
        return "" if response.success else response.message

    async def _ask(self, client: Client[Any, Any], request: Any, again: float = PATIENCE) -> Any:
        if not await common.until(self._node, client.service_is_ready, DISCOVERY_TIME):
            name = self._node.resolve_service_name(client.srv_name)
            raise UserError(f"there is no {name}; start recorder_node, or set record to false")
        asked: list[Any] = []
        answers: list[Any] = []
        began = time.monotonic()

        def late() -> bool:  # sooner than was meant, where the process is told to end meanwhile
            return time.monotonic() - began >= self._patience

        while not answers and not late():
            asked.append(client.call_async(request))
            await common.until(self._node, lambda: late() or any(f.done() for f in asked), again)
            answers = [future.result() for future in asked if future.done()]
        for future in asked:
            future.cancel()
        if not answers:
            raise UserError(f"{client.srv_name} did not answer within {self._patience:g} s")
        return answers[0]
