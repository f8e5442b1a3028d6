"""A model of the custody protocol: workers, children and connections fail at any step.

Hypothesis chooses what happens next: a call ends, a child or a worker dies, a connection is cut
when some of what was on it has arrived and some has not. The workers are real but for their
children and their broker. After every step the promises of the protocol are checked; a broken one
ends the shortest story that Hypothesis finds for it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flame_broker.codec import decode_value
from flame_broker.errors import Quarantined
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Keyring
from flame_broker.memory import MemoryTransport
from flame_broker.memory_broker import MemoryDelivery
from flame_broker.messages import (
    MAX_STRIKES,
    CallFrame,
    Result,
    ResultFrame,
    Status,
    Suspicion,
)
from flame_broker.outcomes import decode_failure
from flame_broker.topology import calls_exchange, parked_queue
from lab.bench import CALLS, CLIENT, DEAD, KEYRING, POOL, REPLIES, SUSPECTS, frame_of
from lab.clockwork import Clock, Clockwork
from lab.factories import Factory, WatchedSlot

MOST_WORKERS = 3
MOST_KILLERS = 1
MOST_FORGED = 2
DRAIN_S = 1.0
ROUNDS_TO_RUN_DRY = 300
ROUNDS_TO_COME_TO_REST = 1000
FORGED = 1_000_000
"""Counters from here on belong to messages that must never run."""

KEY = KEYRING.signer
PARKED = parked_queue(KEY.hex_id, POOL).name

_namespaces = count()
_some = st.integers(0, 5)  # picks one of those that there are
_few = st.integers(0, 3)  # so many of the messages on their way arrive
_seconds = st.sampled_from([0.0001, 0.004, 0.3])  # known to be short, in doubt, long


def forge(kind: str, counter: int) -> bytes:
    """A message in the calls queue that nobody with the key has meant for it."""
    frame = frame_of([counter])
    if kind == "garbage":
        return b"no frame %d" % counter
    if kind == "altered":
        body = encode(frame, KEY)
        return body[:-1] + bytes([body[-1] ^ 1])
    if kind == "of a stranger":
        return encode(frame, Keyring.parse("s" * 40).signer)
    if kind == "for another queue":
        return encode(frame_of([counter], queue=SUSPECTS), KEY)
    results = (Result(counter, Status.OK, b""),)
    return encode(ResultFrame(CALLS, CLIENT, "w", results), KEY)


ENDS = ["well", "its child dies"]
FAULTS = ["all is well", "it dies", "its consumer is cut", "its publisher is cut"]
KINDS = ["garbage", "altered", "of a stranger", "for another queue", "of results"]


@dataclass(frozen=True)
class Steps:
    """What becomes of a worker and of what is on its wires, and what ends that."""

    turns: int
    sent: int
    confirmed: int
    acked: int
    until: str

    def take(self, worker: Factory) -> None:
        wire = worker.wire
        for step, times in (
            (worker.loop.turn, self.turns),
            (wire.send, self.sent),
            (wire.confirm, self.confirmed),
            (worker.loop.turn, self.turns),
            (wire.ack, self.acked),
        ):
            for _ in range(times):
                step()
        faults = {
            "it dies": worker.die,
            "its consumer is cut": wire.cut_consumer,
            "its publisher is cut": wire.cut_publisher,
        }
        faults.get(self.until, lambda: None)()


_steps = st.builds(
    Steps, turns=_few, sent=_few, confirmed=_few, acked=_few, until=st.sampled_from(FAULTS)
)


class Custody(RuleBasedStateMachine):
    """A cluster, and what it owes its client.

    Attributes:
        starts: By call, how often a child began it.
        outcomes: By call, its terminal results in the order of their arrival.
        copies: By call, how many copies of it a fault (or its client) has made.
        echoes: By call, how often its result was published again by a fault.
        losses: By call, how often a worker was lost that had it in hand to run it alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.namespace = f"model-{next(_namespaces)}"
        self.folder = tempfile.TemporaryDirectory(prefix="flame-model-")
        self.client = Clockwork(self.clock)
        self.broker = MemoryTransport(self.namespace)
        self.client.complete(self.broker.open())
        self.client.complete(
            self.broker.declare_exchange(calls_exchange(KEYRING.signer.hex_id), "topic")
        )
        self.client.complete(self.broker.declare(REPLIES))
        self.queues = self.broker._broker.queues
        self.workers: list[Factory] = []
        self.names = count(1)
        self.counters = count(1)
        self.frames: list[CallFrame] = []
        self.forged: list[bytes] = []
        self.calls_in: dict[bytes, tuple[int, ...]] = {}
        self.accepted: set[int] = set()
        self.killers: set[int] = set()
        self.doomed: set[str] = set()
        self.starts: Counter[int] = Counter()
        self.outcomes: dict[int, list[Result]] = {}
        self.copies: Counter[int] = Counter()
        self.echoes: Counter[int] = Counter()
        self.losses: Counter[int] = Counter()
        self.broken = False
        self._join(slots=2)
        self._join(slots=1)

    # ── what may happen ──────────────────────────────────────────────────────

    @rule(calls=st.integers(1, 5))
    def a_client_publishes(self, calls: int) -> None:
        self._publish(calls)

    @precondition(lambda self: len(self.killers) < MOST_KILLERS)
    @rule(neighbours=st.integers(0, 4))
    def a_client_publishes_a_call_that_kills_its_worker(self, neighbours: int) -> None:
        self.killers.add(self._publish(1 + neighbours)[0])

    def _publish(self, calls: int) -> list[int]:
        counters = [next(self.counters) for _ in range(calls)]
        frame = frame_of(counters)
        self.frames.append(frame)
        self._put(encode(frame, KEY))
        self.accepted.update(counters)
        return counters

    @precondition(lambda self: self.frames)
    @rule(frame=_some)
    def a_client_publishes_a_frame_again(self, frame: int) -> None:
        again = self.frames[frame % len(self.frames)]
        self.copies.update(call.counter for call in again.calls)
        self._put(encode(again, KEY))

    @precondition(lambda self: len(self.forged) < MOST_FORGED)
    @rule(kind=st.sampled_from(KINDS))
    def somebody_forges(self, kind: str) -> None:
        body = forge(kind, FORGED + len(self.forged))
        self.forged.append(body)
        self._put(body)

    @precondition(lambda self: self.accepted - self.outcomes.keys())
    @rule(running=_some, seconds=_seconds, end=st.sampled_from(ENDS), then=_steps)
    def a_call_ends(self, running: int, seconds: float, end: str, then: Steps) -> None:
        if not self._busy():
            self._pass_time(0.2)
        busy = self._busy()
        if busy:
            at, slot = busy[running % len(busy)]
            at.do(slot.die if end == "its child dies" else partial(slot.end, seconds))
            then.take(at)

    @rule(worker=_some, then=_steps)
    def a_worker_goes_on(self, worker: int, then: Steps) -> None:
        then.take(self._pick(worker))

    @precondition(lambda self: len(self.workers) < MOST_WORKERS)
    @rule(slots=st.integers(1, 2))
    def a_worker_joins(self, slots: int) -> None:
        self._join(slots)

    @rule(worker=_some)
    def a_worker_drains(self, worker: int) -> None:
        if not self._pick(worker).draining:
            self._pick(worker).drain(DRAIN_S)

    @precondition(lambda self: self.accepted)
    @rule(call=st.integers(0, 20), spare_running=st.booleans())
    def a_call_is_cancelled(self, call: int, spare_running: bool) -> None:
        counters = frozenset([sorted(self.accepted)[call % len(self.accepted)]])
        for at in self.workers:
            at.do(partial(at.intake.cancel, CLIENT, counters, spare_running=spare_running))

    @precondition(lambda self: self.accepted)
    @rule(call=st.integers(0, 20))
    def a_queue_timeout_is_over(self, call: int) -> None:
        counters = frozenset([sorted(self.accepted)[call % len(self.accepted)]])
        for at in self.workers:
            at.do(partial(at.intake.expire, CLIENT, counters))

    @rule(seconds=st.sampled_from([0.0, 0.06, 1.1]))
    def time_passes_and_all_is_well(self, seconds: float) -> None:
        self._pass_time(seconds)

    # ── what must hold ───────────────────────────────────────────────────────

    @invariant()
    def every_promise_holds(self) -> None:
        self._take_stock()
        held = {c for body in self._bodies_in_custody() for c in self._counters_in(body)}
        self._require(self.accepted <= held | self.outcomes.keys(), "P1: calls are lost")
        for counter, starts in self.starts.items():
            self._require(counter < FORGED, "P6: a forged call ran")
            self._require(starts <= 1 + self.copies[counter], f"P4: call {counter} ran again")
        for counter, results in self.outcomes.items():
            self._check_outcomes(counter, results)
        for worker in self.workers:
            self._check_loneliness(worker)
        problems = [problem for worker in self.workers for problem in worker.problems]
        self._require(not problems, "nobody caught " + "; ".join(problems))

    def _check_loneliness(self, worker: Factory) -> None:
        """What may be blamed has nobody beside it who could be to blame."""
        batches = [batch for slot in worker.busy() for batch in slot.batches]
        kinds = [batch.context.holding.frame.suspicion for batch in batches]
        lonely = len(kinds) == 1 or Suspicion.ALONE not in kinds
        self._require(lonely, f"P5: a call alone has neighbours at {worker.name}")

    def _check_outcomes(self, counter: int, results: list[Result]) -> None:
        """Who takes the first result has missed no other one, but for those that faults made."""
        allowed = 1 + self.copies[counter] + self.echoes[counter]
        self._require(len(results) <= allowed, f"P2: call {counter} ended too often")
        values = {decode_value(r.payload) for r in results if r.status is Status.OK}
        self._require(values <= {counter}, f"P2: call {counter} has another one's value")
        if self.losses[counter] < MAX_STRIKES:
            blamed = any(_is_quarantine(result) for result in results)
            self._require(not blamed, f"P5: call {counter} is quarantined")

    def teardown(self) -> None:
        """Heal everything and let it run dry: then every accepted call has ended."""
        try:
            if not self.broken:
                self._run_dry()
        finally:
            for worker in self.workers:
                worker.die()
            self.client.perish()
            self.folder.cleanup()

    def _run_dry(self) -> None:
        for _ in range(ROUNDS_TO_RUN_DRY):
            self._pass_time(0.06)
            self._take_stock()
            if not self._bodies_in_custody():
                break
            for worker, slot in self._busy():
                worker.do(partial(slot.end, 0.0001))
        self.every_promise_holds()
        self._require(not self._bodies_in_custody(), "messages go round for ever")
        self._require(self.accepted == self.outcomes.keys(), "P1: calls without an end")
        aside = {m.body for name in (DEAD, PARKED) for m in self.queues[name].messages}
        self._require(set(self.forged) <= aside, "P6: a forged message is not set aside")

    # ── how ──────────────────────────────────────────────────────────────────

    def _join(self, slots: int) -> None:
        worker = Factory(
            f"w{next(self.names)}",
            self.clock,
            self.namespace,
            Path(self.folder.name),
            slots=slots,
            on_start=self._on_start,
            lost=self._on_lost,
            resent=self._on_resent,
        )
        self.workers.append(worker)

    def _busy(self) -> list[tuple[Factory, WatchedSlot]]:
        return [(worker, slot) for worker in self.workers for slot in worker.busy()]

    def _pick(self, number: int) -> Factory:
        return self.workers[number % len(self.workers)]

    def _put(self, body: bytes) -> None:
        assert self.broker._put("", CALLS, body, None)

    def _pass_time(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while True:
            self._come_to_rest()
            wakes_at = min((w.loop.wakes_at for w in self.workers), default=until + 1)
            if wakes_at > until:
                break
            self.clock.now = wakes_at
        self.clock.now = until

    def _come_to_rest(self) -> None:
        for _ in range(ROUNDS_TO_COME_TO_REST):
            for worker in self.workers:
                worker.loop.settle()
            moving = [worker.wire.flow() for worker in self.workers]
            self._bury()
            if not any(moving):
                return
        self._require(False, "messages go round in no time")

    def _on_start(self, worker: str, counter: int) -> None:
        self.starts[counter] += 1
        if counter in self.killers:
            self.doomed.add(worker)

    def _bury(self) -> None:
        """Let those die that run a killer, and forget those that are gone."""
        for worker in list(self.workers):
            if worker.name in self.doomed and not worker.gone:
                worker.die()
            if worker.gone:
                worker.close()
                self.workers.remove(worker)

    def _on_lost(self, deliveries: list[MemoryDelivery]) -> None:
        for delivery in deliveries:
            counters = self._counters_in(delivery.body)
            self.copies.update(counters)
            frame = open_frame(delivery.body, KEYRING).frame if counters else None
            if isinstance(frame, CallFrame) and frame.suspicion is Suspicion.ALONE:
                self.losses.update(counters)

    def _on_resent(self, bodies: list[bytes]) -> None:
        for body in bodies:
            self.copies.update(self._counters_in(body))
            if body not in self.forged:
                self.echoes.update(result.counter for result in _results_in(body))

    def _take_stock(self) -> None:
        """Bury the dead, replace the last one, and read what came back."""
        self._bury()
        if all(worker.draining for worker in self.workers):
            self._join(slots=2)
        replies = self.queues[REPLIES.name].messages
        while replies:
            for result in _results_in(replies.popleft().body):
                self.outcomes.setdefault(result.counter, []).append(result)

    def _bodies_in_custody(self) -> list[bytes]:
        waiting = [m.body for name in (CALLS, SUSPECTS) for m in self.queues[name].messages]
        return waiting + [m.body for worker in self.workers for m in worker.wire.in_hand()]

    def _counters_in(self, body: bytes) -> tuple[int, ...]:
        """The calls that a message holds; none if we have forged it."""
        if body not in self.calls_in:
            frame = None if body in self.forged else open_frame(body, KEYRING).frame
            calls = frame.calls if isinstance(frame, CallFrame) else ()
            self.calls_in[body] = tuple(call.counter for call in calls)
        return self.calls_in[body]

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.broken = True
            raise AssertionError(otherwise)


def _results_in(body: bytes) -> tuple[Result, ...]:
    frame = open_frame(body, KEYRING).frame
    return frame.results if isinstance(frame, ResultFrame) else ()


def _is_quarantine(result: Result) -> bool:
    failed = result.status is Status.FAILED
    return failed and isinstance(decode_failure(result.payload, ""), Quarantined)


def test_no_interleaving_of_faults_breaks_a_promise() -> None:
    run_state_machine_as_test(
        Custody,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
