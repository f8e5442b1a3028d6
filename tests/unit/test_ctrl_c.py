"""Ctrl-C leaves a wait at any moment, and leaves what was waited for whole."""

from __future__ import annotations

import _thread
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

import pytest

import flame
from flame import bell
from flame.waiting import as_they_end, wait_for_all
from lab.fake_worker import FakeWorker
from lab.wait import wait_until


def double(value: int) -> int:
    return value * 2


# Where nothing can be raised, as in the callback of a weak reference, Python only says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextmanager
def interrupted(step: int) -> Iterator[Callable[[], bool]]:
    """Press Ctrl-C before this step of the bytecode that runs in the block, its calls included.

    Yields:
        Says whether the block came so far.
    """
    left = count(step, -1)
    reached = False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal reached
        frame.f_trace_opcodes = True
        if event == "opcode" and next(left) == 0:
            reached = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # whoever listens to it would be interrupted
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame at the start
    sys.settrace(trace)
    try:
        yield lambda: reached
    finally:
        sys.settrace(before)
        gc.enable()


def steps_of(wait: Callable[[], object]) -> Iterator[int]:
    """Interrupt a wait at each of its steps, until one is not reached before it ends by itself."""
    for step in count():
        with suppress(KeyboardInterrupt), interrupted(step) as reached:
            wait()
        if not reached():
            return
        yield step


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


def test_ctrl_c_is_heard_that_comes_when_the_wait_has_looked_for_signals_already(
    runner: flame.Runner, worker: FakeWorker
) -> None:
    worker.hold()
    future = runner.service(double)(21)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: sys._current_frames()[main].f_code is bell.take.__code__)
        _thread.interrupt_main()  # notes the signal, and does not wake the thread
        if not heard.wait(10):
            worker.release()

    heard = threading.Event()
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        future.result()
    heard.set()
    thread.join(10)
    assert not future.done()
