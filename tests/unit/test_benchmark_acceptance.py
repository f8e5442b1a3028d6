"""The acceptance table says what was measured, never what was hoped for."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import acceptance

    return acceptance


@pytest.fixture
def combine(acceptance: ModuleType) -> ModuleType:
    return sys.modules["combine"]


def outcome(acceptance: ModuleType, results: dict[str, Any], what: str) -> Any:
    return next(line for line in acceptance.acceptance(results) if line.what == what)


def test_ratio_is_computed_from_both_systems(acceptance: ModuleType) -> None:
    results = {"flame": {"futures": {"rate": 60_000}}, "celery": {"futures": {"rate": 1_000}}}
    line = outcome(acceptance, results, "separate futures, warm / Celery")
    assert (line.measured, line.reached) == ("60 ×", "yes")


def test_missed_target_is_shown_as_missed(acceptance: ModuleType) -> None:
    results = {"flame": {"futures": {"rate": 40_000}}, "celery": {"futures": {"rate": 1_000}}}
    assert outcome(acceptance, results, "separate futures, warm / Celery").reached == "no"


@pytest.mark.parametrize(
    "figure", [{"failed": "TypeError: …", "rate": 60_000}, {"skipped": "too slow"}, None]
)
def test_figure_that_failed_or_is_missing_is_not_measured(
    acceptance: ModuleType, figure: dict[str, Any] | None
) -> None:
    flame = {} if figure is None else {"map_1m": figure}
    line = outcome(acceptance, {"flame": flame}, "map over 1,000,000")
    assert line.reached == "–"
    assert line.measured.startswith("not measured")


def test_rounds_are_combined_by_their_median(combine: ModuleType) -> None:
    rounds = [{"sequential": {"p50_ms": value}} for value in (3.0, 1.0, 2.0)]
    assert combine.combine(rounds)["sequential"]["p50_ms"] == 2.0


def test_a_failed_round_does_not_hide_a_good_one(combine: ModuleType) -> None:
    rounds = [{"cold": {"failed": "x"}}, {"cold": {"rate": 5.0}}]
    assert combine.combine(rounds)["cold"] == {"rate": 5.0}


def test_all_bursts_of_all_rounds_count(combine: ModuleType) -> None:
    rounds = [{"futures": {"rates": [1.0, 2.0], "rate": 1.5, "best": 2.0}}]
    rounds += [{"futures": {"rates": [9.0], "rate": 9.0, "best": 9.0}}]
    merged = combine.combine(rounds)["futures"]
    assert (merged["rate"], merged["best"]) == (2.0, 9.0)
