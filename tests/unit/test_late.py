"""A kept call that no worker takes in its time ends as expired, by the orchestrator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import time

import pytest

from flame_broker.messages import Limitation
from flame_broker.outcomes import describe
from flame_orchestrator.custody import Late
from lab.desk import AT_ONCE, Desk, again, cancel, claim, deposit, good, late, outcome


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.engine.dispose()


def waits(desk: Desk, *counters: int, seconds: float = 60.0, **terms: object) -> None:
    """Calls are in their queue, and may wait there so long."""
    desk.take(deposit(*counters, queue_timeout_s=seconds, **terms))
    desk.custody.lift_bars(desk.epoch, time(), None)
    desk.start_due()


def late_calls(desk: Desk, after_s: float) -> list[Late]:
    return desk.custody.late(time() + after_s, 100)


def test_a_call_is_late_when_it_has_waited_its_time_in_its_queue(desk: Desk) -> None:
    waits(desk, 1)
    waits(desk, 2, seconds=0.0)
    assert late_calls(desk, 59) == []
    assert late_calls(desk, 61) == [Late("c", 1, 1)]


def test_a_late_call_ends_as_expired_and_is_told_of_again_if_the_letter_comes_again(
    desk: Desk,
) -> None:
    waits(desk, 1)
    said = late(1)
    desk.take(said)
    assert desk.state(1) == "expired"
    assert describe(desk.told["c-1"][0]) == (
        "CallExpired", "no worker has started it within its queue timeout"
    )  # fmt: skip
    assert late_calls(desk, 61) == []
    desk.take(said)
    desk.take(late(1, attempt=2), outcome(good(1)))
    assert len(desk.told["c-1"]) == 2
    assert desk.state(1) == "expired"


def test_a_call_that_runs_or_has_ended_is_not_late(desk: Desk) -> None:
    waits(desk, 1, 2, 3)
    desk.take(claim(1), outcome(good(2)), cancel(3))
    assert late_calls(desk, 61) == []
    desk.take(late(1), late(2), late(3))
    assert [desk.state(n) for n in (1, 2, 3)] == ["running", "succeeded", "cancelled"]


def test_each_attempt_has_its_time(desk: Desk) -> None:
    waits(desk, 1, retry=AT_ONCE)
    desk.take(outcome(again(1)))
    assert late_calls(desk, 61) == []
    desk.start_due()
    desk.take(late(1, attempt=1))
    assert desk.state(1) == "queued"
    assert late_calls(desk, 61) == [Late("c", 1, 2)]


def test_a_late_call_leaves_its_place_under_a_limit_to_others(desk: Desk) -> None:
    waits(desk, 1, 2, limits=(Limitation("license", 1),) * 2)
    assert (desk.state(1), desk.state(2)) == ("queued", "waiting")
    desk.take(late(1))
    desk.custody.lift_bars(desk.epoch, time(), None)
    desk.start_due()
    assert desk.state(2) == "queued"
