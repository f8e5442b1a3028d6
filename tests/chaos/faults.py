"""Carries out the faults of a plan, and keeps a record of each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from chaos.plan import FaultKind, PlannedFault
from chaos.stage import Party, Seat, Stage

__all__ = ["BROKER", "Disturbance", "FaultMaker"]

BROKER = "broker"
_SLOW_S = 0.2
_AT_WORK_S = 5.0


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A fault as it was carried out.

    Args:
        kind: What was done.
        party: To whom.
        began: When, in seconds since 1970.
        ended: When that was over; getting well again is up to the party.
        pid: The child that was killed.
    """

    kind: FaultKind
    party: str
    began: float
    ended: float
    pid: int = 0

    @property
    def loses_connections(self) -> bool:
        """Whether it parts its party from the broker."""
        return self.kind not in _HARMLESS


_HARMLESS = {
    FaultKind.KILL_CHILD,
    FaultKind.SLOW_CLIENT,
    FaultKind.SLOW_WORKER,
    FaultKind.FILL_DISK,
}


class FaultMaker:
    """Makes the faults of a plan, each in a thread of its own, one at a time for each victim.

    Args:
        stage: Whom it troubles.
        say: Told what happens, a line at a time.
    """

    def __init__(self, stage: Stage, say: Callable[[str], None]) -> None:
        self.done: list[Disturbance] = []
        self.unwell: list[str] = []
        self._stage = stage
        self._say = say
        self._over = Event()
        self._threads: list[Thread] = []

    def start(self, fault: PlannedFault) -> None:
        """Begin a fault; it ends by itself."""
        thread = Thread(target=self._make, args=(fault,), name=f"chaos {fault.kind}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Wait until all faults are over and everybody is well."""
        for thread in self._threads:
            thread.join()
        for seat in self._stage.seats:
            seat.check()
            self._recover(seat)

    def give_up(self) -> None:
        """Wait for nobody any more."""
        self._over.set()

    def _make(self, fault: PlannedFault) -> None:
        act, _, who = fault.kind.value.partition("-")
        if who == "child":
            self._kill_child(fault)
        elif who in (BROKER, "disk"):
            self._trouble_broker(fault)
        else:
            self._trouble(act, self._victim(who, fault.victim), fault)

    def _victim(self, who: str, number: int) -> Party:
        stage = self._stage
        parties: dict[str, list[Party]] = {
            "worker": [*stage.workers],
            "orchestrator": [*stage.orchestrators],
            "client": [stage.client],
        }
        return parties[who][number % len(parties[who])]

    def _trouble(self, act: str, party: Party, fault: PlannedFault) -> None:
        with party.lock:
            with self._recorded(fault, party.name):
                self._act(act, party, fault.hold_s)
            self._recover(party)

    def _act(self, act: str, party: Party, hold_s: float) -> None:
        match act:
            case "kill":
                assert isinstance(party, Seat)
                party.kill()
            case "pause":
                assert isinstance(party, Seat)
                os.kill(party.pid, signal.SIGSTOP)
                self._over.wait(hold_s)
                os.kill(party.pid, signal.SIGCONT)
            case "cut":
                party.proxy.cut()
            case "stall":
                party.proxy.stall()
                self._over.wait(hold_s)
                party.proxy.resume()
            case "slow":
                party.proxy.delay_s = _SLOW_S
                self._over.wait(hold_s)
                party.proxy.delay_s = 0.0

    def _trouble_broker(self, fault: PlannedFault) -> None:
        with self._stage.broker_lock:
            with self._recorded(fault, BROKER):
                self._act_on_broker(fault)
            for party in self._stage.parties:
                with party.lock:
                    self._recover(party)

    def _act_on_broker(self, fault: PlannedFault) -> None:
        node = self._stage.node
        match fault.kind:
            case FaultKind.KILL_BROKER:
                node.settle()
                node.kill()
                node.start()
            case FaultKind.PAUSE_BROKER:
                node.pause()
                self._over.wait(fault.hold_s)
                node.resume()
            case _:
                node.fill_disk()
                self._over.wait(fault.hold_s)
                node.free_disk()

    def _kill_child(self, fault: PlannedFault) -> None:
        seat = self._stage.workers[fault.victim % len(self._stage.workers)]
        with seat.lock:
            _await(lambda: bool(self._stage.traces.at_work(seat.pid)), self._over, _AT_WORK_S)
            if at_work := self._stage.traces.at_work(seat.pid):
                pid = at_work[fault.victim % len(at_work)]
                with self._recorded(fault, seat.name, pid):
                    os.kill(pid, signal.SIGKILL)

    def _recover(self, party: Party) -> None:
        if isinstance(party, Seat):
            well = party.recover(self._over)
        else:
            well = _await(lambda: party.connected, self._over)
        if not well and not self._over.is_set():
            self.unwell.append(f"{party.name} was not well again in time")

    @contextmanager
    def _recorded(self, fault: PlannedFault, party: str, pid: int = 0) -> Iterator[None]:
        began = time.time()
        self._say(f"{fault.kind} {party}")
        try:
            yield
        finally:
            self.done.append(Disturbance(fault.kind, party, began, time.time(), pid))


def _await(condition: Callable[[], bool], over: Event, timeout_s: float = 120.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        if over.wait(0.05):
            return False
    return condition()
