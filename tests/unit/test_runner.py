"""``Runner`` and its services: options, collecting, closing, forks."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

import flame
from flame_broker.errors import (
    CallExpired,
    ConfigError,
    FlameError,
    PayloadTooLarge,
    ResourceError,
)
from flame_broker.frames import decode
from flame_broker.messages import ControlFrame
from flame_broker.topology import classes_queue
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def double(value: int) -> int:
    return value * 2


def fail() -> None:
    raise LookupError("nothing")


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, value: int) -> int:
        self.count += value
        return self.count


def test_get_keeps_the_order_and_the_nesting(runner: flame.Runner) -> None:
    service = runner.service(double)
    assert runner.get(service(1)) == 2
    assert runner.get([service(n) for n in range(5)]) == [0, 2, 4, 6, 8]
    assert runner.get([service(1), [service(2), (service(3),)]]) == [2, [4, [6]]]
    assert runner.get(service(n) for n in range(3)) == [0, 2, 4]
    assert runner.get([]) == []
    with pytest.raises(TypeError, match="expected futures"):
        runner.get(5)  # type: ignore[call-overload]


def test_get_raises_what_a_call_raised(runner: flame.Runner) -> None:
    with pytest.raises(LookupError, match="nothing"):
        runner.get([runner.service(double)(1), runner.service(fail)()])


def test_get_and_wait_take_a_timeout_for_all_together(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    futures = [runner.service(double)(n) for n in range(3)]
    with pytest.raises(TimeoutError):
        runner.get(futures, timeout=0.05)
    assert not runner.wait(futures, timeout=0.05)
    worker.release()
    assert runner.wait(futures, timeout=10)


def test_ref_and_put_object_give_references(runner: flame.Runner) -> None:
    refs = runner.ref([runner.service(double)(n) for n in range(3)])
    assert [runner.client.get_object(ref) for ref in refs] == [0, 2, 4]
    assert runner.client.get_object(runner.put_object("x")) == "x"


def test_select_gives_futures_as_they_end(runner: flame.Runner, worker: FakeWorker) -> None:
    futures = [runner.service(double)(n) for n in range(10)]
    assert {future.get() for future in runner.select(futures)} == {2 * n for n in range(10)}


def test_a_closed_runner_makes_no_services_and_its_services_no_calls(
    client: flame.Client,
) -> None:
    with flame.Runner(client=client) as runner:
        service = runner.service(double)
        future = service(4)
    runner.close()
    assert future.get(10) == 8
    for attempt in (lambda: runner.service(double), lambda: service(1), lambda: service.map([1])):
        with pytest.raises(FlameError, match="closed"):
            attempt()


def test_ready_is_a_round_trip(runner: flame.Runner, worker: FakeWorker) -> None:
    service = runner.service(double)
    assert service.ready(timeout=10)
    worker.hold()
    assert not service.ready(timeout=0.05)


def test_workers_answer_the_client(client: flame.Client) -> None:
    assert client.workers(timeout_s=0.2) == [{"worker": "fake", "pool": "default"}]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"retry": 3}, TypeError, "flame.Retry"),
        (
            {"delivery": "at_most_once", "retry": flame.Retry()},
            ConfigError,
            "never starts a call twice",
        ),
        ({"delivery": "at_most_once", "autoscale": False}, ConfigError, "kept by the orchestrator"),
        ({"delivery": "twice"}, ValueError, "at_least_once"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"stateful": True}, ValueError, "stateful"),
        ({"priority": "urgent"}, ValueError, "'high', 'normal', 'low'"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"queue_timeout": -3}, ValueError, "queue_timeout"),
        ({"timeout": "1"}, TypeError, "timeout='1': expected seconds"),
        ({"timeout": True}, TypeError, "timeout=True: expected seconds"),
        ({"autoscale": "no"}, TypeError, "autoscale='no': expected True or False"),
        ({"stateful": "no"}, TypeError, "stateful='no': expected True or False"),
        ({"resreq": "cpu=-1"}, ResourceError, "cpu"),
        ({"resreq": {"cpu": 1}}, TypeError, "expected text such as 'cpu="),
        ({"warmup": "2"}, ValueError, "warmup='2'"),
        ({"pool": "a b"}, ValueError, "pool"),
        ({"pool": "a.b"}, ValueError, "pool"),
        ({"pool": 5}, ValueError, "pool"),
        ({"pool": "p" * 65}, ValueError, "64"),
    ],
)
def test_options_that_cannot_be_are_refused(
    runner: flame.Runner, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        runner.service(double, **options)


@pytest.mark.parametrize(
    "options", [{"dependencies": ["numpy"]}, {"python_version": "3.12"}, {"fail_if_exists": True}]
)
def test_runner_options_to_come_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not there yet"):
        flame.Runner("x", **options)


def test_classes_and_instances_get_a_clear_error(runner: flame.Runner) -> None:
    with pytest.raises(FlameError, match="classes are not there yet"):
        runner.service(Counter)
    with pytest.raises(FlameError, match="instances are not there yet"):
        runner.service(Counter())  # type: ignore[arg-type]
    with pytest.raises(FlameError, match="each child"):
        runner.service(Counter(), stateful=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a function"):
        runner.service(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fn", [double, functools.partial(pow, 2), lambda value: value * 2, Counter().add, (2).__mul__]
)
def test_anything_callable_is_served(runner: flame.Runner, fn: Callable[[int], int]) -> None:
    assert runner.service(fn)(1).get(10) == fn(1) or isinstance(fn, type(Counter().add))


def test_options_reach_the_frame(runner: flame.Runner, worker: FakeWorker) -> None:
    service = runner.service(double, timeout=timedelta(seconds=3), priority="low")
    assert service(1).get(10) == 2
    frame = worker.frames[-1]
    assert frame.spec.timeout_s == 3
    assert frame.spec.label == "double"
    assert frame.queue.endswith(".default.c1.low")


def test_a_call_that_waits_longer_than_its_queue_timeout_expires(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double, queue_timeout=0.05)(1)
    wait_until(lambda: worker.frames)
    assert worker.frames[0].expires_at > 0
    wait_until(lambda: time.time() > worker.frames[0].expires_at)
    worker.release()
    with pytest.raises(CallExpired):
        future.get(10)


def test_a_resource_class_is_announced_once(runner: flame.Runner, worker: FakeWorker) -> None:
    service = runner.service(double, resreq="cpu=2,mem=3g")
    futures = [service(1), runner.service(double, resreq="cpu=2,mem=4g")(2)]
    stream = classes_queue(worker.keyring.signer.hex_id, "default").name
    wait_until(lambda: worker.run(worker.transport.depth(stream)) == 1)
    heard: list[ControlFrame] = []

    async def listen() -> None:
        await worker.transport.consume(
            stream, lambda d: heard.append(decode(d.body, worker.keyring)), prefetch=10
        )

    worker.run(listen())
    wait_until(lambda: heard)
    assert (heard[0].verb, heard[0].arguments) == ("class", {"pool": "default", "name": "c2-m4"})
    assert not any(future.done() for future in futures)


def test_a_deleted_queue_is_declared_again(runner: flame.Runner, worker: FakeWorker) -> None:
    service = runner.service(double)
    assert service(1).get(10) == 2
    queue = worker.frames[-1].queue
    worker.run(worker.transport.delete(queue))
    future = service(2)
    wait_until(lambda: worker.run(worker.transport.depth(queue)) == 1)
    assert not future.done()


def test_a_call_with_more_references_than_a_message_holds_fails_and_the_next_one_works(
    runner: flame.Runner,
) -> None:
    service = runner.service(len)
    ref = runner.put_object("x")
    with pytest.raises(PayloadTooLarge, match="fewer object references"):
        service([replace(ref, version=n) for n in range(40_000)]).get(10)
    assert service([1, 2]).get(10) == 2


def test_the_default_client_is_the_one_connected_last(worker: FakeWorker) -> None:
    with flame.connect(worker.url, key=worker.key_text) as client:
        assert flame.Runner().client is client


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked child; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001  # it must not run the rest of the test session
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_sees_the_parents_futures_as_failed(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(3)
    with pytest.raises(TimeoutError):
        future.result(0.05)  # a condition exists, as in a program that waits elsewhere

    def look() -> None:
        with pytest.raises(FlameError, match="belongs to the process that made it"):
            future.get(5)

    assert in_child(look) == 0
    worker.release()
    assert future.get(10) == 6


def test_a_forked_child_makes_its_own_connection(
    runner: flame.Runner, client: flame.Client, tmp_path: Any
) -> None:
    service = runner.service(double)
    assert service(1).get(10) == 2
    parent = client.id

    def call() -> None:
        # The in-process broker is empty in the child, so it needs a worker of its own.
        assert client.id != parent
        store = runner.client.session.values.store
        mine = FakeWorker(client.settings.broker_url or "", client.settings.key_text or "", store)
        mine.start()
        assert service(5).get(10) == 10
        assert list(service.map(range(3))) == [0, 2, 4]

    assert in_child(call) == 0
    assert service(2).get(10) == 4
