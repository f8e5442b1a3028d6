"""Queue timeouts of calls that no worker takes, or that one has taken already."""

from __future__ import annotations

import time

import pytest

import flame
from flame.errors import CallExpired
from flame.expiry import Expiry
from flame.inquiry import Inquiry
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def double(value: int) -> int:
    return value * 2


def nothing_left(client: flame.Client) -> bool:
    pending = client.session.courier.pending
    return not pending.records and pending.window.inside == 0


def test_a_call_of_a_pool_without_workers_expires(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker
) -> None:
    future = runner.service(double, pool="gpus", queue_timeout=0.05)(1)
    with pytest.raises(
        CallExpired, match=r"'double' in pool 'gpus'.* 0\.05 s and was never"
    ) as got:
        future.get(10)
    assert got.value.call_id == future.id
    assert len(worker.expired) == 1
    assert nothing_left(client)


def test_a_call_that_a_worker_has_started_goes_on_and_is_not_asked_about_again(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double, queue_timeout=0.05)
    started = service(1)
    wait_until(lambda: worker.frames)
    worker.running = {call.counter for call in worker.frames[0].calls}
    left = service(2)
    with pytest.raises(CallExpired):
        left.get(10)
    assert not started.done()
    assert len(worker.expired) == 2
    worker.release()  # the double says itself that it came too late; a real worker runs it
    with pytest.raises(CallExpired, match="too late"):
        started.get(10)
    assert nothing_left(client)


def test_room_of_a_call_that_expired_is_given_back_once_though_a_result_follows(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double, queue_timeout=0.05, autoscale=False, warmup=1)
    with pytest.raises(CallExpired):
        service(1).get(10)
    worker.release()
    assert runner.service(double)(2).get(10) == 4  # its result comes behind the late one
    assert nothing_left(client)
    gate = service._caller._gate
    assert gate is not None
    assert gate.inside == 0


def test_calls_of_a_map_expire(runner: flame.Runner, client: flame.Client) -> None:
    service = runner.service(double, pool="gpus", queue_timeout=0.05)
    with pytest.raises(CallExpired):
        list(service.map(range(300)))
    wait_until(lambda: nothing_left(client))


def test_calls_that_ended_long_before_their_timeout_are_forgotten(
    runner: flame.Runner, monkeypatch: pytest.MonkeyPatch, client: flame.Client
) -> None:
    monkeypatch.setattr("flame.expiry._SWEEP_AT", 4)
    expiry: Expiry = client.session.courier._expiry
    expiry._sweep_at = 4
    service = runner.service(double, queue_timeout=3600)
    for number in range(12):
        assert service(number).get(10) == 2 * number
    assert len(expiry._timed) <= 5


def test_calls_without_a_queue_timeout_are_not_watched(
    runner: flame.Runner, client: flame.Client
) -> None:
    assert runner.service(double)(1).get(10) == 2
    assert client.session.courier._expiry._timed == []


def test_a_service_whose_calls_expire_is_merely_not_ready(runner: flame.Runner) -> None:
    assert not runner.service(double, pool="gpus", queue_timeout=0.05).ready(2)


def test_where_workers_cannot_be_asked_only_they_end_calls(
    runner: flame.Runner,
    client: flame.Client,
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Inquiry, "reaches_workers", False)
    worker.hold()
    future = runner.service(double, queue_timeout=0.05)(1)
    wait_until(lambda: worker.frames)
    assert client.session.courier._expiry._timed == []
    wait_until(lambda: time.time() > worker.frames[0].expires_at)
    worker.release()
    with pytest.raises(CallExpired):
        future.get(10)
