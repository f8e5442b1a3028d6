"""A suspect answers for the deaths of its worker, and only for those that it can have caused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from flame_broker.errors import Quarantined
from flame_broker.frames import encode, open_frame
from flame_broker.memory import MemoryTransport
from flame_broker.memory_broker import MemoryDelivery
from flame_broker.messages import MAX_STRIKES, CallFrame, ResultFrame, Status
from flame_broker.outcomes import decode_failure
from flame_broker.topology import calls_exchange
from lab.bench import KEYRING, REPLIES, SUSPECTS, frame_of
from lab.clockwork import Clock, Clockwork
from lab.factories import Factory

INNOCENT = 1
_namespaces = count()


class Ward:
    """A broker, and one worker after the other."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.folder = Clock(), folder
        self.namespace = f"suspects-{next(_namespaces)}"
        self.loop = Clockwork(self.clock)
        self.broker = MemoryTransport(self.namespace)
        self.loop.complete(self.broker.open())
        self.loop.complete(
            self.broker.declare_exchange(calls_exchange(KEYRING.signer.hex_id), "topic")
        )
        self.loop.complete(self.broker.declare(REPLIES))
        self.others = count(100)
        self.running: list[int] = []

    def worker(self, slots: int) -> Factory:
        """A worker that takes what there is."""
        worker = Factory(
            "w",
            self.clock,
            self.namespace,
            self.folder,
            slots=slots,
            on_start=lambda _, counter: self.running.append(counter),
            lost=lambda deliveries: None,
            resent=lambda bodies: None,
        )
        self.let_go_on(worker)
        return worker

    def put(self, worker: Factory, frame: CallFrame) -> None:
        """Publish, and let the worker take it."""
        self.broker._put("", frame.queue, encode(frame, KEYRING.signer), None)
        self.let_go_on(worker)

    def let_go_on(self, worker: Factory) -> None:
        """Until nothing moves any more; no time passes."""
        worker.loop.settle()
        while worker.wire.flow():
            worker.loop.settle()

    def lose(self, worker: Factory) -> bool:
        """The worker dies; says whether the innocent one ran there, and nothing else."""
        alone = self.running == [INNOCENT]
        self.running.clear()
        worker.die()
        return alone

    def is_quarantined(self) -> bool:
        """Whether the innocent one is."""
        frames = [open_frame(m.body, KEYRING).frame for m in self.queue(REPLIES.name)]
        results = [r for f in frames if isinstance(f, ResultFrame) for r in f.results]
        failures = [r for r in results if r.counter == INNOCENT and r.status is Status.FAILED]
        return any(isinstance(decode_failure(r.payload, ""), Quarantined) for r in failures)

    def queue(self, name: str) -> list[MemoryDelivery]:
        """What waits in a queue."""
        return list(self.broker._broker.queues[name].messages)


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    made = Ward(tmp_path)
    yield made
    made.loop.perish()


def suspect() -> CallFrame:
    return frame_of([INNOCENT], queue=SUSPECTS)


def test_the_third_death_of_a_worker_that_ran_it_alone_quarantines_a_call(ward: Ward) -> None:
    worker = ward.worker(slots=1)
    ward.put(worker, suspect())
    assert ward.lose(worker)  # it might have had a neighbour: that one does not count
    for _ in range(MAX_STRIKES):
        assert not ward.is_quarantined()
        worker = ward.worker(slots=1)
        assert ward.lose(worker)
    ward.worker(slots=1).die()
    assert ward.is_quarantined()


@pytest.mark.parametrize("slots", [1, 2], ids=["waiting for a slot", "beside killers"])
def test_a_suspect_is_blamed_only_for_workers_that_it_had_to_itself(ward: Ward, slots: int) -> None:
    worker = ward.worker(slots=slots)
    ward.put(worker, frame_of([next(ward.others)]))
    ward.put(worker, suspect())
    alone = 0
    while not ward.is_quarantined():
        if next(ward.others) % 2:  # not always, or it would never have a worker to itself
            ward.put(worker, frame_of([next(ward.others)]))
        alone += ward.lose(worker)
        worker = ward.worker(slots=slots)
        assert alone <= MAX_STRIKES + 1  # once it may have had nobody beside it by chance
    worker.die()
    assert alone >= MAX_STRIKES
