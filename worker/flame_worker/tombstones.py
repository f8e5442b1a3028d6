"""What was cancelled while a worker was not there to hear of it (PROTOCOL.md, rule 10)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, Protocol

from flame_broker.errors import FlameError
from flame_broker.frames import encode
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame
from flame_broker.topology import control_queue, questions_queue
from flame_broker.transport import Transport, Unroutable

__all__ = ["Tombstones"]

_log = get_logger("flame.worker")

_PATIENCE_S: Final = 2.0
"""An orchestrator that is away is not waited for longer: calls flow without it."""


class _Cancel(Protocol):
    """Stops calls that are here, and those that may still come."""

    def __call__(
        self, client: str, counters: frozenset[int], /, *, spare_running: bool
    ) -> None: ...


class Tombstones:
    """Asks the orchestrator before the first delivery, and after every reconnect.

    We hear the workers' control exchange by then, on which the orchestrator repeats each cancel
    once it is written down. So no cancel falls between the question and its answer.

    Args:
        transport: Where it is asked.
        keyring: The keys whose calls are run here.
        worker: Our name; the answers come to our ear for control.
        cancel: Told of each cancelled call.
    """

    def __init__(
        self, transport: Transport, keyring: Keyring, worker: str, cancel: _Cancel
    ) -> None:
        self._transport = transport
        self._keyring = keyring
        self._worker = worker
        self._cancel = cancel
        self._missing: set[str] = set()
        self._complete = asyncio.Event()

    async def learn(self) -> None:
        """Ask, and wait for the answers if there may be any."""
        if not self._transport.capabilities.fanout:
            return
        self._complete.clear()
        self._missing = {key.hex_id for key in self._keyring if await self._ask(key)}
        if self._missing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._complete.wait()

    async def _ask(self, key: Key) -> bool:
        """Whether an answer may come: where no orchestrator has run, there is no such queue."""
        queue = questions_queue(key.hex_id).name
        reply = control_queue(key.hex_id, self._worker).name
        asked = ControlFrame(queue, "ask", {"question": "cancelled", "reply": reply})
        try:
            await self._transport.publish(queue, encode(asked, key))
        except Unroutable:
            return False
        except FlameError as problem:
            _log.warning("worker.cancels_unknown", reason=str(problem))
            return False
        return True

    def take(self, frame: ControlFrame, key: Key) -> None:
        """The answer of an orchestrator."""
        cancelled = frame.arguments.get("cancelled")
        for entry in cancelled if isinstance(cancelled, tuple) else ():
            match entry:
                case (str(client), tuple(counters)):
                    numbers = frozenset(n for n in counters if isinstance(n, int))
                    self._cancel(client, numbers, spare_running=False)
        self._missing.discard(key.hex_id)
        if not self._missing:
            self._complete.set()
