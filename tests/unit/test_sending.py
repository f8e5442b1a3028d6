"""How calls become frames, what is done before the first one, and what if that fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import flame
from flame.values import Values
from flame_broker.errors import FlameError
from flame_broker.transport import DEFAULT_DEADLINE_S
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def double(value: int) -> int:
    return value * 2


@pytest.fixture
def broken_upload(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Uploads of targets fail in a way that nobody foresaw."""

    def put_target(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(Values, "put_target", put_target)
    return monkeypatch


@pytest.mark.parametrize(
    ("call_s", "calls"),
    [(0.0, 64), (1e-6, 256), (5e-5, 160), (5e-4, 64), (1e-3, 8), (3e-3, 2), (6e-3, 1), (60.0, 1)],
)
def test_a_frame_holds_as_many_calls_as_are_over_soon(
    runner: flame.Runner, worker: FakeWorker, call_s: float, calls: int
) -> None:
    worker.hold()
    service = runner.service(double)
    lane = service._caller.board()[1]
    lane.call_s = call_s
    futures = service.map(range(300), chunk=300)
    wait_until(lambda: len(worker.frames) > 0, 10)
    assert len(worker.frames[0].calls) == calls
    futures.close()


def test_the_orchestrator_gets_long_calls_in_large_frames(runner: flame.Runner) -> None:
    service = runner.service(double, delivery="at_most_once")
    lane = service._caller.board()[1]
    lane.call_s = 60.0
    assert lane.frame_calls == 64


def test_whatever_fails_before_the_first_frame_fails_the_calls(
    runner: flame.Runner, broken_upload: object, caplog: pytest.LogCaptureFixture
) -> None:
    service = runner.service(lambda value: value + 1)
    with pytest.raises(FlameError, match="LookupError: a bug") as caught:
        service(1).result(10)
    assert isinstance(caught.value.__cause__, LookupError)
    with caplog.at_level(logging.ERROR, "flame"):
        assert isinstance(service(2).exception(10), FlameError)
    assert "lane.not_ready" in caplog.text
    assert "put_target" in caplog.text  # a bug shows where it is


def test_the_next_call_tries_again(
    runner: flame.Runner, broken_upload: pytest.MonkeyPatch, worker: FakeWorker
) -> None:
    service = runner.service(lambda value: value + 1)
    assert service(1).exception(10) is not None
    broken_upload.undo()
    assert service(2).result(10) == 3
    pending = runner.client.session.courier.pending
    assert not pending.records
    assert pending.window.inside == 0


def test_a_cancel_waits_for_a_broker_that_is_away_longer_than_a_call_does(
    runner: flame.Runner, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []
    transport = runner.client.session.courier._transport
    publish = transport.publish

    def noted(*args: Any, deadline_s: float = DEFAULT_DEADLINE_S, **options: Any) -> Any:
        patience.append(deadline_s)
        return publish(*args, deadline_s=deadline_s, **options)

    worker.hold()
    future = runner.service(double)(1)
    wait_until(lambda: future.published)
    monkeypatch.setattr(transport, "publish", noted)
    assert future.cancel()
    wait_until(lambda: len(patience) >= 2)
    assert min(patience) >= 3600 > DEFAULT_DEADLINE_S
