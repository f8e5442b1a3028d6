"""What a worker says that it runs."""

from __future__ import annotations

from typing import Any

from flame_broker.messages import Call, CallSpec, Target
from flame_worker.batches import Batch
from flame_worker.running import MOST_CALLS, running_calls


class Busy:
    """A slot as far as it is looked at."""

    def __init__(self, given_at: float, *left: int, label: str = "train") -> None:
        batch = Batch(CallSpec(Target("m:f"), label=label), "c", [Call(n, b"") for n in left])
        batch.given_at = given_at
        self.batches = [batch] if left else []

    def left_of(self, batch: Batch) -> list[int]:
        return [call.counter for call in batch.calls]


def running(*slots: Busy) -> Any:
    return running_calls(slots, 100.0)  # type: ignore[arg-type]


def test_the_first_call_of_each_slot_runs_and_the_longest_comes_first() -> None:
    found = running(Busy(90.0, 7, 8), Busy(0.0), Busy(40.0, 9, label="test"))
    assert found == (("c-9", "test", 60.0), ("c-7", "train", 10.0))


def test_many_calls_and_long_names_are_cut_short() -> None:
    found = running(*(Busy(float(n), n, label="x" * 500) for n in range(1, 100)))
    assert [call for call, _, _ in found] == [f"c-{n}" for n in range(1, MOST_CALLS + 1)]
    assert {len(label) for _, label, _ in found} == {60}
