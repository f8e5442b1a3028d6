"""Questions to the cluster that are no calls."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import flame
from flame.errors import FlameError
from flame.pinger import Pinger
from flame_broker.frames import encode
from flame_broker.keys import Key as ClusterKey
from flame_broker.keys import generate_key
from flame_broker.messages import ControlFrame
from flame_broker.topology import classes_queue, custody_queue, kept_logs_queue
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def test_workers_answer_once_each(client: flame.Client) -> None:
    assert [facts["worker"] for facts in client.workers(0.3)] == ["fake"]


def test_enough_answers_end_the_wait(client: flame.Client) -> None:
    started_s = time.monotonic()
    found = client.workers(30, enough=lambda answers: len(answers) == 1)
    assert [facts["worker"] for facts in found] == ["fake"]
    assert time.monotonic() - started_s < 10


def test_two_threads_may_ask_at_once(client: flame.Client) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(len(client.workers(0.3)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1, 1, 1, 1]


@pytest.mark.parametrize(("offset_s", "low", "high"), [(0, 0, 0), (9, 8, 9), (-9, -9, -8)])
def test_the_skew_of_a_clock_is_what_the_way_does_not_explain(
    client: flame.Client, worker: FakeWorker, offset_s: float, low: float, high: float
) -> None:
    reply = client.session.courier._sender.reply

    def answer() -> None:
        here = ControlFrame(reply, "here", {"worker": "other", "clock": time.time() + offset_s})
        worker.send(here, reply)

    threading.Timer(0.05, answer).start()
    found = client.workers(10, enough=lambda answers: len(answers) == 2)
    (other,) = [facts for facts in found if facts["worker"] == "other"]
    skew_s: Any = other["clock_skew_s"]
    assert low <= skew_s <= high


def test_pings_measure_both_hops(client: flame.Client) -> None:
    assert 0 < client.ping_broker() < 5
    assert 0 < client.ping() < 5
    assert client.server == "broker in this process"


def test_a_ping_that_nobody_takes_times_out_and_is_cancelled(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    pinger = Pinger(client, timeout_s=0.2)
    with pytest.raises(TimeoutError):
        pinger.trip()
    wait_until(lambda: worker.cancelled == [worker.frames[-1].calls[0].counter], 5)
    assert worker.frames[-1].expires_at > time.time()


def test_a_question_inside_a_done_callback_is_refused(
    client: flame.Client, worker: FakeWorker
) -> None:
    found: list[BaseException] = []

    def ask(_: object) -> None:
        try:
            client.ping_broker()
        except FlameError as exc:
            found.append(exc)

    with flame.Runner("t", client=client) as runner:
        worker.hold()  # a callback on a future that is done runs here, where it may ask
        future = runner.service(abs)(-1)
        future.add_done_callback(ask)
        worker.release()
        future.result(5)
    wait_until(lambda: bool(found), 5)
    assert "done-callback" in str(found[0])


def test_queues_lists_announced_classes_and_what_waits(
    client: flame.Client, worker: FakeWorker
) -> None:
    with flame.Runner("t", client=client) as runner:
        runner.service(abs, resreq="cpu=2", priority="high")(1)
        wait_until(lambda: _depths(client).get(("c2", "high")) == 1, 5)
    assert _depths(client)["c1", "normal"] == 0
    assert ("c2", "normal") not in _depths(client)


def test_a_class_that_another_key_announced_is_no_class(
    client: flame.Client, worker: FakeWorker
) -> None:
    stream = classes_queue(client.key_id, "default").name
    with flame.Runner("t", client=client) as runner:
        runner.service(abs, resreq="cpu=2")(1)
        wait_until(lambda: ("c2", "normal") in _depths(client), 5)
    forged = ControlFrame(stream, "class", {"pool": "default", "name": "c8"})
    worker.send(None, stream, body=encode(forged, ClusterKey.parse(generate_key())))
    assert {resources for resources, _ in _depths(client)} == {"c1", "c2"}


def test_queues_lists_those_of_an_orchestrator_once_there_was_one(
    client: flame.Client, worker: FakeWorker
) -> None:
    assert {q.kind for q in client.queues()} == {"calls", "replies"}
    custody, kept = (spec(client.key_id) for spec in (custody_queue, kept_logs_queue))
    worker.run(worker.transport.declare(custody, kept))
    worker.send(ControlFrame(custody.name, "tick", {}), custody.name)
    waiting = {q.name: (q.kind, q.messages) for q in client.queues()}
    assert waiting[custody.name] == ("custody", 1)
    assert waiting[kept.name] == ("logs", 0)


def _depths(client: flame.Client) -> dict[tuple[str, str], int]:
    return {(q.resources, q.priority): q.messages for q in client.queues() if q.kind == "calls"}
