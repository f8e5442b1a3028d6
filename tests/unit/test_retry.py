"""``flame.Retry`` and the terms of a call say what is wrong with them where they are written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from time import time
from typing import Any

import pytest

import flame
from flame.errors import ConfigError, WorkerLost
from flame.lanes import Terms
from flame.limit import Limit
from flame.options import make_options, make_terms
from flame.retry import Retry


@pytest.mark.parametrize(
    ("given", "problem", "message"),
    [
        ({"attempts": 0}, ValueError, "attempts=0: expected 1 or more"),
        ({"attempts": "3"}, TypeError, "attempts='3'"),
        ({"attempts": True}, TypeError, "attempts=True"),
        ({"backoff": 1.0}, TypeError, "backoff=1.0: expected a timedelta"),
        ({"backoff": timedelta(seconds=-1)}, ValueError, "no less than 0 seconds"),
        ({"factor": 0.5}, ValueError, "factor=0.5: expected 1 or more"),
        ({"on": (3,)}, TypeError, "expected exception classes"),
        ({"on": "OSError"}, TypeError, "expected exception classes"),
        ({"exit_codes": ("1",)}, TypeError, "expected numbers"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(
    given: dict[str, Any], problem: type[Exception], message: str
) -> None:
    with pytest.raises(problem) as caught:
        Retry(**given)
    assert message in str(caught.value)


def test_exceptions_are_named_as_workers_compare_them() -> None:
    assert Retry(on=WorkerLost).names == ("flame_broker.errors.WorkerLost",)
    assert Retry().names == ("builtins.Exception",)


def test_a_service_that_limits_itself_cannot_be_kept_too() -> None:
    with pytest.raises(ConfigError, match="autoscale=False"):
        make_options(abs, echo=True, given={"retry": Retry(), "autoscale": False})
    with pytest.raises(TypeError, match=r"expected flame\.Retry"):
        make_options(abs, echo=True, given={"retry": 3})  # type: ignore[typeddict-item]


def test_a_time_is_absolute_with_its_zone_or_counted_from_now_on() -> None:
    at = datetime(2100, 1, 1, tzinfo=UTC)
    assert make_terms(at, "").not_before == at.timestamp()
    assert make_terms(None, "once") == Terms(0.0, "once")
    for delay in (60, 60.0, timedelta(minutes=1)):
        assert abs(make_terms(delay, "").not_before - time() - 60) < 30


@pytest.mark.parametrize(
    ("not_before", "problem"),
    [
        (datetime(2100, 1, 1), ValueError),  # noqa: DTZ001  # that is what is refused
        (-1, ValueError),
        (float("inf"), ValueError),
        ("tomorrow", TypeError),
        (True, TypeError),
    ],
)
def test_a_time_that_makes_no_sense_is_refused(not_before: Any, problem: type[Exception]) -> None:
    with pytest.raises(problem, match="not_before="):
        make_terms(not_before, "")


def test_a_key_is_a_short_text() -> None:
    with pytest.raises(TypeError, match="key=3"):
        make_terms(None, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 500 characters"):
        make_terms(None, "k" * 501)
    with pytest.raises(ValueError, match="without a zero"):
        make_terms(None, "a\0b")


def test_retry_is_a_part_of_the_public_names() -> None:
    assert flame.Retry is Retry


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("license", 0), ValueError),
        (("", 1), ValueError),
        (("a\0", 1), ValueError),
        ((3, 1), TypeError),
        (("license", "4"), TypeError),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(
    given: tuple[Any, Any], problem: type[Exception]
) -> None:
    with pytest.raises(problem, match="expected"):
        Limit(*given)


def test_calls_to_wait_for_are_futures_or_ids_each_once() -> None:
    assert make_terms(after=["k3-1", "k3-2", "k3-1"]).after == ("k3-1", "k3-2")
    assert make_terms(after="k3-1").after == ("k3-1",)
    with pytest.raises(ValueError, match="is not a call id"):
        make_terms(after=["nonsense"])
    with pytest.raises(TypeError, match="expected futures"):
        make_terms(after=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"flame\.Limit"):
        make_terms(limit=("license", 4))  # type: ignore[arg-type]
