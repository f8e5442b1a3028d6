"""Leases: calls that run for long, or must not run twice, go into the orchestrator's custody.

A call that has run for five seconds is claimed, so that its message can be acked: the broker closes
whole channels over messages that are held for too long. From then on its result goes to the
orchestrator, and heartbeats say that it still runs (PROTOCOL.md, rules 5 and 6). A call that was
delivered to somebody before is looked up first, since its first run may still be alive (rule 4).
One that must run at most once is claimed before it starts.

Without an orchestrator nothing is claimed, and a message is held until its calls are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

from flame_broker.errors import WorkerLost
from flame_broker.facts import Facts, fold
from flame_broker.frames import encode
from flame_broker.keys import Key, Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import Claim, ControlFrame, Plain, Result, ResultFrame
from flame_broker.topology import beats_exchange, control_queue, custody_queue
from flame_broker.transport import Transport
from flame_worker.dispatch import Dispatcher
from flame_worker.holding import Holding
from flame_worker.lease import Lease
from flame_worker.outbox import Outbox

__all__ = ["HANDOVER_S", "Hands", "Leases"]

_log = get_logger("flame.worker")

HANDOVER_S: Final = 5.0
"""So long after its delivery a call is claimed (rule 5)."""

_LOOK_EVERY_S: Final = 0.5
_CLAIM_AGAIN_S: Final = 5.0
_DEAF_S: Final = 10.0
"""An orchestrator says every two seconds that it leads, and a successor does so within ten."""

_BEATS_A_LEASE: Final = 10
_FIRST_BEAT_S: Final = 3.0
_GOODBYE_S: Final = 1.0

_Then = Callable[[Holding], None]


class Hands(Protocol):
    """The frames in hand, as this module sees them."""

    def holdings(self) -> list[Holding]:
        """All of them."""

    async def make_way(self, holding: Holding, /) -> None:
        """See that the ack of a frame brings no other one while its calls still run."""


class Leases:
    """Claims calls, and keeps the leases alive.

    Args:
        transport: Where heartbeats go.
        keyring: The keys whose calls are run here.
        worker: Our name.
        outbox: Takes claims and results.
        dispatcher: Runs calls.
        hands: Has the frames.
        facts: What heartbeats say about us.
    """

    def __init__(
        self,
        transport: Transport,
        keyring: Keyring,
        worker: str,
        *,
        outbox: Outbox,
        dispatcher: Dispatcher,
        hands: Hands,
        facts: Callable[[], Facts] = dict,
    ) -> None:
        self._transport = transport
        self._keyring = keyring
        self._worker = worker
        self._outbox = outbox
        self._dispatcher = dispatcher
        self._hands = hands
        self._facts = facts
        self._runs = 0
        self._asked: dict[str, tuple[Holding, _Then | None]] = {}
        self._leased: dict[str, Holding] = {}
        self._heard_at: dict[str, float] = {}
        self._epochs: dict[str, int] = {}
        self._lease_s = _FIRST_BEAT_S * _BEATS_A_LEASE
        self._cut_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        """How many frames' calls run here that are in the orchestrator's custody."""
        return len(self._leased)

    def occupied(self, class_name: str) -> int:
        """How many slots of a resource class their calls take."""
        leased = self._leased.values()
        return sum(h.unsettled for h in leased if h.frame.spec.resources == class_name)

    def alive(self, key: Key) -> bool:
        """Whether an orchestrator was heard lately, so that claims are answered."""
        heard_at = self._heard_at.get(key.hex_id)
        return heard_at is not None and _now() - heard_at < _DEAF_S

    # ── claims ───────────────────────────────────────────────────────────────

    def look(self, holding: Holding, then: _Then) -> None:
        """Ask whether other runs have the calls of a frame; ``then`` has what is left of it."""
        self._ask(holding, {call.counter for call in holding.frame.calls}, then, look=True)

    def claim(self, holding: Holding, then: _Then) -> None:
        """Claim a frame before it starts; ``then`` has the calls that may start, in our custody."""
        self._ask(holding, {call.counter for call in holding.frame.calls}, then)

    def _ask(
        self, holding: Holding, counters: set[int], then: _Then | None, *, look: bool = False
    ) -> None:
        self._runs += 1
        lease = Lease(f"{self._worker}/{self._runs}", frozenset(counters), look)
        holding.lease = lease
        self._asked[lease.run] = holding, then
        self._send(holding, lease)

    def _send(self, holding: Holding, lease: Lease) -> None:
        lease.asked_at = _now()
        self._claim(holding, lease.run, lease.claimed, look=lease.look)

    def _claim(
        self, holding: Holding, run: str, counters: frozenset[int], *, look: bool = False
    ) -> None:
        queue, key = custody_queue(holding.key.hex_id), holding.key
        calls = tuple(call for call in holding.frame.calls if call.counter in counters)
        claim = Claim(
            queue=queue.name,
            frame=replace(holding.frame, calls=calls),
            run=run,
            worker=self._worker,
            reply=control_queue(key.hex_id, self._worker).name,
            look=look,
        )
        self._outbox.store(queue, encode(claim, key), lambda: None)

    # ── what the orchestrator says ───────────────────────────────────────────

    def _is_of_the_leader(self, frame: ControlFrame, key: Key) -> bool:
        """Whoever led before is not listened to any more (rule 11)."""
        epoch = frame.arguments.get("epoch")
        if not isinstance(epoch, int) or epoch < self._epochs.get(key.hex_id, 0):
            return False
        self._epochs[key.hex_id] = epoch
        self._heard_at[key.hex_id] = _now()
        return True

    def take_leads(self, frame: ControlFrame, key: Key) -> None:
        """An orchestrator says that it leads."""
        lease_s = frame.arguments.get("lease_s")
        if self._is_of_the_leader(frame, key) and isinstance(lease_s, float):
            self._lease_s = lease_s

    def take_answer(self, frame: ControlFrame, key: Key) -> None:
        """A claim was answered."""
        if not self._is_of_the_leader(frame, key):
            return
        run = str(frame.arguments.get("run"))
        granted, refused = (_numbers(frame, name) for name in ("granted", "refused"))
        if run in self._asked:
            holding, then = self._asked.pop(run)
            self._spawn(self._decided(holding, then, granted, refused))
        elif run in self._leased and refused:  # claimed again, but others have them by now
            self._drop(self._leased[run], refused)

    def take_reclaim(self, frame: ControlFrame, key: Key) -> None:
        """The orchestrator knows no lease of runs of ours: it gave them up while we were away."""
        runs = frame.arguments.get("runs")
        if not self._is_of_the_leader(frame, key) or not isinstance(runs, tuple):
            return
        for run in runs:
            holding = self._leased.get(str(run))
            if holding is not None:
                counters = frozenset(call.counter for call in holding.frame.calls)
                self._claim(holding, holding.run, counters)

    async def _decided(
        self,
        holding: Holding,
        then: _Then | None,
        granted: frozenset[int],
        refused: frozenset[int],
    ) -> None:
        lease = holding.lease
        assert lease is not None
        if refused:
            _log.info("lease.refused", run=lease.run, calls=len(refused))
            self._drop(holding, refused)
        if lease.look:
            holding.lease = None
            if holding.waiting and then is not None:
                then(holding)
            return
        if then is None:
            await self._hands.make_way(holding)
        leased = self._move(holding, lease, granted)
        if leased is not None and then is not None:
            then(leased)

    def _move(self, holding: Holding, lease: Lease, granted: frozenset[int]) -> Holding | None:
        """Put calls into a holding of their own, whose results go to the orchestrator.

        None if they have ended meanwhile, as they may when nobody answered for long.
        """
        parked, lease.parked = lease.parked, []
        ended = {result.counter for results, _ in parked for result in results}
        here = self._dispatcher.unfinished(holding) | {call.counter for call in holding.waiting}
        counters = granted & (here | ended)
        lease.claimed = frozenset()
        if not lease.refused:
            holding.lease = None
        if not counters:
            return None
        frame = replace(
            holding.frame,
            reply=custody_queue(holding.key.hex_id).name,
            spec=replace(holding.frame.spec, track=False),
            calls=tuple(call for call in holding.frame.calls if call.counter in counters),
        )
        leased = Holding([], frame, holding.key, self._settled, run=lease.run)
        leased.waiting.clear()
        self._leased[lease.run] = leased
        for call in [call for call in holding.waiting if call.counter in counters]:
            holding.waiting.remove(call)
            leased.waiting.append(call)
        leased.target_path, leased.pins = holding.target_path, [pin.twin() for pin in holding.pins]
        self._dispatcher.move(holding, leased)
        for results, seconds in parked:
            self._outbox.results(leased, results, seconds=seconds)
        _log.debug("lease.granted", run=lease.run, calls=len(counters))
        holding.settle(len(counters))
        return leased

    def _settled(self, leased: Holding) -> None:
        self._leased.pop(leased.run, None)

    def _drop(self, holding: Holding, refused: frozenset[int]) -> None:
        """Other runs have these calls, or they are over: ours end, and nobody is told."""
        lease = holding.lease
        if lease is None:
            lease = holding.lease = Lease(holding.run, frozenset())
        dropped = 0
        for results, _ in lease.parked:
            dropped += sum(result.counter in refused for result in results)
        lease.parked = [
            ([result for result in results if result.counter not in refused], seconds)
            for results, seconds in lease.parked
        ]
        lease.refused |= refused
        if dropped:
            holding.settle(dropped)
        self._dispatcher.abandon(holding, refused)

    # ── time passes ──────────────────────────────────────────────────────────

    def reconnected(self) -> None:
        """What we had in hand is with others now, unless the orchestrator knows that we run it."""
        self._cut_at = _now()
        self._beat()

    async def watch(self) -> None:
        """Claim what has run for long, ask again, beat; for ever."""
        beat_at = 0.0
        while True:
            if _now() >= beat_at:
                beat_at = _now() + self._lease_s / _BEATS_A_LEASE
                self._beat()
            for holding in self._hands.holdings():
                if self._is_to_be_claimed(holding):
                    running = self._dispatcher.unfinished(holding)
                    if running:
                        self._ask(holding, running, None)
            self._ask_again()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _is_to_be_claimed(self, holding: Holding) -> bool:
        if holding.lease is not None or holding.waiting or not self.alive(holding.key):
            return False
        long = self._dispatcher.takes_long(holding, HANDOVER_S)
        return long or holding.born < max(_now() - HANDOVER_S, self._cut_at)

    def _ask_again(self) -> None:
        now = _now()
        for holding, then in list(self._asked.values()):
            lease = holding.lease
            assert lease is not None
            if self.alive(holding.key) or holding.frame.spec.at_most_once:
                if now - lease.asked_at > _CLAIM_AGAIN_S:
                    self._send(holding, lease)
            elif lease.look and then is not None:
                del self._asked[lease.run]
                holding.lease = None
                then(holding)  # nobody knows of another run
            elif lease.copy is None:
                self._go_on_alone(holding, lease)

    def _go_on_alone(self, holding: Holding, lease: Lease) -> None:
        """The orchestrator is gone: results go to the client, and to its queue for its return."""
        lease.copy = partial(self._copy, holding)
        parked, lease.parked = lease.parked, []
        for results, seconds in parked:
            self._outbox.results(holding, results, seconds=seconds)

    def _copy(self, holding: Holding, results: list[Result]) -> None:
        queue, frame = custody_queue(holding.key.hex_id), holding.frame
        copy = ResultFrame(queue.name, frame.client, self._worker, tuple(results), frame.attempt)
        self._outbox.store(queue, encode(copy, holding.key), lambda: None)

    def _beat(self) -> None:
        """Say that our runs go on, and how we are; where nobody listens, that is lost."""
        facts = fold(self._facts())
        for key in self._keyring:
            runs = (run for run, holding in self._leased.items() if holding.key is key)
            self._say(key, {"runs": tuple(runs), "facts": facts})

    def _say(self, key: Key, words: dict[str, Plain]) -> asyncio.Future[None] | None:
        if not self._transport.capabilities.fanout:
            return None
        exchange = beats_exchange(key.hex_id)
        ear = control_queue(key.hex_id, self._worker).name
        said: dict[str, Plain] = {"worker": self._worker, "reply": ear, **words}
        body = encode(ControlFrame(exchange, "beat", said), key)
        beaten = self._transport.publish(
            "", body, exchange=exchange, mandatory=False, persistent=False
        )
        beaten.add_done_callback(_forget)
        return beaten

    # ── the end ──────────────────────────────────────────────────────────────

    def give_up(self) -> None:
        """The children are gone: what they have not begun, or not yet stored, is for others."""
        for holding in list(self._leased.values()):
            if holding.waiting:
                self._outbox.hand_back(holding, holding.take_waiting())
            left = self._dispatcher.unfinished(holding)
            calls = [call for call in holding.frame.calls if call.counter in left]
            if calls and holding.frame.spec.at_most_once:
                reason = f"its worker {self._worker} was stopped before its result was stored"
                self._outbox.failure(holding, calls, WorkerLost, reason)
            elif calls:
                self._outbox.hand_back(holding, calls)

    async def say_goodbye(self) -> None:
        """The last heartbeat: who leaves by himself is not missed."""
        said = [self._say(key, {"leaves": True}) for key in self._keyring]
        on_their_way = [beaten for beaten in said if beaten is not None]
        if on_their_way:
            await asyncio.wait(on_their_way, timeout=_GOODBYE_S)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _numbers(frame: ControlFrame, name: str) -> frozenset[int]:
    found = frame.arguments.get(name)
    numbers = found if isinstance(found, tuple) else ()
    return frozenset(number for number in numbers if isinstance(number, int))


def _forget(beaten: asyncio.Future[None]) -> None:
    """The next one comes soon; looking at the exception keeps asyncio from reporting it."""
    if not beaten.cancelled():
        beaten.exception()


def _now() -> float:
    return asyncio.get_running_loop().time()
