"""Queue timeouts on the embedded cluster, whose slots are all busy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame.errors import CallExpired
from flame.testing import embedded
from lab.wait import wait_until


def hold(folder: str, name: str) -> str:
    """Say that it runs, and go on until it is let go."""
    Path(folder, name).touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    return name


@pytest.fixture
def runner() -> Iterator[flame.Runner]:
    with embedded() as client, flame.Runner("late", client=client) as made:
        yield made


def fill_slots(runner: flame.Runner, folder: Path) -> list[flame.Future]:
    """Calls with a queue timeout of their own, that run in every slot."""
    slots = sum(int(str(facts["slots"])) for facts in runner.client.workers(0.3))
    service = runner.service(hold, queue_timeout=2)
    busy = [service(str(folder), f"busy-{number}") for number in range(slots)]
    wait_until(lambda: len([*folder.glob("busy-*")]) == slots, 20)
    return busy


def test_a_call_expires_while_all_slots_are_busy_and_never_runs(
    runner: flame.Runner, tmp_path: Path
) -> None:
    busy = fill_slots(runner, tmp_path)
    late = runner.service(hold, queue_timeout=0.5)(str(tmp_path), "late")
    with pytest.raises(CallExpired, match="queue timeout"):
        late.get(timeout=20)
    assert not any(future.done() for future in busy)
    (tmp_path / "go").touch()
    assert runner.get(busy, timeout=20) == [f"busy-{number}" for number in range(len(busy))]
    assert runner.service(hold)(str(tmp_path), "next").get(timeout=20) == "next"
    assert not (tmp_path / "late").exists()


def test_a_call_that_runs_does_not_expire(runner: flame.Runner, tmp_path: Path) -> None:
    running = runner.service(hold, queue_timeout=2)(str(tmp_path), "running")
    wait_until((tmp_path / "running").exists, 20)
    with pytest.raises(CallExpired):  # by then the other one was asked about and answered for
        runner.service(hold, pool="nobody", queue_timeout=2.5)(str(tmp_path), "x").get(timeout=20)
    (tmp_path / "go").touch()
    assert running.get(timeout=20) == "running"


def test_a_call_that_fits_no_worker_expires(runner: flame.Runner, tmp_path: Path) -> None:
    large = runner.service(hold, resreq="cpu=1000", queue_timeout=0.2)(str(tmp_path), "large")
    with pytest.raises(CallExpired, match="'hold' in pool 'default'"):
        large.get(timeout=20)


def test_a_call_made_by_a_call_expires(runner: flame.Runner) -> None:
    def ask_nobody() -> str:
        with flame.Runner("inner") as inner:
            future = inner.service(abs, pool="nobody", queue_timeout=0.2)(-1)
            return type(future.exception(timeout=15)).__name__

    assert runner.service(ask_nobody)().get(timeout=30) == "CallExpired"
