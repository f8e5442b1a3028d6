"""Calls in hand to slots, fairly and without one call holding up another.

Three rules make a slow call harmless to its neighbours (PROTOCOL.md, rules 2 and 14):

- A slot that falls idle takes over calls that wait behind a running call in another slot.
- A call that has waited 50 ms for a slot is handed back to its queue, alone in a frame; one that
  comes from there again waits up to 250 ms.
- Frames are held ahead of free slots only while calls are known to be short; otherwise the next one
  is asked for when a call is about to end, by the pace of its target, so that no slot waits for it.

And one makes a killer harmless (rule 4): a call under suspicion runs with nothing beside it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final, Protocol

from flame_broker.errors import CallCancelled, CallError, CallExpired
from flame_broker.logs import get_logger
from flame_broker.messages import Call, Event, EventKind, Result, Status, Suspicion
from flame_broker.outcomes import encode_failure
from flame_worker.apart import ARMED_S, Apart
from flame_worker.holding import Holding
from flame_worker.leaving import give_back
from flame_worker.outbox import Outbox
from flame_worker.pace import Pace
from flame_worker.pool import SlotPool
from flame_worker.slots import Batch, Lost, Slot, SpooledResult
from flame_worker.spool import Spool
from flame_worker.telling import Numbering, Voice
from flame_worker.timing import BUDGET_S, LEAD_S, LONE_S, SHORT_S, SUSPECT_S, UNDIVIDED_S

__all__ = ["DROPPED", "Dispatcher", "Supply"]

_log = get_logger("flame.worker")

DROPPED: Final[Mapping[type[CallError], str]] = {
    CallCancelled: "cancelled before it started",
    CallExpired: "it waited longer than its queue timeout and was never started",
}
"""Why a client may have a call dropped that has not started, and what is said of it then."""

_REBALANCE_S: Final = 0.003
_PRIORITIES: Final = ("high", "normal", "low")


@dataclass(slots=True, eq=False)
class _Given:
    """Calls of one holding in one slot; ``kept`` counts those that were not ``taken`` back."""

    holding: Holding
    kept: int
    unfinished: int
    at: float
    until: float = 0.0  # when they are expected to be over; 0: nobody can say
    seconds: float = 0.0
    taken: frozenset[int] = frozenset()


class Supply(Protocol):
    """Where calls come from, as the dispatcher sees it."""

    def full(self, class_name: str, queue: str, /) -> int:
        """Send no more of a class: calls are handed back to this queue. How many come anyway."""

    def refill(self) -> None:
        """A slot is free and nothing waits for it."""

    def foresee(self, class_name: str, /) -> None:
        """A slot of a class will be free in a moment."""

    def widen(self) -> None:
        """More calls can run at a time than before."""

    def short(self, class_name: str, seconds: float, /) -> None:
        """Send frames of a class ahead of free slots: they take so little time."""


class Dispatcher:
    """Gives calls to slots and their results to the outbox; owns the slots.

    Args:
        outbox: Takes results and hand-backs.
        spool: Uploads results that are too large for a frame.

    Attributes:
        pool: The slots, whose owner this is.
        intake: Told when there is room, and when there is none.
    """

    pool: SlotPool
    intake: Supply

    def __init__(self, outbox: Outbox, spool: Spool) -> None:
        self._pace = Pace()
        self._apart = Apart()
        self._numbering = Numbering()
        self._outbox = outbox
        self._spool = spool
        self._lines: dict[str, tuple[deque[Holding], ...]] = {}
        self._watching: asyncio.TimerHandle | None = None
        self._rebalancing: asyncio.TimerHandle | None = None
        self._closed = False

    # ── in ───────────────────────────────────────────────────────────────────

    def take(self, holding: Holding) -> None:
        """Run a holding's calls as slots allow."""
        if holding.frame.suspicion and not self._apart.take(holding, in_use=self._in_use()):
            self._outbox.hand_back(holding, holding.take_waiting())
            return
        holding.since = _now()
        self._line_of(holding).append(holding)
        self.pump()

    def pump(self) -> None:
        """Give what waits to the slots that can take it."""
        if self._closed:
            return
        for class_name, lines in self._lines.items():
            for line in lines:
                while line and self._place(class_name, line[0]):
                    line.popleft()
                if line:
                    break
        self._watch()

    def cancel(self, client: str, counters: frozenset[int]) -> None:
        """Stop calls: those that wait get their result now, those that run are interrupted."""
        for holding in self._waiting():
            if holding.frame.client == client:
                self._drop_waiting(holding, counters, CallCancelled)
        for slot in self.pool.slots():
            for batch in list(slot.batches):
                if batch.client == client:
                    for counter in counters.intersection(c.counter for c in batch.calls):
                        slot.cancel(client, counter)

    def drop_unstarted(self, client: str, counters: frozenset[int], kind: type[CallError]) -> None:
        """Stop calls that have not started; those that run go on to their end."""
        self._revoke_all(lambda given: given.holding.frame.client == client)
        for holding in self._waiting():
            if holding.frame.client == client:
                self._drop_waiting(holding, counters, kind)
        self.pump()

    def started(self, client: str, counters: frozenset[int]) -> set[int]:
        """Those of some calls that slots have begun, or would before they could be taken back."""
        found: set[int] = set()
        for slot in self.pool.slots():
            for batch in slot.batches:
                if batch.client == client:
                    given: _Given = batch.context  # type: ignore[assignment]
                    found.update({call.counter for call in batch.calls} - given.taken)
        return found & counters

    def hand_back_all(self) -> None:
        """Give up every call that has not started: the worker drains."""
        self._revoke_all(lambda given: True)
        for holding in self._waiting():
            self._hand_back(holding)

    def close(self) -> None:
        """Start nothing more: the slots are about to end. What waits is not acked."""
        self._closed = True

    def set_waiting(self, process_group: int, waits: bool) -> None:
        """The call of a child waits for calls of its own, or goes on."""
        self.pool.set_waiting(process_group, waits)
        self._fill()
        self.intake.widen()

    def waits(self, class_name: str) -> bool:
        """Whether calls of a class wait for a slot."""
        return any(self._lines.get(class_name, ()))

    def room(self, class_name: str) -> int:
        """How many calls of a class could start now, or as soon as they are here."""
        if self._apart.closed:
            return 0
        waiting = sum(len(h.waiting) for line in self._lines.get(class_name, ()) for h in line)
        return max(0, self.pool.room(class_name) + self.ending(class_name) - waiting)

    def running(self) -> set[Holding]:
        """The holdings that slots have calls of."""
        batches = chain.from_iterable(slot.batches for slot in self.pool.slots())
        return {batch.context.holding for batch in batches}  # type: ignore[attr-defined]

    def takes_long(self, holding: Holding, limit_s: float) -> bool:
        """Whether a call of a frame is known to take longer."""
        guess_s = self._pace.guess_s(holding.frame.spec.target, 1)
        return guess_s is not None and guess_s > limit_s

    def unfinished(self, holding: Holding) -> set[int]:
        """Calls of a frame that run with nothing of it behind them, or wait for the store."""
        run = {n for slot, batch, _ in self._alone_in(holding) for n in slot.left_of(batch)}
        return run | holding.convoys.keys()

    def move(self, holding: Holding, leased: Holding) -> None:
        """Let another holding have those calls."""
        self._spool.move(holding, leased)
        moved = {call.counter for call in leased.frame.calls}
        for slot, batch, given in self._alone_in(holding):
            if not moved.isdisjoint(slot.left_of(batch)):
                given.holding = leased

    def abandon(self, holding: Holding, counters: frozenset[int]) -> None:
        """Stop calls whose outcome is for nobody."""
        for slot in self.pool.slots():
            for batch in list(slot.batches):
                if batch.context.holding is holding:  # type: ignore[attr-defined]
                    for counter in counters.intersection(c.counter for c in batch.calls):
                        slot.cancel(batch.client, counter)
        dropped = [call for call in holding.waiting if call.counter in counters]
        for call in dropped:
            holding.waiting.remove(call)
        if dropped and not holding.waiting and holding in (line := self._line_of(holding)):
            line.remove(holding)
            self._apart.left(holding)
        holding.settle(len(dropped))

    def _alone_in(self, holding: Holding) -> Iterable[tuple[Slot, Batch, _Given]]:
        for slot in self.pool.slots():
            for batch in slot.batches:
                given: _Given = batch.context  # type: ignore[assignment]  # the context is ours
                if given.holding is holding and given.unfinished == 1:
                    yield slot, batch, given

    def ending(self, class_name: str) -> int:
        """How many slots of a class are about to be free."""
        now = _now()
        untils = (
            slot.batches[0].context.until  # type: ignore[attr-defined]
            for slot in self.pool.slots(class_name)
            if len(slot.batches) == 1
        )
        return sum(abs(until - now) <= LEAD_S for until in untils)

    # ── SlotOwner ────────────────────────────────────────────────────────────

    def on_results(self, slot: Slot, batch: Batch, results: list[Result | SpooledResult]) -> None:
        """Pass results on; large ones through the store."""
        given: _Given = batch.context  # type: ignore[assignment]  # the context is ours
        given.unfinished -= sum(result.status is not Status.ITEM for result in results)
        ready: list[Result] = results  # type: ignore[assignment]  # unless one of them is large:
        if given.holding.convoys or SpooledResult in map(type, results):
            ready = self._spool.in_order(given.holding, results)
        if ready:
            seconds, given.seconds = batch.seconds - given.seconds, batch.seconds
            self._outbox.results(given.holding, ready, seconds=seconds)

    def on_done(self, slot: Slot, batch: Batch, seconds: float) -> None:
        """Learn from a finished batch and fill the slot again."""
        given: _Given = batch.context  # type: ignore[assignment]
        spec = batch.spec
        if given.kept:
            self._pace.learn(spec.target, given.kept, seconds)
        if seconds < LEAD_S and given.unfinished <= 0:
            self.intake.short(spec.resources, seconds)
        self._fill()

    def on_ready(self, slot: Slot) -> None:
        """A child has started."""
        self._fill()
        self.intake.widen()

    def on_output(
        self, slot: Slot, batch: Batch, counter: int, kind: EventKind, lines: list[str]
    ) -> None:
        """Send output to who prints or keeps it."""
        voice = Voice.of(_holding_of(batch), output=True)
        if voice.heard:
            for event in self._numbering.events(batch, counter, kind, lines):
                self._outbox.event(voice, event)

    def on_progress(
        self, slot: Slot, batch: Batch, counter: int, fraction: float, text: str
    ) -> None:
        """Send progress to the client."""
        voice = Voice.of(_holding_of(batch), output=False)
        self._outbox.event(voice, Event(counter, EventKind.PROGRESS, text, fraction))

    def on_lost(self, slot: Slot, lost: Lost) -> None:
        """A child died: the call that ran fails, its neighbours are run again."""
        if self._closed:
            give_back(lost, self._outbox)
            return
        if lost.running is not None:
            _log.warning("child.lost", slot=slot.number, reason=lost.message)
            batch, counter = lost.running
            payload = encode_failure(lost.reason, lost.message)
            self.on_results(slot, batch, [Result(counter, Status.FAILED, payload)])
        for batch, counter in chain(lost.unsent, lost.unstarted):
            call = next(c for c in batch.calls if c.counter == counter)
            self._outbox.hand_back(batch.context.holding, [call])  # type: ignore[attr-defined]
        self._fill()

    # ── placing ──────────────────────────────────────────────────────────────

    def _fill(self) -> None:
        """A slot can take a call: give it one, take over one, or ask for more."""
        self._apart.settled(in_use=self._in_use())
        self.pump()
        if not any(self._waiting()):
            self._rebalance_soon()
            self.intake.refill()

    def _place(self, class_name: str, holding: Holding) -> bool:
        """Give a holding's waiting calls to slots. False if some still wait."""
        if self._apart.closed and not self._apart.admits(holding, in_use=self._in_use()):
            return False
        if holding.frame.suspicion is Suspicion.APART:
            self._announce(holding)
            return True
        idle = self.pool.idle(class_name)
        work_s = self._pace.guess_s(holding.frame.spec.target, len(holding.waiting))
        if not idle:
            return self._place_ahead(class_name, holding, work_s)
        if work_s is not None and work_s < UNDIVIDED_S:
            idle = idle[:1]
        calls = holding.take_waiting()
        for number, slot in enumerate(idle):  # in turn, so that they start in their order
            self._give(slot, holding, calls[number :: len(idle)])
        return True

    def _announce(self, holding: Holding) -> None:
        """The worker is empty: say so in the call's own frame before it starts."""
        self._outbox.hand_back(holding, holding.take_waiting(), suspicion=Suspicion.ALONE)
        self._apart.announced(holding)
        asyncio.get_running_loop().call_later(ARMED_S, self._fill)

    def _place_ahead(self, class_name: str, holding: Holding, work_s: float | None) -> bool:
        short = not holding.suspect and work_s is not None and work_s <= SHORT_S
        slot = self._soonest(class_name) if short else None
        if slot is None:
            self.pool.grow(class_name)
            return False
        self._give(slot, holding, holding.take_waiting())
        return True

    def _soonest(self, class_name: str) -> Slot | None:
        """The slot that will be free first, if one takes calls ahead."""
        if not self.pool.left_by_the_aged(class_name):
            return None  # or room that is kept would never come about
        ready = (s for s in self.pool.slots(class_name) if s.ready and _takes_more(s))
        return min(ready, key=_unfinished, default=None)

    def _give(self, slot: Slot, holding: Holding, calls: list[Call]) -> None:
        if not calls:
            return
        frame = holding.frame
        given = _Given(holding, len(calls), len(calls), _now())
        self.pool.grant(frame.spec.resources)
        batch = Batch(frame.spec, frame.client, calls, holding.target_path, given, frame.attempt)
        slot.give(batch)
        work_s = self._pace.foresee_s(frame.spec.target, len(calls), LEAD_S / 2)
        if work_s is not None and work_s > LEAD_S:
            given.until = given.at + work_s
            foresee = partial(self.intake.foresee, frame.spec.resources)
            asyncio.get_running_loop().call_at(given.until - LEAD_S, foresee)

    def _line_of(self, holding: Holding) -> deque[Holding]:
        spec = holding.frame.spec
        lines = self._lines.get(spec.resources)
        if lines is None:
            lines = self._lines[spec.resources] = tuple(deque() for _ in range(4))
        if holding.suspect:
            return lines[0]
        priority = holding.frame.queue.rpartition(".")[2]
        return lines[1 + _PRIORITIES.index(priority)]

    def _waiting(self) -> Iterable[Holding]:
        return list(chain.from_iterable(chain.from_iterable(self._lines.values())))

    # ── taking back ──────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """Look again in a budget's time, for as long as anything is in hand."""
        if self._watching is None and self._busy():
            loop = asyncio.get_running_loop()
            self._watching = loop.call_later(BUDGET_S / 2, self._enforce_budget)

    def _busy(self) -> bool:
        return self._in_use() or any(self._waiting())

    def _in_use(self) -> bool:
        return any(slot.batches for slot in self.pool.slots())

    def _enforce_budget(self) -> None:
        self._watching = None
        if self._closed:
            return
        now = _now()
        deadline = now - BUDGET_S
        self._revoke_all(lambda given: given.at < deadline)
        self.pump()
        # What cannot leave is not handed back: here it may still run.
        for holding in () if self._outbox.stalled else self._waiting():
            if holding.since < now - self._patience_s(holding):
                coming = self.intake.full(holding.frame.spec.resources, holding.frame.queue)
                # What comes back at once cannot start either, and goes to the queue's end then.
                holding.waiting.rotate(min(coming, len(holding.waiting)))
                self._hand_back(holding)
        if not any(self._waiting()):
            self.intake.refill()  # what was handed back or dropped has left room
        self._watch()

    def _patience_s(self, holding: Holding) -> float:
        """How long the calls of a frame may wait here."""
        if holding.suspect:
            return SUSPECT_S
        kept_out = not self.pool.left_by_the_aged(holding.frame.spec.resources)
        return LONE_S if holding.frame.handed and not kept_out else BUDGET_S

    def _revoke_all(self, chosen: Callable[[_Given], bool]) -> None:
        """Take unstarted calls of the chosen batches back into the line, oldest first."""
        for slot in self.pool.slots():
            if _may_hold_unstarted(slot) and chosen(slot.batches[0].context):  # type: ignore[arg-type]
                self._revoke(slot)

    def _revoke(self, slot: Slot) -> None:
        for batch, calls in reversed(slot.revoke()):
            given: _Given = batch.context  # type: ignore[assignment]
            given.unfinished -= len(calls)
            given.kept -= len(calls)
            given.taken |= {call.counter for call in calls}
            holding = given.holding
            if not holding.waiting:
                holding.since = given.at
                self._line_of(holding).appendleft(holding)
            # Several slots give theirs back: in the order in which they came.
            holding.waiting = deque(sorted([*calls, *holding.waiting]))

    def _hand_back(self, holding: Holding) -> None:
        self._line_of(holding).remove(holding)
        self._apart.left(holding)
        self._outbox.hand_back(holding, holding.take_waiting())

    def _drop_waiting(
        self, holding: Holding, counters: frozenset[int], kind: type[CallError]
    ) -> None:
        dropped = [call for call in holding.waiting if call.counter in counters]
        if not dropped:
            return
        for call in dropped:
            holding.waiting.remove(call)
        if not holding.waiting:
            self._line_of(holding).remove(holding)
            self._apart.left(holding)
        self._outbox.failure(holding, dropped, kind, DROPPED[kind])

    def _rebalance_soon(self) -> None:
        if self._rebalancing is None:
            loop = asyncio.get_running_loop()
            self._rebalancing = loop.call_later(_REBALANCE_S, self._rebalance)

    def _rebalance(self) -> None:
        """Let idle slots take over what waits behind running calls."""
        self._rebalancing = None
        behind = _now() - _REBALANCE_S
        for class_name in self._lines:
            if self.pool.idle(class_name) and not self.waits(class_name):
                loaded = [s for s in self.pool.slots(class_name) if _may_hold_unstarted(s)]
                if loaded:
                    slot = max(loaded, key=_unfinished)
                    if slot.batches[0].context.at < behind:  # type: ignore[attr-defined]
                        self._revoke(slot)
                    self._rebalance_soon()
        self.pump()


def _holding_of(batch: Batch) -> Holding:
    return batch.context.holding  # type: ignore[attr-defined,no-any-return]


def _now() -> float:
    return asyncio.get_running_loop().time()


def _unfinished(slot: Slot) -> int:
    return sum(batch.context.unfinished for batch in slot.batches)  # type: ignore[attr-defined]


def _may_hold_unstarted(slot: Slot) -> bool:
    return bool(slot.batches) and not slot.revoked and (_unfinished(slot) > 1 or not slot.ready)


def _takes_more(slot: Slot) -> bool:
    """One batch running and one behind it keep a child busy while we are."""
    if len(slot.batches) != 1 or slot.revoked:
        return False
    return not slot.batches[0].context.holding.suspect  # type: ignore[attr-defined]
