"""What answers where an embedded cluster has no orchestrator: why it has none."""

from __future__ import annotations

import asyncio
from typing import Final

from flame_broker.errors import FlameError, NoOrchestrator
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Deposit, Result, ResultFrame, Status
from flame_broker.outcomes import encode_failure
from flame_broker.topology import (
    custody_queue,
    kept_logs_queue,
    ledger_queue,
    questions_queue,
)
from flame_broker.transport import Delivery, Transport

__all__ = ["Absent"]

_AHEAD: Final = 100

_log = get_logger("flame.embedded")


class Absent:
    """Refuses what only an orchestrator can do, so that nobody waits for it.

    Args:
        transport: Into the embedded cluster.
        keyring: Its key.
        reason: Why there is no orchestrator, and what to do about it.
    """

    def __init__(self, transport: Transport, keyring: Keyring, reason: str) -> None:
        self._transport = transport
        self._keyring = keyring
        self._reason = reason

    async def start(self) -> None:
        """Take what is asked; what nobody will write down is not collected any more."""
        key_id = self._keyring.signer.hex_id
        for spec in (ledger_queue(key_id), kept_logs_queue(key_id)):
            await self._transport.delete(spec.name)
        for spec in (questions_queue(key_id), custody_queue(key_id)):
            await self._transport.consume(spec.name, self._refuse, prefetch=_AHEAD)

    def _refuse(self, delivery: Delivery) -> None:
        delivery.ack()
        try:
            frame, _ = open_frame(delivery.body, self._keyring, queue=delivery.queue)
        except FlameError as problem:
            _log.warning("embedded.refused", reason=str(problem))
            return
        if isinstance(frame, Deposit):
            self._say(self._failed(frame))
        elif isinstance(frame, ControlFrame) and frame.verb == "ask":
            token = frame.arguments.get("token")
            reply = str(frame.arguments.get("reply", ""))
            self._say(ControlFrame(reply, "answer", {"token": token, "absent": self._reason}))

    def _failed(self, deposit: Deposit) -> ResultFrame:
        frame, payload = deposit.frame, encode_failure(NoOrchestrator, self._reason)
        results = tuple(Result(call.counter, Status.FAILED, payload) for call in frame.calls)
        return ResultFrame(frame.reply, frame.client, "", results)

    def _say(self, frame: ControlFrame | ResultFrame) -> None:
        body = encode(frame, self._keyring.signer)
        self._transport.publish(frame.queue, body, mandatory=False).add_done_callback(_heard)


def _heard(said: asyncio.Future[None]) -> None:
    if not said.cancelled() and (problem := said.exception()) is not None:
        _log.info("embedded.not_heard", reason=str(problem))
