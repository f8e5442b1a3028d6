"""The calls of a child stay in order through results and revocations."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flame_broker.messages import Call, CallSpec, Target
from flame_worker.backlog import Backlog
from flame_worker.batches import Batch


def batch_of(counters: list[int]) -> Batch:
    return Batch(CallSpec(Target("m:f")), "c", [Call(counter, b"") for counter in counters])


def test_a_revocation_takes_the_end_and_leaves_what_started() -> None:
    backlog = Backlog()
    first, second = batch_of([1, 2, 3]), batch_of([4, 5])
    assert [backlog.add(b, b.calls) for b in (first, second)] == [0, 3]
    backlog.finish()
    taken = backlog.take_last(3)
    assert [(b, [c.counter for c in calls]) for b, calls in taken] == [
        (first, [3]),
        (second, [4, 5]),
    ]
    assert backlog.running == 1
    assert backlog.add(second, second.calls) == 5


def test_calls_are_found_by_serial_and_by_counter() -> None:
    backlog = Backlog()
    batch = batch_of([10, 11])
    backlog.add(batch, batch.calls)
    assert backlog.find(1) == (batch, 11)
    assert backlog.serial_of("c", 11) == 1
    assert backlog.serial_of("other", 11) is None
    backlog.finish()
    assert backlog.serial_of("c", 10) is None
    backlog.finish()
    assert backlog.find(1) == (batch, 11)
    assert backlog.take_all() == []


class BacklogMachine(RuleBasedStateMachine):
    """Compares with a plain list of ``(serial, counter)``."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.model: list[tuple[int, int]] = []
        self.next = 0

    @rule(count=st.integers(1, 5))
    def give(self, count: int) -> None:
        counters = list(range(self.next, self.next + count))
        batch = batch_of(counters)
        first = self.backlog.add(batch, batch.calls)
        self.model += [(first + i, counter) for i, counter in enumerate(counters)]
        self.next += count

    @precondition(lambda self: self.model)
    @rule()
    def finish(self) -> None:
        serial, counter = self.model.pop(0)
        assert self.backlog.running == serial
        self.backlog.finish()
        assert self.backlog.last is not None
        assert self.backlog.last[1] == counter

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.model)))
        taken = self.backlog.take_last(count)
        kept = len(self.model) - count
        expected = [counter for _, counter in self.model[kept:]]
        assert [call.counter for _, calls in taken for call in calls] == expected
        self.model = self.model[:kept]

    @invariant()
    def they_agree(self) -> None:
        assert self.backlog.load == len(self.model)
        for serial, counter in self.model:
            found = self.backlog.find(serial)
            assert found is not None
            assert found[1] == counter


TestBacklog = BacklogMachine.TestCase
