"""``service.map``: results in order, input read lazily, memory bounded."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

import flame
from flame_broker.errors import FlameError, PackagingError
from flame_broker.messages import FRAME_CALLS, SHORT_FRAME_CALLS
from lab.fake_worker import FakeWorker
from lab.wait import wait_until

AHEAD = 4096 + FRAME_CALLS


def double(value: int) -> int:
    return value * 2


def add(left: int, right: int) -> int:
    return left + right


def refuse_odd(value: int) -> int:
    if value % 2:
        raise ValueError(value)
    return value


def length(value: bytes) -> int:
    return len(value)


def test_results_come_in_order(runner: flame.Runner) -> None:
    assert list(runner.service(double).map(range(10_000))) == [2 * n for n in range(10_000)]


def test_several_iterables_end_with_the_shortest(runner: flame.Runner) -> None:
    assert list(runner.service(add).map(range(5), itertools.count(10))) == [10, 12, 14, 16, 18]


def test_an_empty_input_gives_nothing(runner: flame.Runner) -> None:
    assert list(runner.service(double).map([])) == []


def test_calls_travel_in_frames_of_up_to_64(runner: flame.Runner, worker: FakeWorker) -> None:
    assert sum(1 for _ in runner.service(double).map(range(5000))) == 5000
    assert max(len(frame.calls) for frame in worker.frames) == FRAME_CALLS
    assert len(worker.frames) < 5000 / 16


def test_short_maps_spread_over_several_frames(runner: flame.Runner, worker: FakeWorker) -> None:
    list(runner.service(double).map(range(8), chunk=1))
    worker.frames.clear()
    list(runner.service(double).map(range(100)))
    assert len(worker.frames) >= 2


def test_a_chunk_limits_the_calls_of_a_frame(runner: flame.Runner) -> None:
    results = runner.service(double).map(range(100), chunk=7)
    assert list(results) == [2 * n for n in range(100)]
    with pytest.raises(ValueError, match="chunk=0"):
        runner.service(double).map(range(3), chunk=0)


def test_input_is_read_a_bounded_way_ahead(runner: flame.Runner, worker: FakeWorker) -> None:
    read = itertools.count()

    def endless() -> Iterator[int]:
        yield from read

    results = runner.service(double).map(endless())
    assert [next(results) for _ in range(100)] == [2 * n for n in range(100)]
    assert next(read) <= AHEAD + 200
    results.close()


def test_a_slow_input_does_not_hold_up_results(runner: flame.Runner) -> None:
    read = 0

    def slow() -> Iterator[int]:
        nonlocal read
        for read in range(1, 201):
            time.sleep(0.02)
            yield read

    with runner.service(double).map(slow()) as results:
        assert [next(results) for _ in range(5)] == [2, 4, 6, 8, 10]
        assert read < 50


def test_a_stalled_worker_stops_the_reading(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    read: list[int] = []
    results = runner.service(double).map(n for n in range(100_000) if not read.append(n))
    assert len(read) <= AHEAD
    worker.release()
    assert sum(1 for _ in results) == 100_000


def heavy(value: int) -> bytes:
    return bytes(60_000)


def test_a_slow_consumer_holds_up_large_results(runner: flame.Runner, worker: FakeWorker) -> None:
    read: list[int] = []
    results = runner.service(heavy).map(n for n in range(5_000) if not read.append(n))
    for taken in range(1, 2_001):
        next(results)
        assert (len(read) - taken) * 60_000 <= 40 * 1024 * 1024
    assert len(read) > 2_000 + FRAME_CALLS


def test_results_that_prove_small_are_read_far_ahead(runner: flame.Runner) -> None:
    read: list[int] = []
    results = runner.service(double).map(n for n in range(50_000) if not read.append(n))
    for _ in range(2_000):
        next(results)
    assert len(read) - 2_000 > 4096 - SHORT_FRAME_CALLS


def test_an_exception_is_raised_at_its_place_and_iterating_goes_on(runner: flame.Runner) -> None:
    results = runner.service(refuse_odd).map(range(4))
    assert next(results) == 0
    with pytest.raises(ValueError, match="1"):
        next(results)
    assert next(results) == 2
    with pytest.raises(ValueError, match="3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_what_the_input_raises_comes_after_the_results_before_it(runner: flame.Runner) -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk")

    results = runner.service(double).map(broken())
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(OSError, match="disk"):
        next(results)


def test_an_item_that_cannot_be_pickled_fails_alone(runner: flame.Runner) -> None:
    results = runner.service(repr).map([1, (n for n in ()), 3])
    assert next(results) == "1"
    with pytest.raises(PackagingError):
        next(results)
    assert next(results) == "3"


def test_large_items_go_through_the_store(runner: flame.Runner, worker: FakeWorker) -> None:
    items = [bytes(70_000 + n) for n in range(5)] + [b"small"]
    assert list(runner.service(length).map(items)) == [*range(70_000, 70_005), 5]


def test_futures_among_the_items_are_resolved(runner: flame.Runner) -> None:
    service = runner.service(double)
    futures = [service(n) for n in range(5)]
    assert list(service.map(futures)) == [4 * n for n in range(5)]


def test_leaving_early_cancels_the_rest(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    with runner.service(double).map(range(500)):
        wait_until(lambda: sum(len(frame.calls) for frame in worker.frames) == 500)
    wait_until(lambda: len(worker.cancelled) == 500)
    pending = runner.client.session.courier.pending
    assert not pending.records
    assert pending.window.inside == 0


@pytest.mark.parametrize("items", [[None, 2, 3, 4], [1, 2, None, 4], [1, 2, 3, None]])
def test_leaving_early_gives_the_room_back_whatever_was_not_sent(
    runner: flame.Runner, worker: FakeWorker, items: list[object]
) -> None:
    service = runner.service(double, autoscale=False, warmup=2)
    worker.hold()
    unpicklable = threading.Lock()
    results = service.map([unpicklable if item is None else item for item in items], chunk=4)
    wait_until(lambda: sum(len(frame.calls) for frame in worker.frames) == 2)
    published = [call.counter for frame in worker.frames for call in frame.calls]
    results.close()
    wait_until(lambda: worker.cancelled == published)
    worker.release()
    assert service(21).result(10) == 42
    assert runner.client.session.courier.pending.window.inside == 0


def test_leaving_early_cancels_items_that_travel_by_themselves(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    service = runner.service(length, autoscale=False)
    worker.hold()
    with service.map([bytes(70_000), bytes(70_001), b"small"]):
        wait_until(lambda: worker.frames)
    wait_until(
        lambda: {*worker.cancelled} == {c.counter for frame in worker.frames for c in frame.calls}
    )
    worker.release()
    assert service(b"four").result(10) == 4
    pending = runner.client.session.courier.pending
    assert not pending.records
    assert pending.window.inside == 0


def test_one_clients_million_leaves_room_for_others_one(
    runner: flame.Runner, client: flame.Client, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    futures = [service(n) for n in range(20_000)]
    window = client.session.courier.pending.window
    wait_until(lambda: window.room <= 0)
    assert sum(len(f.calls) for f in worker.frames) < 2_000
    worker.release()
    assert [f.result(30) for f in futures] == [2 * n for n in range(20_000)]
    assert window.inside == 0


def stop(value: int) -> int:
    raise StopIteration(value)


def test_a_call_that_raises_stop_iteration_does_not_end_the_loop(runner: flame.Runner) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(runner.service(stop).map([1, 2]))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(runner.service(stop)(1).stream())


def test_waiting_for_a_map_inside_a_callback_is_refused(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    caught: list[FlameError] = []
    called = threading.Event()

    def wait_there(_: object) -> None:
        with service.map([1, 2]) as results:
            try:
                next(results)
            except FlameError as exc:
                caught.append(exc)
        called.set()

    service(1).add_done_callback(wait_there)
    worker.release()
    assert called.wait(10)
    assert "done-callback" in str(caught[0])
