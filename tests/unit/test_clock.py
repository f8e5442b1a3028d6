"""A clock that is set anew makes no deadline come too early."""

from __future__ import annotations

import pytest

from flame_broker.clock import Clock

HOUR_S = 3600.0


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the machine's clock says; a steady clock stands at zero."""
    said = [1e9]
    monkeypatch.setattr("flame_broker.clock.time.time", lambda: said[0])
    monkeypatch.setattr("flame_broker.clock.elapsed", lambda: 0.0)
    return said


def test_a_clock_that_nobody_sets_gives_one_answer(wall: list[float]) -> None:
    clock = Clock()
    assert clock.earliest() == clock.latest() == 1e9


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_after_a_jump_the_judge_takes_the_earlier_and_the_stamp_the_later(
    wall: list[float], jump_s: float
) -> None:
    clock = Clock()
    wall[0] += jump_s
    assert clock.earliest() == min(1e9, 1e9 + jump_s)
    assert clock.latest() == max(1e9, 1e9 + jump_s)
