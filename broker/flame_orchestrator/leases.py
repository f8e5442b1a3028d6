"""Leases of one cluster key: renewed by heartbeats, and given up for lost when these fail to come.

Every orchestrator hears all heartbeats, on an ear of its own that is never behind other messages.
The one that leads says so every two seconds: a worker claims calls only while it hears that, and
waits for answers. So it is not said while nothing can be written down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from flame_broker.errors import FlameError
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import ControlFrame, Plain
from flame_broker.topology import beats_exchange, beats_queue, control_exchange, custody_queue
from flame_broker.transport import Delivery, Transport
from flame_orchestrator.custody import Custody, Run
from flame_orchestrator.database import in_words
from flame_orchestrator.roll import Roll
from flame_orchestrator.session import Answer
from flame_orchestrator.silence import ECHO_EVERY_S, Silence
from flame_orchestrator.timekeeper import InThread

__all__ = ["LEASE_S", "Leases"]

_log = get_logger("flame.orchestrator")

LEASE_S: Final = 30.0
"""How long a worker may be silent before what it runs is given to others (PROTOCOL.md, rule 6)."""

_LEADS_EVERY: Final = 2  # echoes
_BEATS_AHEAD: Final = 1000


class Leases:
    """Knows which runs have leases, and which of them are lost.

    Args:
        transport: Where heartbeats come from.
        keyring: Whose signatures count.
        key: The cluster key.
        custody: Has the leases.
        in_thread: Where that blocks.
        epoch: Ours; None while another one leads.
        holder: Our name.
        lease_s: How long a run may be silent.

    Attributes:
        roll: The workers that beat.
        can_answer: Whether claims can be decided, as far as is known.
    """

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        key: Key,
        custody: Custody,
        *,
        in_thread: InThread,
        epoch: Callable[[], int | None],
        holder: str,
        lease_s: float,
    ) -> None:
        self._transport = transport
        self._keyring = keyring
        self._key = key
        self._custody = custody
        self._in_thread = in_thread
        self._epoch = epoch
        self._holder = holder
        self._exchange = beats_exchange(key.hex_id)
        self._silence = Silence(lease_s)
        self.roll = Roll()
        self.can_answer = True
        self._loaded: int | None = None

    async def listen(self) -> None:
        """Begin to hear heartbeats.

        Raises:
            BrokerUnavailable: No broker answered in time.
        """
        await self._transport.declare_exchange(self._exchange, "fanout")
        await self._transport.declare_exchange(control_exchange(self._key.hex_id), "fanout")
        queue = beats_queue(self._key.hex_id, self._holder)
        await self._transport.declare(queue)
        await self._transport.consume(queue.name, self._on_beat, prefetch=_BEATS_AHEAD)

    def granted(self, answer: Answer) -> None:
        """A run has the lease on some calls."""
        if answer.granted and not answer.claim.look:
            frame, counters = answer.claim.frame, frozenset(answer.granted)
            limit_s = frame.spec.limit_s
            self._silence.add(Run(answer.claim.run, frame.client, counters, limit_s))

    def forget_all(self) -> None:
        """Another one leads."""
        self._loaded = None
        self._silence.forget_all()

    def _on_beat(self, delivery: Delivery) -> None:
        delivery.ack()
        try:
            frame, _ = open_frame(delivery.body, self._keyring, queue=self._exchange)
        except FlameError as problem:
            _log.warning("beat.refused", reason=str(problem))
            return
        if not isinstance(frame, ControlFrame) or frame.verb != "beat":
            return
        worker = frame.arguments.get("worker")
        if worker == self._holder:
            self._silence.echo()
            return
        self._enrol(str(worker), frame)
        runs = frame.arguments.get("runs")
        unknown = self._silence.beat(map(str, runs)) if isinstance(runs, tuple) else []
        leads = self._loaded is not None and self._loaded == self._epoch()
        if unknown and leads and self.can_answer:
            reply = str(frame.arguments.get("reply", ""))
            told: dict[str, Plain] = {"runs": tuple(unknown), "epoch": self._loaded}
            self._say(ControlFrame(reply, "reclaim", told))

    def _enrol(self, worker: str, beat: ControlFrame) -> None:
        """Orchestrators beat too, without facts."""
        facts = beat.arguments.get("facts")
        if isinstance(facts, bytes):
            self.roll.hear(worker, facts)
        elif beat.arguments.get("leaves"):
            self.roll.forget(worker)

    # ── time passes ──────────────────────────────────────────────────────────

    async def watch(self) -> None:
        """Beat, say that we lead, give up what is lost; for ever."""
        turn = 0
        while True:
            echo = ControlFrame(self._exchange, "beat", {"worker": self._holder})
            self._say(echo, exchange=self._exchange)
            epoch = self._epoch()
            if epoch is not None:
                await self._act(epoch, announce=turn % _LEADS_EVERY == 0)
            elif self._loaded is not None:
                self.forget_all()
            turn += 1
            await asyncio.sleep(ECHO_EVERY_S)

    async def _act(self, epoch: int, *, announce: bool) -> None:
        fresh = self._loaded != epoch
        if fresh:
            try:
                self._silence.start_anew(await self._in_thread(self._custody.runs))
            except SQLAlchemyError as problem:
                _log.warning("leases.not_read", reason=in_words(problem))
                return
            self._loaded = epoch
        if (announce or fresh) and self.can_answer:
            exchange = control_exchange(self._key.hex_id)
            told: dict[str, Plain] = {"epoch": epoch, "lease_s": self._silence.lease_s}
            self._say(ControlFrame(exchange, "leads", told), exchange=exchange)
        for run in self._silence.take_lost():
            if not await self._report("lost", run, epoch):
                self._silence.add(run)  # and it has another lease's time
        for run in self._silence.overdue():
            if await self._report("overdue", run, epoch):
                self._silence.forget(run.run)

    async def _report(self, verb: str, run: Run, epoch: int) -> bool:
        """Write to the custodian about it: what it decides then is said until it is heard."""
        queue = custody_queue(self._key.hex_id).name
        about: dict[str, Plain] = {
            "client": run.client,
            "counters": tuple(sorted(run.counters)),
            "run": run.run,
            "epoch": epoch,
        }
        body = encode(ControlFrame(queue, verb, about), self._key)
        try:
            await self._transport.publish(queue, body)
        except FlameError as problem:
            _log.warning("lease.not_given_up", run=run.run, reason=str(problem))
            return False
        _log.info("lease.given_up", run=run.run, calls=len(run.counters), reason=verb)
        return True

    def _say(self, frame: ControlFrame, *, exchange: str = "") -> None:
        said = self._transport.publish(
            "" if exchange else frame.queue,
            encode(frame, self._key),
            exchange=exchange,
            mandatory=False,
            persistent=False,
        )
        said.add_done_callback(_forget)


def _forget(said: asyncio.Future[None]) -> None:
    """It is said again soon; looking at the exception keeps asyncio from reporting it."""
    if not said.cancelled():
        said.exception()
