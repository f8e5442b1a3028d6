"""``service.schedule`` says what is wrong where it is written, and stores first what calls need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flame
from flame.errors import ConfigError, FlameError, NoOrchestrator, PackagingError
from flame.schedule import Timetable
from flame_broker.schedules import CatchUp


@pytest.mark.parametrize(
    ("given", "problem", "message"),
    [
        ({"name": ""}, ValueError, "name='': expected letters"),
        ({"name": "two words"}, ValueError, "name='two words'"),
        ({"name": "-x"}, ValueError, "the first a letter or digit"),
        ({"name": 3}, TypeError, "name=3"),
        ({"overlap": 1}, TypeError, "overlap=1"),
        ({"cron": 5}, TypeError, "cron=5: expected text as '0 3 * * *'"),
        ({"timezone": None}, TypeError, "timezone=None: expected text as 'Europe/Berlin'"),
        ({"catch_up": "some"}, ValueError, "expected one of 'none', 'latest', 'all'"),
        ({"catch_up": "all", "overlap": False}, ValueError, "leave one of the two out"),
    ],
)
def test_a_timetable_that_makes_no_sense_is_refused(
    given: dict[str, Any], problem: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "name": "nightly",
        "cron": "0 3 * * *",
        "timezone": "UTC",
        "catch_up": "all",
        "overlap": True,
    }
    assert Timetable.checked(**good).catch_up is CatchUp.ALL
    with pytest.raises(problem) as caught:
        Timetable.checked(**{**good, **given})
    assert message in str(caught.value)


def test_what_cannot_be_repeated_without_the_client_is_refused(runner: flame.Runner) -> None:
    service = runner.service(len)
    with pytest.raises(PackagingError, match="a future cannot be an argument of a schedule of len"):
        service.schedule("@daily", [service("abc")], name="x")
    with pytest.raises(PackagingError, match="argument 1 of len cannot be sent"):
        service.schedule("@daily", (n for n in range(3)), name="x")
    with pytest.raises(ConfigError, match="overlap=False has it make one at a time"):
        runner.service(len, autoscale=False).schedule("@daily", "abc", name="x")
    service.close()
    with pytest.raises(FlameError, match="is closed"):
        service.schedule("@daily", "abc", name="x")


def test_code_and_large_arguments_are_stored_before_anything_is_asked(
    runner: flame.Runner, tmp_path: Path
) -> None:
    service = runner.service(lambda text: len(text) * 2)
    with pytest.raises(NoOrchestrator, match="start `flame-orchestrator`"):
        service.schedule("@daily", "x" * 100_000, name="x")
    store = tmp_path / "store"
    assert [len([*(store / kind).iterdir()]) for kind in ("objects", "targets")] == [1, 1]
