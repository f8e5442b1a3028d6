"""A call's future is a standard future, and more."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import pickle
import threading
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    InvalidStateError,
)

import pytest

import flame
from flame.futures import ObjectFuture
from flame_broker.errors import (
    BrokerUnavailable,
    CallCancelled,
    CallExpired,
    FlameError,
    PackagingError,
    RemoteError,
)
from flame_broker.messages import Call, EventKind, Result, ResultFrame, Status
from flame_broker.outcomes import encode_failure
from flame_broker.transport import QueueSpec
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


class Odd(Exception):
    """An exception of the user's."""


def double(value: int) -> int:
    return value * 2


def refuse(value: object) -> None:
    raise Odd(value)


def many_bytes(size: int) -> bytes:
    return bytes(size)


def test_a_call_gives_its_result(runner: flame.Runner) -> None:
    future = runner.service(double)(21)
    assert future.result(10) == 42
    assert future.get() == 42
    assert future.done()
    assert not future.cancelled()
    assert not future.running()
    assert future.exception() is None


def test_the_result_is_one_object_whoever_asks(runner: flame.Runner) -> None:
    future = runner.service(sorted)([2, 1])
    assert future.result(10) is future.result() is future.get()


def test_the_users_exception_is_raised_with_the_remote_traceback(runner: flame.Runner) -> None:
    future = runner.service(refuse)("no")
    with pytest.raises(Odd, match="no") as caught:
        future.get(10)
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteError)
    assert "in refuse" in cause.traceback
    assert cause.call_id == future.id
    assert isinstance(future.exception(), Odd)


def test_waiting_too_long_raises_the_standard_timeout(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    with pytest.raises(TimeoutError):
        future.get(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0.01)
    assert not future.wait(0.01)
    worker.release()
    assert future.wait(10)
    assert future.get(10) == 2


def test_done_callbacks_are_called_once_each_before_and_after_the_end(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    seen: list[str] = []
    late = threading.Event()
    future.add_done_callback(lambda _: seen.append("first"))
    future.add_done_callback(lambda f: (seen.append(f"second {f.result()}"), late.set()))
    worker.release()
    assert late.wait(10)
    future.add_done_callback(lambda _: seen.append("third"))
    assert seen == ["first", "second 2", "third"]


def test_wait_and_as_completed_take_our_futures(runner: flame.Runner) -> None:
    service = runner.service(double)
    futures = [service(n) for n in range(100)]
    done, not_done = concurrent.futures.wait(futures, 10, ALL_COMPLETED)
    assert len(done) == 100
    assert not not_done
    seen = {f.result() for f in concurrent.futures.as_completed(futures, 10)}
    assert seen == {2 * n for n in range(100)}


def test_wait_returns_at_the_first_exception(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    bad, never = runner.service(refuse)("x"), runner.service(double)
    held = concurrent.futures.Future[int]()
    threading.Timer(0.05, worker.release).start()
    done, not_done = concurrent.futures.wait([bad, held], 10, FIRST_EXCEPTION)
    assert done == {bad}
    assert not_done == {held}
    assert never(2).result(10) == 4


def test_wait_returns_when_a_future_is_cancelled(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    first, second = (runner.service(double)(n) for n in (1, 2))
    threading.Timer(0.05, first.cancel).start()
    done, not_done = concurrent.futures.wait([first, second], 10, FIRST_COMPLETED)
    assert (done, not_done) == ({first}, {second})


def test_cancel_ends_the_future_at_once_and_tells_the_workers(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    wait_until(lambda: worker.frames)
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    with pytest.raises(CancelledError):
        future.get(10)
    with pytest.raises(CancelledError):
        future.exception(10)
    wait_until(lambda: future.counter in worker.cancelled)
    assert future.cancel()


def test_a_late_result_of_a_cancelled_call_is_dropped(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    future = service(1)
    wait_until(lambda: worker.frames)
    frame = worker.frames[0]
    assert future.cancel()
    late = ResultFrame(frame.reply, frame.client, "fake", (Result(1, Status.OK, b"\x00\x01"),))
    worker.send(late, frame.reply)
    worker.release()
    assert service(2).get(10) == 4
    assert future.cancelled()


def test_a_finished_future_cannot_be_cancelled(runner: flame.Runner) -> None:
    future = runner.service(double)(1)
    future.result(10)
    assert not future.cancel()
    assert not future.cancelled()


def test_the_first_of_repeated_results_wins(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.repeat = 3
    service = runner.service(double)
    assert [f.get(10) for f in [service(n) for n in range(50)]] == [2 * n for n in range(50)]
    assert service(7).get(10) == 14


def test_results_with_a_wrong_signature_are_dropped_and_counted(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    future = service(1)
    wait_until(lambda: worker.frames)
    reply = worker.frames[0].reply
    worker.send(None, reply, body=b"FLM\x01" + worker.keyring.signer.id + bytes(40))
    worker.send(None, reply, body=b"rubbish")
    worker.release()
    assert future.get(10) == 2
    refused = client.session.courier.answers.refused
    assert refused == {"SignatureError": 1, "MalformedMessage": 1}


def test_a_failure_of_the_system_is_its_own_error_and_names_the_function(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    wait_until(lambda: worker.frames)
    frame = worker.frames[0]
    payload = encode_failure(CallExpired, "too late")
    failed = ResultFrame(frame.reply, frame.client, "w", (Result(1, Status.FAILED, payload),))
    worker.send(failed, frame.reply)
    with pytest.raises(CallExpired, match=r"^double: too late$") as caught:
        future.get(10)
    assert caught.value.call_id == future.id


def test_await_gives_the_result(runner: flame.Runner) -> None:
    async def main() -> tuple[int, list[int]]:
        service = runner.service(double)
        return await service(4), await asyncio.gather(*(service(n) for n in range(3)))

    assert asyncio.run(main()) == (8, [0, 2, 4])


def test_await_fetches_a_large_result_in_another_thread(
    runner: flame.Runner, client: flame.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    fetch = client.session.values.get_object

    def watched(ref: flame.ObjectRef) -> object:
        threads.add(threading.get_ident())
        return fetch(ref)

    monkeypatch.setattr(client.session.values, "get_object", watched)

    async def main() -> int:
        service = runner.service(many_bytes)
        size = len(await service(100_000))
        return size + len(await asyncio.wrap_future(service(100_001)))

    assert asyncio.run(main()) == 200_001
    assert threads
    assert threading.get_ident() not in threads


def test_cancelling_a_task_cancels_the_call_it_awaits(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()

    async def main() -> ObjectFuture[int]:
        future = runner.service(double)(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await future
        return future

    assert asyncio.run(main()).cancelled()


def test_wrap_future_follows_result_exception_and_cancel(runner: flame.Runner) -> None:
    async def main() -> None:
        assert await asyncio.wrap_future(runner.service(double)(3)) == 6
        with pytest.raises(Odd):
            await asyncio.wrap_future(runner.service(refuse)(3))

    asyncio.run(main())


def test_a_large_result_is_not_fetched_before_it_is_asked_for(
    runner: flame.Runner, client: flame.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[flame.ObjectRef] = []
    fetch = client.session.values.get_object
    monkeypatch.setattr(
        client.session.values, "get_object", lambda ref: (fetched.append(ref), fetch(ref))[1]
    )
    future = runner.service(many_bytes)(100_000)
    assert future.wait(10)
    assert future.exception() is None
    ref = future.ref()
    assert not fetched
    assert future.get() == bytes(100_000)
    assert fetched == [ref]
    assert client.get_object(ref) == bytes(100_000)


def test_the_reference_of_a_small_result_can_be_had(
    runner: flame.Runner, client: flame.Client
) -> None:
    future = runner.service(double)(21)
    assert client.get_object(future.ref()) == 42
    assert future.get() == 42
    assert client.get_object(future.ref()) == 42


def test_a_failed_call_has_no_reference(runner: flame.Runner) -> None:
    with pytest.raises(Odd):
        runner.service(refuse)(1).ref()


def test_progress_and_output_reach_the_future(
    runner: flame.Runner, worker: FakeWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    wait_until(lambda: worker.frames)
    frame = worker.frames[0]
    worker.say(frame, EventKind.PROGRESS, "half", 0.5)
    worker.say(frame, EventKind.STDOUT, "hello")
    wait_until(lambda: future.logs() == ["hello"])
    assert future.progress == (0.5, "half")
    assert future.running()
    out = wait_until(lambda: capfd.readouterr().out)
    assert out == "[double] hello\n"
    worker.release()
    future.get(10)
    assert future.progress[0] == 1.0


def test_a_future_is_not_pickled_or_copied(runner: flame.Runner) -> None:
    future = runner.service(double)(1)
    with pytest.raises(TypeError, match="cannot be sent"):
        pickle.dumps(future)
    with pytest.raises(TypeError):
        copy.copy(future)


def test_its_repr_names_call_and_state(runner: flame.Runner) -> None:
    future = runner.service(double)(1)
    future.result(10)
    assert repr(future) == f"<ObjectFuture {future.id} of double: finished>"


def test_waiting_inside_a_callback_is_refused(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    service = runner.service(double)
    first, second = service(1), service(2)
    caught: list[BaseException] = []
    called = threading.Event()

    def wait_there(_: object) -> None:
        other = service(3)
        try:
            other.result()
        except FlameError as exc:
            caught.append(exc)
        called.set()

    first.add_done_callback(wait_there)
    worker.release()
    assert called.wait(10)
    assert second.result(10) == 4
    assert "done-callback" in str(caught[0])


def test_closing_the_client_ends_what_is_pending(client: flame.Client, worker: FakeWorker) -> None:
    worker.hold()
    future = flame.Runner(client=client).service(double)(1)
    client.close()
    with pytest.raises(CallCancelled):
        future.get(10)
    with pytest.raises(FlameError, match="closed"):
        flame.Runner(client=client).service(double)(1)


def test_an_absent_broker_fails_connect_with_a_typed_error(tmp_path: object) -> None:
    with pytest.raises(BrokerUnavailable):
        flame.connect("amqp://127.0.0.1:9/", key="k" * 40)


def test_arguments_that_cannot_be_pickled_are_refused_at_the_call(runner: flame.Runner) -> None:
    service = runner.service(double)
    with pytest.raises(PackagingError, match=r"argument 2 of double .*lock"):
        service(1, threading.Lock())
    with pytest.raises(PackagingError, match=r"argument value of double .*lock"):
        service(value=threading.Lock())
    with pytest.raises(PackagingError, match=r"argument 1 of double .*lock"):
        next(service.map([threading.Lock()]))


def test_a_reply_queue_that_cannot_be_had_again_is_replaced_by_the_next_epochs(
    runner: flame.Runner,
    client: flame.Client,
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = runner.service(double)
    assert service(1).get(10) == 2
    first = worker.frames[-1].reply
    courier = client.session.courier
    declare = courier._transport.declare

    async def refuse_the_first(*queues: QueueSpec) -> None:
        if any(queue.name == first for queue in queues):
            raise FlameError("expired")
        await declare(*queues)

    monkeypatch.setattr(courier._transport, "declare", refuse_the_first)
    courier._loop.call_soon_threadsafe(courier._transport.on_reconnect)
    wait_until(lambda: courier._sender.reply != first)
    assert service(2).get(10) == 4
    assert worker.frames[-1].reply == first.removesuffix("0") + "1"


def test_a_test_may_set_the_outcome_once(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    first, second = (runner.service(double)(n) for n in (1, 2))
    assert first.set_running_or_notify_cancel()
    first.set_result(7)
    second.set_exception(Odd("set"))
    assert first.result(1) == 7
    with pytest.raises(Odd, match="set"):
        second.result(1)
    with pytest.raises(InvalidStateError):
        first.set_result(8)
    worker.release()
    assert runner.service(double)(3).get(10) == 6
    assert first.get() == 7


@pytest.mark.parametrize("end", ["settle", "fail", "cancel"])
def test_the_state_does_not_change_while_somebody_holds_the_condition(
    runner: flame.Runner, worker: FakeWorker, end: str
) -> None:
    worker.hold()
    future = runner.service(double)(1)
    ends = {
        "settle": lambda: future.settle(Result(future.counter, Status.OK, b"")),
        "fail": lambda: future.fail_call(future.counter, Odd()),
        "cancel": future.settle_cancelled,
    }
    with future._condition:  # as wait() and as_completed() do while they look at several futures
        ending = threading.Thread(target=ends[end])
        ending.start()
        ending.join(0.2)
        assert not future.done()
    ending.join(10)
    assert future.done()


def test_a_callback_that_calls_exit_does_not_end_the_client(runner: flame.Runner) -> None:
    service = runner.service(double)
    called = threading.Event()

    def leave(_: object) -> None:
        called.set()
        raise SystemExit(3)

    service(1).add_done_callback(leave)
    assert called.wait(10)
    assert service(2).result(10) == 4


def test_a_callback_may_look_whether_another_future_is_done(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    first = service(1)
    caught: list[BaseException] = []
    called = threading.Event()

    def look(_: object) -> None:
        try:
            service(2).result(0)
        except TimeoutError as exc:
            caught.append(exc)
        called.set()

    first.add_done_callback(look)
    worker.release()
    assert called.wait(10)
    assert caught


def test_a_client_refuses_to_be_closed_inside_a_callback_and_works_on(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = flame.Runner(client=client).service(double)
    caught: list[FlameError] = []
    called = threading.Event()

    def close_there(_: object) -> None:
        try:
            client.close()
        except FlameError as exc:
            caught.append(exc)
        called.set()

    service(1).add_done_callback(close_there)
    worker.release()
    assert called.wait(10)
    assert "done-callback" in str(caught[0])
    assert service(2).result(10) == 4


def test_a_call_that_comes_while_the_client_closes_is_refused(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = flame.Runner(client=client).service(double)
    pending = [service(n) for n in range(2000)]  # more than the window: the lane stays busy
    wait_until(lambda: client.session.courier.pending.window.room <= 0)
    courier, (_, lane) = client.session.courier, service._caller.board()
    client.close()
    late: list[Call] = [Call(10_000, b""), Call(10_001, b"")]
    for call in late:
        courier.pending.records[call.counter] = pending[0]
    with pytest.raises(FlameError, match="closed"):
        courier.submit(lane, late[0])
    with pytest.raises(FlameError, match="closed"):
        courier.submit_all(lane, late[1:])
    assert not courier.pending.records
