"""How many frames a worker holds ahead of its slots."""

from __future__ import annotations

import pytest

from flame_worker.timing import BUDGET_S, LEAD_S, SHORT_S, frames_ahead


@pytest.mark.parametrize("slots", [1, 2, 4, 64])
@pytest.mark.parametrize("seconds", [1e-5, 0.001, SHORT_S, 0.015, LEAD_S - 1e-6])
def test_what_is_held_ahead_of_slots_starts_within_its_budget(seconds: float, slots: int) -> None:
    ahead = frames_ahead(seconds, slots)
    assert 1 <= ahead <= 6
    assert seconds * ahead / slots <= BUDGET_S / 2


def test_frames_that_take_a_while_are_not_held_ahead() -> None:
    assert frames_ahead(LEAD_S, 64) == 0
