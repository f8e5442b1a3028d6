"""The short form of ``make chaos``: a few hundred calls, and each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.plan import FaultKind, make_plan
from chaos.program import Program
from chaos.report import report
from lab import RabbitNode

SEED = 2440  # it fills the disk first, and soon kills the broker, which takes longest
# Each trouble once, and none of those that take the broker's time for another eight seconds.
FAULTS = tuple(
    kind
    for kind in FaultKind
    if kind not in (FaultKind.PAUSE_BROKER, FaultKind.STALL_CLIENT, FaultKind.STALL_WORKER)
)


@pytest.mark.timeout(300)
def test_every_rule_holds_while_everything_is_killed_stopped_and_cut(
    own_rabbit: RabbitNode, tmp_path: Path
) -> None:
    plan = make_plan(
        SEED,
        calls=240,
        duration_s=11,
        longest_s=2,
        faults=len(FAULTS),
        kinds=FAULTS,
        pause_s=5,
    )
    outcome = Program(plan, tmp_path, slots=4, stuck_s=90).run(own_rabbit)
    assert not outcome.verdict.breaches, report(outcome)
    made = {one.kind for one in outcome.disturbances}
    assert made >= set(FAULTS) - {FaultKind.KILL_CHILD}  # which needs one that is at work just then
    assert len(outcome.records) == 240
