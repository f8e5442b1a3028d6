"""Ctrl-C leaves a wait at any moment, and leaves what was waited for whole."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

import flame
from flame.waiting import as_they_end, wait_for_all
from lab.fake_worker import FakeWorker


def double(value: int) -> int:
    return value * 2


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """Press Ctrl-C before this step of the bytecode that runs in the block, its calls included."""
    left = count(step, -1)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode" and next(left) == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame at the start
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def steps_of(wait: Callable[[], object]) -> Iterator[int]:
    """Interrupt a wait at each of its steps, until one is not reached before it ends by itself."""
    for step in count():
        try:
            with interrupted(step):
                wait()
        except KeyboardInterrupt:
            yield step
        else:
            return


def test_a_future_settles_wherever_the_wait_for_it_was_left(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(21)
    steps = sum(1 for _ in steps_of(lambda: future.wait(0.001)))
    assert steps > 50
    worker.release()
    later = threading.Thread(target=future.result, args=[10], daemon=True)
    later.start()
    later.join(10)
    assert not later.is_alive(), "its courier stands at a lock that nobody holds any more"
    assert future.result(0) == 42


def test_the_results_of_a_map_come_wherever_the_wait_for_them_was_left(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    results = runner.service(double).map(range(100))
    chunk = results._chunks[0]
    steps = sum(1 for _ in steps_of(lambda: chunk.wait(0.001)))
    assert steps > 20
    worker.release()
    found: list[int] = []
    later = threading.Thread(target=lambda: found.extend(results), daemon=True)
    later.start()
    later.join(10)
    assert not later.is_alive(), "its courier stands at a lock that nobody holds any more"
    assert found == [double(number) for number in range(100)]


def test_many_futures_settle_wherever_the_wait_for_all_of_them_was_left(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    service = runner.service(double)
    done = service(1)
    assert done.result(10) == 2
    worker.hold()
    futures = [done, *(service(number) for number in range(2, 5))]
    steps = sum(1 for _ in steps_of(lambda: wait_for_all(futures, 0.001)))
    steps += sum(1 for _ in steps_of(lambda: next(as_they_end(futures))))
    assert steps > 200
    worker.release()
    found: list[int] = []
    later = threading.Thread(target=lambda: found.extend(f.result() for f in futures), daemon=True)
    later.start()
    later.join(10)
    assert found == [2, 4, 6, 8]
    assert [future.result(0) for future in as_they_end([*futures, *futures])] == found


def test_the_cluster_can_be_asked_wherever_a_question_to_it_was_left(runner: flame.Runner) -> None:
    client = runner.client
    steps = sum(1 for _ in steps_of(lambda: client.workers(0.001)))
    assert steps > 100
    answers: list[object] = []
    later = threading.Thread(target=lambda: answers.append(client.workers(0.1)), daemon=True)
    later.start()
    later.join(10)
    assert answers, "the client's thread stands at a lock that nobody holds any more"
