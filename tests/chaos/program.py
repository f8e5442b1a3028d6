"""One run from its plan to its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flame
from chaos.calls import Caller
from chaos.faults import Disturbance, FaultMaker
from chaos.plan import CallKind, Plan, PlannedCall, PlannedFault
from chaos.stage import Stage
from chaos.told import Historian
from chaos.verdict import Breach, Record, Rule, Trouble, Verdict, judge
from lab.rabbit import RabbitNode

__all__ = ["Outcome", "Program"]

_SLOTS = 8
_SAY_EVERY_S = 10.0
_STUCK_S = 240.0
"""Nothing has ended for so long: what is left never will."""

_ASKING = 8  # an answer may take a second, where the history knows nothing of a call
_SAMPLE = 10  # of so many values one is compared with what the history has stored


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        plan: What was to happen.
        records: The calls.
        disturbances: The faults.
        verdict: The judgement.
        wall_s: How long it took.
    """

    plan: Plan
    records: tuple[Record, ...]
    disturbances: tuple[Disturbance, ...]
    verdict: Verdict
    wall_s: float


class Program:
    """Carries out a plan against a cluster of its own.

    Args:
        plan: What is called and broken.
        folder: For everything that the run leaves.
        say: Told how it goes, a line at a time.
        slots: Of each worker.
        stuck_s: How long nothing may end before the rest is given up.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        say: Callable[[str], None] = print,
        slots: int = _SLOTS,
        stuck_s: float = _STUCK_S,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._told_to = say
        self._slots = slots
        self._stuck_s = stuck_s
        self._began = time.monotonic()
        self._said = 0.0

    def run(self, node: RabbitNode) -> Outcome:
        """Do it all with this broker, which is running and nobody else's."""
        stage = Stage(node, self._folder, slots=self._slots)
        faults = FaultMaker(stage, self._say)
        with stage.opened() as client, flame.Runner("chaos", client=client, echo=False) as runner:
            self._began = time.monotonic()
            caller, historian = Caller(runner, stage.traces.folder), Historian(client)
            try:
                self._play(caller, faults)
                faults.finish()
                self._await_ends(caller)
            finally:
                faults.give_up()
            left = self._await_quiet(historian, stage)
            records = self._records(caller, stage, historian)
            verdict = judge(records, Trouble(faults.done, stage.losses))
            verdict.breaches += _disorder(stage, faults, left)
        if not verdict.breaches:
            stage.forget_logs()
        wall_s = time.monotonic() - self._began
        return Outcome(self._plan, records, tuple(faults.done), verdict, wall_s)

    def _play(self, caller: Caller, faults: FaultMaker) -> None:
        """Make calls, cancels and faults at their times."""
        for at_s, what in self._script():
            while (early_s := at_s - self._elapsed()) > 0:
                time.sleep(min(early_s, 1.0))
                self._progress(caller)
            if isinstance(what, PlannedFault):
                faults.start(what)
            elif at_s == what.at_s:
                caller.make(what)
            else:
                caller.cancel(what)

    def _script(self) -> list[tuple[float, PlannedCall | PlannedFault]]:
        script: list[tuple[float, PlannedCall | PlannedFault]] = []
        for call in self._plan.calls:
            script.append((call.at_s, call))
            if call.kind is CallKind.CANCELLED:
                script.append((call.at_s + call.cancel_after_s, call))
        script += [(fault.at_s, fault) for fault in self._plan.faults]
        return sorted(script, key=lambda entry: entry[0])

    def _await_ends(self, caller: Caller) -> None:
        """Wait for the futures, as long as some of them end."""
        done, since = caller.done, time.monotonic()
        while caller.done < caller.made and time.monotonic() - since < self._stuck_s:
            if caller.done > done:
                done, since = caller.done, time.monotonic()
            time.sleep(0.1)
            self._progress(caller)
        self._say(f"{caller.done} of {caller.made} calls have ended")

    def _records(self, caller: Caller, stage: Stage, historian: Historian) -> tuple[Record, ...]:
        record = partial(_record, caller=caller, stage=stage, historian=historian)
        with ThreadPoolExecutor(_ASKING) as asking:
            return tuple(asking.map(record, self._plan.calls))

    def _await_quiet(self, historian: Historian, stage: Stage) -> str:
        """Wait until nothing is queued or in hand; what still is, when that takes too long."""
        deadline = time.monotonic() + self._stuck_s
        while left := self._left(historian, stage):
            if time.monotonic() > deadline:
                return left
            time.sleep(0.2)
        return ""

    def _left(self, historian: Historian, stage: Stage) -> str:
        held = sum(int(seat.health.get("held", 0)) for seat in stage.workers)
        if held:
            return f"workers hold {held} frames"
        waiting = historian.queued()
        waiting.pop("dead", None)  # calls that were quarantined are judged one by one
        return ", ".join(f"{count} messages in {kind}" for kind, count in waiting.items())

    def _progress(self, caller: Caller) -> None:
        if self._elapsed() - self._said > _SAY_EVERY_S:
            self._said = self._elapsed()
            self._say(f"{caller.made} calls made, {caller.done} ended")

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, line: str) -> None:
        self._told_to(f"{self._elapsed():7.1f} s  {line}")


def _disorder(stage: Stage, faults: FaultMaker, left: str) -> list[Breach]:
    """What is wrong, and is no single call's."""
    found = [*faults.unwell, *filter(None, [left])]
    for seat in stage.seats:
        found += [*seat.surprises, *(f"a traceback in {log}" for log in seat.tracebacks())]
    return [Breach(Rule.ORDERLY, None, text) for text in found]


def _record(call: PlannedCall, caller: Caller, stage: Stage, historian: Historian) -> Record:
    runs = stage.traces.runs(call.number)
    seen = caller.seen(call)
    with_value = len(runs) > 1 or call.number % _SAMPLE == 0
    return Record(call, seen, runs, historian.tell(seen, with_value=with_value))
