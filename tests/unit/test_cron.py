"""Cron expressions on the clocks of a time zone: what the clocks skip and repeat, above all."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from flame_orchestrator.cron import Cron

BERLIN = "Europe/Berlin"
SPRING = datetime(2026, 3, 28, 23, 0, tzinfo=UTC)  # midnight before 02:00 becomes 03:00
AUTUMN = datetime(2026, 10, 24, 22, 0, tzinfo=UTC)  # midnight before 03:00 becomes 02:00


def clock(moments: list[float], zone: str) -> list[str]:
    """Moments as the clocks of a zone show them."""
    return [datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%d. %H:%M%z") for at in moments]


def following(cron: Cron, start: datetime, count: int) -> list[float]:
    found: list[float] = []
    at = cron.after(start.timestamp() - 1)
    while at is not None and len(found) < count:
        found.append(at)
        at = cron.after(at)
    return found


@pytest.mark.parametrize(
    ("expression", "start", "expected"),
    [
        ("30 2 * * *", SPRING, ["29. 03:00+0200", "30. 02:30+0200"]),
        ("15 2,3 * * *", SPRING, ["29. 03:00+0200", "29. 03:15+0200", "30. 02:15+0200"]),
        ("30 * * * *", SPRING, ["29. 00:30+0100", "29. 01:30+0100", "29. 03:30+0200"]),
        ("30 2 * * *", AUTUMN, ["25. 02:30+0200", "26. 02:30+0100"]),
        ("0 */2 * * *", AUTUMN, ["25. 00:00+0200", "25. 02:00+0200", "25. 04:00+0100"]),
        ("30 * * * *", AUTUMN, [
            "25. 00:30+0200", "25. 01:30+0200", "25. 02:30+0200", "25. 02:30+0100", "25. 03:30+0100"
        ]),
    ],
)  # fmt: skip
def test_a_time_that_the_clocks_skip_is_moved_and_one_that_they_repeat_counts_once(
    expression: str, start: datetime, expected: list[str]
) -> None:
    cron = Cron(expression, BERLIN)
    found = following(cron, start, len(expected))
    assert clock(found, BERLIN) == expected
    assert cron.between(start.timestamp(), found[-1], 99) == found  # backwards it is the same


def test_a_zone_that_moves_by_half_an_hour_or_leaves_out_a_day_loses_nothing() -> None:
    lord_howe = Cron("15 2 * * *", "Australia/Lord_Howe")
    found = following(lord_howe, datetime(2026, 10, 3, 0, 0, tzinfo=UTC), 2)
    assert clock(found, "Australia/Lord_Howe") == ["04. 02:30+1100", "05. 02:15+1100"]
    apia = Cron("0 12 * * *", "Pacific/Apia")  # there was no 30 December 2011
    found = following(apia, datetime(2011, 12, 29, 12, 0, tzinfo=UTC), 3)
    assert clock(found, "Pacific/Apia") == ["29. 12:00-1000", "31. 00:00+1400", "31. 12:00+1400"]


def test_moments_between_two_times_include_both_and_of_many_the_latest_are_given() -> None:
    every_second = Cron("* * * * * *", "UTC")
    assert every_second.between(1000.0, 1003.7, 9) == [1000.0, 1001.0, 1002.0, 1003.0]
    assert every_second.between(1000.5, 1003.0, 2) == [1002.0, 1003.0]
    assert (every_second.until(1000.0), every_second.after(1000.0)) == (1000.0, 1001.0)
    assert Cron("0 0 29 2 *", "UTC").until(0.0) == datetime(1968, 2, 29, tzinfo=UTC).timestamp()


def test_an_expression_whose_time_never_comes_has_no_next_one() -> None:
    assert Cron("0 0 30 2 *", "UTC").after(0.0) is None
    assert Cron("0 0 30 2 *", "UTC").between(0.0, 1e9, 9) == []


@pytest.mark.parametrize(
    ("expression", "zone", "words"),
    [
        ("61 * * * *", "UTC", "cron '61"),
        ("0 3 * *", "UTC", "expected five fields"),
        ("* * * * * * 2030", "UTC", "expected five fields"),
        ("@reboot", "UTC", "cron '@reboot'"),
        ("R 3 * * *", "UTC", "by chance"),
        ("0 3 1,h * *", "UTC", "by chance"),
        ("9" * 5000, "UTC", "expected five fields"),
        ("0 3 * * *", "Mars/Olympus", "knows no such zone"),
        ("0 3 * * *", "../../etc/passwd", "expected a name"),
        ("0 3 * * *", "", "expected a name"),
    ],
)
def test_what_names_no_times_is_refused(expression: str, zone: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cron(expression, zone)
