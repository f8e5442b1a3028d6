"""``flame result --json`` and ``flame wait``: what became of calls, for programs and for people."""

from __future__ import annotations

import json
from collections import OrderedDict
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest

import flame
from flame import progress
from flame_cli.outcome import outcome_of, value_of
from flame_cli.tables import json_text
from flame_cli.waiting import wait_for
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


class Colour(IntEnum):
    RED = 1


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value", [None, True, 0, -1.5, "é\0", [], [1, [2.0, "x"]], {"a": {"b": [None]}}]
)
def test_plain_data_is_given_as_it_is(value: object) -> None:
    found = json.loads(json_text(value_of(value)))
    assert found == {"value": value}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        ({1: "a key that JSON would change"}, "dict"),
        (float("nan"), "float"),
        ([float("inf")], "list"),
        ("\ud800", "str"),
        (ITSELF, "list"),
        (Colour.RED, f"{__name__}.Colour"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (Fraction(1, 3), "fractions.Fraction"),
    ],
)
def test_of_all_else_there_is_what_python_prints_and_its_type(value: object, kind: str) -> None:
    assert value_of(value) == {"repr": repr(value), "type": kind}


def test_an_error_is_told_as_the_history_has_it(runner: flame.Runner, worker: FakeWorker) -> None:
    future = runner.service(abs)(-1)
    well = {"id": future.id, "label": "abs", "state": "succeeded", "error": None}
    assert outcome_of(future, {"state": "succeeded", "error": ""}) == well
    story = {"state": "failed", "error": "ValueError", "reason": "no"}
    assert outcome_of(future, story)["error"] == {"type": "ValueError", "message": "no"}
    assert outcome_of(future, None)["state"] is None


class Screen:
    """What a bar would show."""

    def __init__(self) -> None:
        self.shown: list[tuple[float, str]] = []
        self.closed = False

    def bar(self, label: str, total: float) -> Screen:
        self.label, self.total = label, total
        return self

    def update(self, done: float, text: str) -> None:
        self.shown.append((done, text))

    def close(self) -> None:
        self.closed = True


def test_who_waits_sees_which_calls_are_not_over(
    runner: flame.Runner, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(progress, "Bar", screen.bar)
    worker.hold()
    service = runner.service(abs)
    futures = [service(-n) for n in range(5)]
    wait_until(lambda: worker.frames, 10)
    assert wait_for(futures, 0) == futures
    assert (screen.label, screen.total, screen.closed) == ("waiting for", 5, True)
    first, second, third = (future.id for future in futures[:3])
    assert screen.shown == [(0, f"abs {first}, abs {second}, abs {third}, 2 more")]
    worker.release()
    assert wait_for(futures, 10) == []
    assert all(future.went_well() for future in futures)
