"""Futures and references as arguments, and arguments that are large."""

from __future__ import annotations

import concurrent.futures
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import flame
from flame.arguments import find_futures, replace_futures
from flame_broker.errors import ConfigError, PackagingError
from flame_broker.messages import INLINE_BYTES
from lab.fake_worker import FakeWorker


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Box:
    content: Any
    label: str = ""


class Hidden:
    def __init__(self, content: Any) -> None:
        self.content = content


def double(value: int) -> int:
    return value * 2


def same(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def refuse() -> None:
    raise KeyError("upstream")


def many_bytes(size: int) -> bytes:
    return bytes(size)


def test_futures_are_found_in_containers_and_dataclasses() -> None:
    futures = [concurrent.futures.Future[int]() for _ in range(6)]
    for number, future in enumerate(futures):
        future.set_result(number)
    value = [
        futures[0],
        (1, futures[1]),
        {"key": futures[2]},
        {futures[3]},
        Box(futures[4], "b"),
        Pair(futures[5], 9),
    ]
    assert len(find_futures(value)) == 6
    replaced = replace_futures(value, lambda future: future.result())
    assert replaced == [0, (1, 1), {"key": 2}, {3}, Box(4, "b"), Pair(5, 9)]
    assert type(replaced[5]) is Pair
    assert value[0] is futures[0]


def test_a_value_that_contains_itself_is_searched_once() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert find_futures(loop) == []


def test_a_call_takes_the_result_of_another(runner: flame.Runner) -> None:
    service = runner.service(double)
    assert service(service(service(1))).get(10) == 8


def test_futures_deep_in_arguments_are_resolved(runner: flame.Runner) -> None:
    service = runner.service(double)
    made = runner.service(same)([service(1), {"a": (service(2),)}], key=Box(service(3)))
    assert made.get(10) == (([2, {"a": (4,)}],), {"key": Box(6)})


def test_the_submitter_never_waits_for_an_argument(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    service = runner.service(double)
    before = time.monotonic()
    last = service(service(service(5)))
    assert time.monotonic() - before < 5
    assert not last.done()
    worker.release()
    assert last.get(10) == 40


def test_the_same_future_may_stand_in_several_places(runner: flame.Runner) -> None:
    one = runner.service(double)(4)
    assert runner.service(same)(one, [one, one]).get(10) == ((8, [8, 8]), {})


def test_a_standard_future_is_resolved_too(runner: flame.Runner) -> None:
    plain: concurrent.futures.Future[int] = concurrent.futures.Future()
    future = runner.service(double)(plain)
    plain.set_result(6)
    assert future.get(10) == 12


def test_an_upstream_error_is_the_outcome_downstream(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    slow = runner.service(double)(1)
    failed = runner.service(refuse)()
    future = runner.service(same)([slow, failed])
    worker.release()
    with pytest.raises(KeyError, match="upstream"):
        future.get(10)


def test_an_upstream_cancel_cancels_downstream(runner: flame.Runner, worker: FakeWorker) -> None:
    worker.hold()
    first = runner.service(double)(1)
    second = runner.service(double)(first)
    first.cancel()
    with pytest.raises(CancelledError):
        second.get(10)
    assert second.cancelled()


def test_a_cancelled_call_is_not_sent_when_its_argument_is_ready(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    first = runner.service(double)(1)
    second = runner.service(double)(first)
    assert second.cancel()
    worker.release()
    assert first.get(10) == 2
    assert runner.service(double)(5).get(10) == 10
    assert second.counter not in {call.counter for f in worker.frames for call in f.calls}


def test_a_stored_result_is_passed_on_by_reference(
    runner: flame.Runner,
    client: flame.Client,
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[object] = []
    monkeypatch.setattr(client.session.values, "get_object", fetched.append)
    upstream = runner.service(many_bytes)(100_000)
    assert runner.service(len)(upstream).get(10) == 100_000
    assert fetched == []
    assert [call.refs for call in worker.frames[-1].calls] == [(upstream.ref(),)]


def test_a_reference_is_resolved_by_the_worker(runner: flame.Runner, worker: FakeWorker) -> None:
    ref = runner.put_object([1, 2, 3])
    assert runner.service(same)(ref, key=[ref]).get(10) == (([1, 2, 3],), {"key": [[1, 2, 3]]})
    assert set(worker.frames[-1].calls[0].refs) == {ref}


def test_what_is_stored_twice_is_stored_once(client: flame.Client) -> None:
    assert client.put_object([1, 2]) == client.put_object([1, 2])
    assert client.get_object(client.put_object({"a": (1,)})) == {"a": (1,)}


@pytest.mark.parametrize("size", [INLINE_BYTES + 1, 2_000_000])
def test_large_arguments_go_through_the_store(
    runner: flame.Runner, worker: FakeWorker, size: int
) -> None:
    assert runner.service(len)(bytes(size)).get(10) == size
    call = worker.frames[-1].calls[0]
    assert call.payload == b""
    assert call.refs[0].size > size


def test_arrays_come_back_writable(runner: flame.Runner) -> None:
    numpy = pytest.importorskip("numpy")
    for size in (10, 100_000, 300_000):
        result = runner.service(numpy.arange)(size).get(10)
        result[0] = 7
        assert result[0] == 7
        assert (result[1:] == numpy.arange(1, size)).all()


def test_large_arguments_without_a_store_are_refused_with_advice(
    worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flame.connect(worker.url, key=worker.key_text) as client:

        def none_configured() -> str:
            raise ConfigError("set FLAME_STORE_URL")

        monkeypatch.setattr(client.session.values, "_url", none_configured)
        with pytest.raises(ConfigError, match="FLAME_STORE_URL"):
            flame.Runner(client=client).service(len)(bytes(100_000))


def test_a_future_out_of_reach_is_refused(runner: flame.Runner) -> None:
    service = runner.service(double)
    with pytest.raises(PackagingError, match="lists, tuples, sets, dicts and dataclasses"):
        service(Hidden(service(1)))


def test_large_arguments_may_change_after_the_call(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    data = bytearray(100_000)
    future = runner.service(sum)(data)
    data[0] = 200
    worker.release()
    assert future.get(10) == 0
