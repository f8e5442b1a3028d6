"""The short form of ``make chaos``: a few hundred calls, and each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.plan import FaultKind, make_plan
from chaos.program import Program
from chaos.report import report
from lab import RabbitNode

SEED = 1


@pytest.mark.timeout(300)
def test_every_rule_holds_while_everything_is_killed_stopped_and_cut(
    own_rabbit: RabbitNode, tmp_path: Path
) -> None:
    plan = make_plan(SEED, calls=400, duration_s=16, longest_s=2, faults=len(FaultKind))
    outcome = Program(plan, tmp_path, stuck_s=90).run(own_rabbit)
    assert not outcome.verdict.breaches, report(outcome)
    assert {one.kind for one in outcome.disturbances} == set(FaultKind)
    assert len(outcome.records) == 400
