"""``flame.Executor`` does what the documentation of ``concurrent.futures`` says of executors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

import flame
from flame_broker.errors import ConfigError, FlameError, PackagingError
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def square(value: int) -> int:
    return value * value


def fail(message: str) -> None:
    raise ZeroDivisionError(message)


def gather(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.fixture
def executor(client: flame.Client) -> Iterator[flame.Executor]:
    with flame.Executor(client=client) as made:
        yield made


def test_it_is_an_executor(executor: flame.Executor) -> None:
    assert isinstance(executor, concurrent.futures.Executor)


def test_submit_passes_arguments_and_keywords(executor: flame.Executor) -> None:
    future = executor.submit(gather, 1, fn=2, self=3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(10) == ((1,), {"fn": 2, "self": 3})


def test_an_exception_is_raised_by_result_and_returned_by_exception(
    executor: flame.Executor,
) -> None:
    future = executor.submit(fail, "x")
    with pytest.raises(ZeroDivisionError, match="x"):
        future.result(10)
    assert isinstance(future.exception(), ZeroDivisionError)


def test_map_gives_results_in_order(executor: flame.Executor) -> None:
    assert list(executor.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(executor.map(square, range(10), chunksize=3)) == [n * n for n in range(10)]


def test_map_raises_an_exception_when_its_value_is_retrieved(executor: flame.Executor) -> None:
    results = executor.map(divmod, [1, 1, 1], [2, 3, 0])
    assert next(results) == (0, 1)
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_raises_timeout_counted_from_the_call(
    executor: flame.Executor, worker: FakeWorker
) -> None:
    worker.hold()
    results = executor.map(square, [1, 2], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)


def test_map_collects_its_input_at_once(executor: flame.Executor) -> None:
    numbers = iter(range(5))
    executor.map(square, numbers)
    assert next(numbers, None) is None


def test_map_with_a_buffer_reads_its_input_only_so_far_ahead(executor: flame.Executor) -> None:
    read: list[int] = []
    results = executor.map(square, (n for n in range(20) if not read.append(n)), buffersize=3)
    assert len(read) == 3
    assert [next(results), next(results)] == [0, 1]
    assert len(read) == 5
    assert list(results) == [n * n for n in range(2, 20)]


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (1.5, TypeError)])
def test_a_buffer_of_no_size_is_refused(
    executor: flame.Executor, wrong: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="buffersize"):
        executor.map(square, [1], buffersize=wrong)


def test_leaving_a_map_early_cancels_what_was_not_read(
    executor: flame.Executor, worker: FakeWorker
) -> None:
    results = executor.map(square, range(3))
    assert next(results) == 0
    worker.hold()
    more = executor.map(square, [7, 8], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(more)
    wait_until(lambda: len(worker.cancelled) == 2)
    assert list(results) == [1, 4]


def test_submit_after_shutdown_is_refused(client: flame.Client) -> None:
    executor = flame.Executor(client=client)
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    with pytest.raises(RuntimeError):
        executor.map(square, [1])


def test_leaving_the_with_block_waits_for_all(client: flame.Client, worker: FakeWorker) -> None:
    worker.hold()
    threading.Timer(0.1, worker.release).start()
    with flame.Executor(client=client) as executor:
        futures = [executor.submit(square, n) for n in range(10)]
        assert not futures[0].done()
    assert all(future.done() for future in futures)


def test_shutdown_without_waiting_returns_at_once_and_calls_go_on(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    executor = flame.Executor(client=client)
    future = executor.submit(square, 3)
    before = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - before < 5
    assert not future.done()
    worker.release()
    assert future.result(10) == 9


def test_shutdown_can_cancel_what_waits(client: flame.Client, worker: FakeWorker) -> None:
    worker.hold()
    executor = flame.Executor(client=client)
    futures = [executor.submit(square, n) for n in range(100)]
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    wait_until(lambda: not client.session.courier.pending.window.inside)
    with pytest.raises(CancelledError):
        futures[0].result()


def test_max_workers_must_be_positive(client: flame.Client) -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_workers"):
            flame.Executor(wrong, client=client)


def test_an_option_that_does_not_exist_is_refused(client: flame.Client) -> None:
    with pytest.raises(TypeError, match=r"'tiemout'.*queue_timeout"):
        flame.Executor(client=client, tiemout=3)  # type: ignore[call-arg]


def test_max_workers_limits_the_calls_on_their_way(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    executor = flame.Executor(3, client=client)
    futures = [executor.submit(square, n) for n in range(20)]
    futures += [executor.submit(gather, n) for n in range(20)]
    wait_until(lambda: sum(len(f.calls) for f in worker.frames) == 3)
    futures[10].cancel()
    assert not worker.run(asyncio.sleep(0.05))
    assert sum(len(f.calls) for f in worker.frames) == 3
    worker.release()
    done, not_done = concurrent.futures.wait(futures, 20)
    assert len(done) == 40
    assert not not_done
    executor.shutdown()


def test_a_function_is_sent_once(executor: flame.Executor, worker: FakeWorker) -> None:
    futures = [executor.submit(square, n) for n in range(2000)]
    assert [f.result(20) for f in futures] == [n * n for n in range(2000)]
    assert len({frame.spec.target for frame in worker.frames}) == 1


def test_arguments_that_cannot_be_pickled_fail_through_the_future(
    executor: flame.Executor,
) -> None:
    future = executor.submit(square, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(PackagingError):
        future.result(10)


def test_a_class_can_be_called_too(executor: flame.Executor) -> None:
    assert executor.submit(int, "7").result(10) == 7


def test_service_options_apply(client: flame.Client, worker: FakeWorker) -> None:
    with flame.Executor(client=client, timeout=5, priority="high") as executor:
        executor.submit(square, 1).result(10)
    frame = worker.frames[-1]
    assert frame.spec.timeout_s == 5
    assert frame.queue.endswith(".high")
    with pytest.raises(ConfigError):
        flame.Executor(client=client, delivery="at_most_once", retry=flame.Retry())


def test_run_in_executor_of_asyncio(executor: flame.Executor) -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(executor, square, 6)

    assert asyncio.run(main()) == 36


def test_as_completed_over_several_executors(
    executor: flame.Executor,
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        futures = [executor.submit(square, 2), other.submit(square, 3)]
        results = {future.result() for future in concurrent.futures.as_completed(futures, 10)}
    assert results == {4, 9}


def test_waiting_for_a_shutdown_inside_a_callback_is_refused(
    client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    executor = flame.Executor(client=client)
    outcomes: list[object] = []
    called = threading.Event()

    def shut_down(_: object) -> None:
        outcomes.append(executor.submit(square, 2))
        try:
            executor.shutdown()
        except FlameError as exc:
            outcomes.append(exc)
        outcomes.append(executor.submit(square, 3))  # nothing was shut down
        executor.shutdown(wait=False)
        called.set()

    executor.submit(square, 1).add_done_callback(shut_down)
    worker.release()
    assert called.wait(10)
    before, refused, after = outcomes
    assert "shutdown(wait=False)" in str(refused)
    assert isinstance(before, flame.ObjectFuture)
    assert isinstance(after, flame.ObjectFuture)
    assert [before.result(10), after.result(10)] == [4, 9]
    executor.shutdown()


def test_a_shutdown_with_nothing_to_wait_for_may_happen_inside_a_callback(
    client: flame.Client,
) -> None:
    executor = flame.Executor(client=client)
    called = threading.Event()
    future = executor.submit(square, 1)
    future.add_done_callback(lambda _: (executor.shutdown(), called.set()))
    assert called.wait(10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)
