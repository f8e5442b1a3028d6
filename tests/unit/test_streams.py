"""The items of a generator: whole and in order, however they arrive."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError

import pytest

import flame
from flame_broker.codec import encode_value
from flame_broker.errors import CallCancelled
from flame_broker.messages import Result, ResultFrame, Status
from flame_broker.outcomes import encode_failure
from lab.fake_worker import FakeWorker
from lab.wait import wait_until

LARGE = 100_000


def count_to(limit: int) -> Iterator[int]:
    yield from range(limit)


def letters(*sizes: int) -> Iterator[str]:
    for size in sizes:
        yield "x" * size


async def _next_of(stream: AsyncIterator[object]) -> object:
    return await anext(stream)


class Generator:
    """A call whose worker is the test: it says what arrives, and when."""

    def __init__(self, runner: flame.Runner, worker: FakeWorker) -> None:
        worker.hold()
        self._worker = worker
        self.future = runner.service(count_to)(0)
        wait_until(lambda: worker.frames)

    def send(self, *results: Result) -> None:
        """Let a frame of results arrive."""
        frame = self._worker.frames[0]
        reply = ResultFrame(frame.reply, frame.client, "w", results)
        self._worker.send(reply, frame.reply)


@pytest.fixture
def generator(runner: flame.Runner, worker: FakeWorker) -> Generator:
    return Generator(runner, worker)


def item(index: int, value: object = None) -> Result:
    encoded = encode_value(index if value is None else value).join()
    return Result(1, Status.ITEM, encoded, None, index)


def end(items: int) -> Result:
    return Result(1, Status.OK, encode_value(None).join(), None, items)


def failure(items: int) -> Result:
    return Result(1, Status.FAILED, encode_failure(CallCancelled, "stop"), None, items)


def test_a_generator_is_a_stream_and_a_list(runner: flame.Runner) -> None:
    future = runner.service(count_to)(5)
    assert list(future.stream()) == [0, 1, 2, 3, 4]
    assert future.get(10) == [0, 1, 2, 3, 4]
    assert list(future.stream()) == [0, 1, 2, 3, 4]


def test_a_generator_without_items_is_an_empty_list(generator: Generator) -> None:
    generator.send(Result(1, Status.OK, encode_value([]).join()))
    assert generator.future.get(10) == []
    assert list(generator.future.stream()) == []


@pytest.mark.parametrize("value", [[1, 1], None, {"a": 1}, "x" * LARGE])
def test_a_stream_of_a_call_that_returned_no_generator_says_so(
    runner: flame.Runner, value: object
) -> None:
    future = runner.service(copy.copy)(value)
    with pytest.raises(TypeError, match=r"copy returned .*, not a generator"):
        next(future.stream())
    assert future.get() == value
    with pytest.raises(TypeError, match=f"returned a {type(value).__name__}, not"):
        asyncio.run(_next_of(future.stream()))


def test_stream_items_arrive_before_the_end(generator: Generator) -> None:
    stream = generator.future.stream()
    generator.send(item(0))
    assert next(stream) == 0
    assert generator.future.running()
    generator.send(item(1))
    assert next(stream) == 1
    generator.send(end(2))
    assert next(stream, "end") == "end"
    assert generator.future.get() == [0, 1]


def test_async_for_over_a_stream(runner: flame.Runner) -> None:
    async def main() -> list[int]:
        return [item async for item in runner.service(count_to)(4).stream()]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_a_stream_raises_what_the_call_raised_after_its_items(generator: Generator) -> None:
    generator.send(item(0), failure(1))
    stream = generator.future.stream()
    assert next(stream) == 0
    with pytest.raises(CallCancelled):
        next(stream)


def test_a_stream_is_not_over_before_its_last_item_is_here(generator: Generator) -> None:
    stream = generator.future.stream()
    generator.send(end(2))
    generator.send(item(0))
    assert next(stream) == 0
    assert not generator.future.done()
    generator.send(item(1))
    assert list(stream) == [1]
    assert generator.future.get(10) == [0, 1]


def test_items_come_out_in_their_order_whatever_order_they_come_in(generator: Generator) -> None:
    generator.send(item(3), item(0))
    stream = generator.future.stream()
    assert next(stream) == 0
    generator.send(item(2), end(4))
    generator.send(item(1))
    assert list(stream) == [1, 2, 3]
    assert generator.future.get(10) == [0, 1, 2, 3]


def test_a_failure_waits_for_the_items_before_it(generator: Generator) -> None:
    generator.send(failure(2), item(1))
    generator.send(item(0))
    stream = generator.future.stream()
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(CallCancelled):
        next(stream)


def test_frames_that_arrive_twice_change_nothing(generator: Generator) -> None:
    for _ in range(2):
        generator.send(item(0), item(1))
    for _ in range(2):
        generator.send(item(2), end(3))
    assert generator.future.get(10) == [0, 1, 2]
    assert list(generator.future.stream()) == [0, 1, 2]


def test_of_two_runs_the_item_that_came_first_counts(generator: Generator) -> None:
    generator.send(item(0, "a"), item(1, "a"))
    generator.send(item(0, "b"))
    generator.send(item(3, "a"), item(1, "b"), item(2, "b"), item(3, "b"), end(4))
    assert generator.future.get(10) == ["a", "a", "b", "a"]


def test_items_beyond_the_end_of_the_run_that_ended_are_left_out(generator: Generator) -> None:
    generator.send(item(0), item(1), item(2))
    generator.send(item(0), end(1))
    assert generator.future.get(10) == [0]
    assert list(generator.future.stream()) == [0]


def test_of_two_ends_the_one_whose_items_are_all_here_counts(generator: Generator) -> None:
    generator.send(end(3), item(0), item(2))
    generator.send(end(4))
    generator.send(end(1))
    assert generator.future.get(10) == [0]


def test_a_call_whose_last_item_is_awaited_can_be_cancelled(
    generator: Generator, client: flame.Client
) -> None:
    generator.send(end(2), item(0))
    assert next(generator.future.stream()) == 0
    assert generator.future.cancel()
    generator.send(item(1))
    with pytest.raises(CancelledError):
        generator.future.get(10)
    wait_until(lambda: client.session.courier.pending.window.inside == 0)


def test_large_items_are_fetched_from_the_store(runner: flame.Runner, client: flame.Client) -> None:
    sizes = [LARGE, 3, LARGE + 1]
    future = runner.service(letters)(*sizes)
    assert [len(text) for text in future.stream()] == sizes
    assert [len(text) for text in future.get(10)] == sizes
    assert future.exception() is None
    assert client.get_object(future.ref()) == future.get()
    assert runner.service(len)(future).get(10) == 3


@pytest.mark.parametrize("wrapped", [False, True])
def test_large_items_are_fetched_off_the_event_loop(
    runner: flame.Runner,
    client: flame.Client,
    monkeypatch: pytest.MonkeyPatch,
    *,
    wrapped: bool,
) -> None:
    threads: set[int] = set()
    fetch = client.session.values.get_object

    def watched(ref: flame.ObjectRef) -> object:
        threads.add(threading.get_ident())
        return fetch(ref)

    monkeypatch.setattr(client.session.values, "get_object", watched)

    async def main() -> list[str]:
        future = runner.service(letters)(1, LARGE)
        return await (asyncio.wrap_future(future) if wrapped else future)

    assert [len(text) for text in asyncio.run(main())] == [1, LARGE]
    courier = client.session.courier._thread.ident
    assert threads
    assert not threads & {threading.get_ident(), courier}


def test_a_map_gives_the_items_of_each_generator_as_a_list(runner: flame.Runner) -> None:
    assert list(runner.service(count_to).map(range(4))) == [[], [0], [0, 1], [0, 1, 2]]
    assert list(runner.service(letters).map([2, LARGE])) == [["xx"], ["x" * LARGE]]


def test_a_map_raises_what_a_generator_raised(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    results = runner.service(count_to).map([1, 2])
    wait_until(lambda: worker.frames)
    frame = worker.frames[0]
    reply = ResultFrame(frame.reply, frame.client, "w", (item(0), failure(1)))
    worker.send(reply, frame.reply)
    with pytest.raises(CallCancelled):
        next(results)
    worker.release()
    assert next(results) == [0, 1]
