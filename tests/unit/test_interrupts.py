"""A cancel is raised in the user code of its own call, whenever it comes, and in no other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from flame_broker.errors import CallCancelled
from flame_worker.interrupts import Interrupts
from flame_worker.pipes import SERIAL


class Child:
    """The interrupts of a child, and the daemon's end of its cancels."""

    def __init__(self) -> None:
        self._theirs, self._ours = os.pipe()
        os.set_blocking(self._theirs, False)
        self.interrupts = Interrupts(self._theirs)

    def cancel(self, *serials: int) -> None:
        """Do what the daemon does."""
        os.write(self._ours, b"".join(map(SERIAL.pack, serials)))
        signal.raise_signal(signal.SIGINT)

    def run(self, serial: int) -> None:
        """A call that does nothing."""
        self.interrupts.begin(serial, 0)
        self.interrupts.leave()
        self.interrupts.end()

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._theirs)
        os.close(self._ours)


@pytest.fixture
def child() -> Iterator[Child]:
    numbers = signal.SIGINT, signal.SIGALRM, signal.SIGTERM
    before = {number: signal.getsignal(number) for number in numbers}
    made = Child()
    made.interrupts.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)
    made.close()


def test_a_cancel_in_user_code_is_raised_there(child: Child) -> None:
    child.interrupts.begin(0, 0)
    with pytest.raises(CallCancelled) as raised:
        child.cancel(0)
    assert child.interrupts.raised is raised.value


def test_a_cancel_before_user_code_begins_is_raised_there(child: Child) -> None:
    child.run(0)
    child.interrupts.serial = 1  # its target is being loaded
    child.cancel(1)
    with pytest.raises(CallCancelled) as raised:
        child.interrupts.begin(1, 0)
    assert child.interrupts.raised is raised.value
    child.run(2)


def test_a_cancel_that_overtakes_its_call_waits_for_it(child: Child) -> None:
    child.run(0)
    child.cancel(1, 3)
    with pytest.raises(CallCancelled):
        child.interrupts.begin(1, 0)
    child.run(2)
    with pytest.raises(CallCancelled):
        child.interrupts.begin(3, 0)


def test_a_cancel_after_user_code_has_ended_spares_the_next_call(child: Child) -> None:
    child.interrupts.begin(0, 0)
    child.interrupts.leave()
    child.cancel(0)
    child.interrupts.end()
    child.run(1)
    assert child.interrupts.raised is None


def test_a_cancel_between_two_items_of_a_stream_is_raised_in_the_next(child: Child) -> None:
    child.interrupts.begin(0, 0)
    child.interrupts.leave()
    child.cancel(0)
    with pytest.raises(CallCancelled):
        child.interrupts.enter()
