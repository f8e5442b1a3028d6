"""What a client says of results that it did not take: the history is to tell of those it took."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

import flame
from flame_broker.frames import encode, identity, open_frame
from flame_broker.messages import ControlFrame, Result, ResultFrame, Status
from flame_broker.outcomes import encode_value
from flame_broker.topology import ledger_queue
from flame_broker.transport import Delivery
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def double(value: int) -> int:
    return value * 2


@dataclass
class Ledger:
    """What clients say to the history."""

    worker: FakeWorker
    words: list[ControlFrame] = field(default_factory=list)

    def hear(self, delivery: Delivery) -> None:
        frame = open_frame(delivery.body, self.worker.keyring, queue=delivery.queue).frame
        if isinstance(frame, ControlFrame):
            self.words.append(frame)
        delivery.ack()


@pytest.fixture
def ledger(worker: FakeWorker) -> Ledger:
    """A ledger queue, and what arrives in it."""
    made = Ledger(worker)

    async def listen() -> None:
        queue = ledger_queue(worker.keyring.signer.hex_id)
        await worker.transport.declare(queue)
        await worker.transport.consume(queue.name, made.hear, prefetch=0)

    worker.run(listen())
    return made


def second_run(worker: FakeWorker, client: flame.Client, *counters: int) -> bytes:
    """Results of another run of these calls, as the client gets them; the frame's signature."""
    reply = worker.frames[0].reply
    payload = encode_value("of another run").join()
    results = tuple(Result(counter, Status.OK, payload) for counter in counters)
    body = encode(ResultFrame(reply, client.id, "other", results), worker.keyring.signer)
    worker.send(None, reply, body=body)
    return identity(body)


def test_a_second_outcome_is_disowned(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker, ledger: Ledger
) -> None:
    first = runner.service(double)(21)
    assert first.get(10) == 42
    mark = second_run(worker, client, first.counter)
    wait_until(lambda: ledger.words != [], 10)
    assert ledger.words[0].verb == "disown"
    assert ledger.words[0].arguments == {
        "client": client.id, "mark": mark, "counters": (first.counter,)
    }  # fmt: skip
    assert first.get(10) == 42


def test_only_what_nobody_waited_for_is_disowned(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker, ledger: Ledger
) -> None:
    service = runner.service(double)
    first = service(1)
    assert first.get(10) == 2
    worker.hold()
    second = service(2)
    wait_until(lambda: len(worker.frames) == 2, 10)
    second_run(worker, client, first.counter, second.counter)
    assert second.get(10) == "of another run"
    worker.release()
    wait_until(lambda: len(ledger.words) == 2, 10)
    assert [word.arguments["counters"] for word in ledger.words] == [
        (first.counter,), (second.counter,)
    ]  # fmt: skip


def test_a_frame_that_comes_again_is_not_disowned(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker, ledger: Ledger
) -> None:
    worker.repeat = 3
    future = runner.service(double)(21)
    assert future.get(10) == 42
    second_run(worker, client, future.counter)  # behind those
    wait_until(lambda: ledger.words != [], 10)
    assert len(ledger.words) == 1
