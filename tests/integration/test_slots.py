"""A slot runs calls in a child: results, order, revocation, cancels, limits, output, recycling."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flame_broker.codec import encode_arguments, encode_value
from flame_broker.context import current_call
from flame_broker.errors import (
    CallCancelled,
    CallTimeout,
    PackagingError,
    VersionMismatch,
)
from flame_broker.messages import Call, CallSpec, EventKind, Status, Target
from flame_broker.objects import ObjectRef
from flame_worker.limits import private_bytes
from flame_worker.slots import Batch, SpooledResult
from lab.slots import SlotLab, slot_lab
from lab.wait import eventually


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SlotLab]:
    async with slot_lab(tmp_path) as lab:
        yield lab


def hold(path: str) -> str:
    """Runs until the file is gone; says that it has started."""
    Path(path).with_suffix(".started").touch()
    while Path(path).exists():
        time.sleep(0.005)
    return "released"


class Gate:
    """Keeps calls of ``hold`` running until it is opened."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "gate"
        self.path.touch()

    async def reached(self) -> None:
        await eventually(self.path.with_suffix(".started").exists, poll_s=0.005)

    def open(self) -> None:
        self.path.unlink()


def square(number: int) -> int:
    return number * number


def process_id(*_: object) -> int:
    return os.getpid()


async def test_values_come_back_in_order(lab: SlotLab) -> None:
    assert await lab.run(square, *((n,) for n in range(200))) == [n * n for n in range(200)]


async def test_a_target_by_reference_is_imported(lab: SlotLab) -> None:
    assert await lab.call("math:sqrt", 9) == 3.0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no_such_module_here:f", "cannot import the module 'no_such_module_here'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "not a callable"),
    ],
)
async def test_a_target_that_cannot_be_found_fails_every_call_with_the_reason(
    lab: SlotLab, name: str, part: str
) -> None:
    for outcome in await lab.run(name, (1,), (2,)):
        assert isinstance(outcome, PackagingError)
        assert part in str(outcome)


async def test_code_of_another_python_is_refused(lab: SlotLab) -> None:
    batch = lab.batch(square, [(2,)])
    target = batch.spec.target
    old = Target(target.name, target.sha256, target.size, "2.7")
    other = Batch(CallSpec(old), batch.client, batch.calls, batch.target_path)
    lab.slot.give(other)
    await lab.until_ended(other)
    outcome = lab.outcome(batch.calls[0].counter)
    assert isinstance(outcome, VersionMismatch)
    assert "Python 2.7" in str(outcome)


async def test_a_call_that_does_not_start_before_the_slot_is_ready_still_runs(
    tmp_path: Path,
) -> None:
    lab = SlotLab(tmp_path)
    starting = asyncio.ensure_future(lab.slot.start())
    await asyncio.sleep(0)
    assert not lab.slot.ready
    assert await lab.call(square, 3) == 9
    await starting
    await lab.slot.close(grace_s=5)


async def test_results_of_short_calls_do_not_wait_for_a_slow_neighbour(
    lab: SlotLab, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def sometimes_slow(path: str | None) -> None:
        if path:
            hold(path)

    batch = lab.give(sometimes_slow, *[(None,)] * 5, (str(gate.path),), *[(None,)] * 5)
    await gate.reached()
    await eventually(lambda: len(lab.results) == 5, 5)
    gate.open()
    await lab.until_ended(batch)
    assert len(lab.results) == 11


async def test_done_tells_the_time_that_the_child_worked(lab: SlotLab) -> None:
    began = time.monotonic()
    await lab.run(time.sleep, (0.05,), (0.05,))
    assert 0.1 <= lab.seconds <= time.monotonic() - began


async def test_revoke_takes_back_exactly_what_has_not_started(lab: SlotLab, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    running = lab.give(hold, (str(gate.path),))
    first = lab.give(square, (1,), (2,))
    second = lab.give(square, (3,))
    await gate.reached()
    taken = lab.slot.revoke()
    assert [batch for batch, _ in taken] == [first, second]
    assert [list(calls) for _, calls in taken] == [list(first.calls), list(second.calls)]
    assert lab.slot.load == 1
    await lab.until_ended(first, second)
    after = lab.give(square, (5,))
    gate.open()
    await lab.until_ended(running, after)
    assert lab.outcome(after.calls[0].counter) == 25
    assert not {call.counter for call in (*first.calls, *second.calls)} & set(lab.results)


async def test_calls_given_after_a_revocation_are_not_mistaken_for_revoked_ones(
    lab: SlotLab, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    running = lab.give(hold, (str(gate.path),))
    await gate.reached()
    for number in range(20):
        lab.give(square, (number,), (number,))
        assert sum(len(calls) for _, calls in lab.slot.revoke()) == 2
    last = lab.give(square, (7,))
    gate.open()
    await lab.until_ended(running, last)
    assert lab.outcome(last.calls[0].counter) == 49
    assert set(lab.results) == {running.calls[0].counter, last.calls[0].counter}


async def test_revoking_while_calls_run_loses_and_repeats_none(lab: SlotLab) -> None:
    batch = lab.give(square, *((n,) for n in range(2000)))
    revoked: set[int] = set()
    while batch not in lab.ended:
        parts = lab.slot.revoke()
        for part_of, calls in parts:
            assert part_of is batch
            revoked |= {call.counter for call in calls}
        await asyncio.sleep(0)
    assert set(lab.results) | revoked == {call.counter for call in batch.calls}
    assert not set(lab.results) & revoked


async def test_a_large_result_goes_through_the_spool(lab: SlotLab) -> None:
    await lab.run(bytes, (1_000_000,))
    ((result,),) = lab.results.values()
    assert isinstance(result, SpooledResult)
    assert result.path.parent == lab.spool_dir
    assert lab.value(result) == bytes(1_000_000)


async def test_a_spool_that_cannot_be_written_fails_the_call(lab: SlotLab) -> None:
    lab.spool_dir.rmdir()
    outcome = await lab.call(bytes, 1_000_000)
    assert type(outcome).__name__ == "StoreError"
    assert await lab.call(square, 2) == 4


async def test_an_item_that_the_spool_cannot_take_fails_its_call_and_no_other(lab: SlotLab) -> None:
    def texts(*sizes: int) -> Iterator[str]:
        for size in sizes:
            yield "x" * size

    lab.spool_dir.rmdir()
    batch = lab.batch(texts, [(1, 100_000, 1), (2, 3)])
    lab.slot.give(batch)
    await lab.until_ended(batch)
    first, second = (lab.results[call.counter] for call in batch.calls)
    assert [(r.status, r.index) for r in first] == [(Status.ITEM, 0), (Status.FAILED, 1)]
    assert type(lab.outcome(batch.calls[0].counter)).__name__ == "StoreError"
    assert [(r.status, r.index) for r in second] == [
        (Status.ITEM, 0),
        (Status.ITEM, 1),
        (Status.OK, 2),
    ]


async def test_references_are_mapped_from_the_cache(lab: SlotLab) -> None:
    def total(array: Any) -> tuple[float, bool]:
        return float(array.sum()), array.flags.writeable

    numpy = pytest.importorskip("numpy")
    payload = encode_value(numpy.ones(1000)).join()
    ref = ObjectRef("objects/x", len(payload), lab.store(payload))
    batch = lab.batch(total, [(ref,), (ref,)])
    lab.slot.give(batch)
    await lab.until_ended(batch)
    assert [lab.outcome(call.counter) for call in batch.calls] == [(1000.0, False)] * 2


async def test_children_share_the_pages_of_a_large_reference(lab: SlotLab) -> None:
    def own_bytes(array: Any) -> int:
        float(array.sum())
        return os.getpid()

    numpy = pytest.importorskip("numpy")
    assert await lab.call("numpy:zeros", 1) == numpy.zeros(1)
    assert lab.slot.pid is not None
    before = private_bytes(lab.slot.pid)
    payload = encode_value(numpy.ones(8 * 1024 * 1024)).join()
    ref = ObjectRef("objects/x", len(payload), lab.store(payload))
    await lab.run(own_bytes, *[(ref,)] * 8)
    assert private_bytes(lab.slot.pid) - before < 20 * 1024 * 1024


async def test_arguments_too_large_for_a_frame_come_from_the_cache(lab: SlotLab) -> None:
    payload = encode_arguments((b"x" * 100_000,), {}).join()
    ref = ObjectRef("objects/x", len(payload), lab.store(payload))
    batch = lab.batch("builtins:len", [()])
    call = Call(batch.calls[0].counter, b"", (ref,))
    given = Batch(batch.spec, "client", [call])
    lab.slot.give(given)
    await lab.until_ended(given)
    assert lab.outcome(call.counter) == 100_000


async def test_a_missing_reference_is_an_error_of_the_call(lab: SlotLab) -> None:
    ref = ObjectRef("objects/gone", 5, "0" * 64)
    batch = lab.batch("builtins:len", [()])
    given = Batch(batch.spec, "client", [Call(1, b"", (ref,))])
    lab.slot.give(given)
    await lab.until_ended(given)
    assert type(lab.outcome(1)).__name__ == "ObjectNotFound"


async def test_a_generator_is_a_stream_of_items(lab: SlotLab, tmp_path: Path) -> None:
    def numbers(path: str) -> Iterator[int | str]:
        yield 1
        yield 2
        yield hold(path)

    gate = Gate(tmp_path)
    batch = lab.give(numbers, (str(gate.path),))
    counter = batch.calls[0].counter
    await gate.reached()
    await eventually(lambda: len(lab.results.get(counter, ())) == 2, 5)
    gate.open()
    await lab.until_ended(batch)
    *items, last = lab.results[counter]
    assert [(i.index, lab.value(i)) for i in items] == [(0, 1), (1, 2), (2, "released")]
    assert (last.status, last.index) == (Status.OK, 3)


async def test_coroutines_and_async_generators_are_awaited(lab: SlotLab) -> None:
    async def later(number: int) -> int:
        await asyncio.sleep(0.001)
        return number + 1

    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            await asyncio.sleep(0)
            yield number

    assert await lab.run(later, (1,), (2,)) == [2, 3]
    batch = lab.give(count, (3,))
    await lab.until_ended(batch)
    items = [lab.value(r) for r in lab.results[batch.calls[0].counter][:-1]]
    assert items == [0, 1, 2]


async def test_the_current_call_knows_itself(lab: SlotLab) -> None:
    def who() -> tuple[str, int, str]:
        call = current_call()
        assert call is not None
        return call.id, call.attempt, call.worker

    batch = lab.give(who, ())
    await lab.until_ended(batch)
    counter = batch.calls[0].counter
    assert lab.outcome(counter) == (f"client-{counter}", 1, "w1")
    assert current_call() is None


async def test_progress_is_thinned_out_and_the_last_arrives(lab: SlotLab) -> None:
    def report() -> None:
        call = current_call()
        assert call is not None
        for step in range(1000):
            call.progress(step / 999, f"step {step}")

    batch = lab.give(report, ())
    await lab.until_ended(batch)
    seen = lab.progress[batch.calls[0].counter]
    assert seen[-1] == (1.0, "step 999")
    assert len(seen) < 20


async def test_a_soft_timeout_raises_in_the_call(lab: SlotLab) -> None:
    def tidy(seconds: float) -> str:
        try:
            time.sleep(seconds)
        except CallTimeout:
            return "tidied"
        return "slept"

    pid = await lab.call(process_id)
    assert await lab.call(tidy, 30, timeout_s=0.1) == "tidied"
    outcome = await lab.call(time.sleep, 30, timeout_s=0.1)
    assert isinstance(outcome, CallTimeout)
    assert "0.1 s" in str(outcome)
    assert await lab.call(process_id) == pid


async def test_a_timeout_counts_for_each_call_of_a_batch(lab: SlotLab) -> None:
    outcomes = await lab.run(time.sleep, *[(0.06,)] * 5, timeout_s=0.2)
    assert outcomes == [None] * 5


async def test_a_stream_times_out_between_items_too(lab: SlotLab) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    batch = lab.give(endless, (), timeout_s=0.1)
    await lab.until_ended(batch)
    last = lab.results[batch.calls[0].counter][-1]
    assert isinstance(lab.value(last), CallTimeout)


async def test_the_hard_timeout_kills_and_names_the_call_only(lab: SlotLab) -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(30)
            except CallTimeout:
                continue

    pid = await lab.call(process_id)
    batch = lab.give(stubborn, (), (), timeout_s=0.1, grace_s=0.1)
    await lab.until_ended(batch)
    (lost,) = lab.lost
    assert lost.reason is CallTimeout
    assert lost.running == (batch, batch.calls[0].counter)
    assert lost.unstarted == [(batch, batch.calls[1].counter)]
    assert await lab.call(process_id) != pid


async def test_cancelling_a_running_call_interrupts_it_and_no_other(
    lab: SlotLab, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    batch = lab.give(hold, (str(gate.path),))
    after = lab.give(square, (3,))
    await gate.reached()
    assert lab.slot.cancel("client", batch.calls[0].counter)
    await lab.until_ended(batch, after)
    assert isinstance(lab.outcome(batch.calls[0].counter), CallCancelled)
    assert lab.outcome(after.calls[0].counter) == 9
    assert not lab.lost


async def test_cancelling_a_waiting_call_leaves_its_neighbours(
    lab: SlotLab, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    running = lab.give(hold, (str(gate.path),))
    batch = lab.give(square, (1,), (2,), (3,))
    await gate.reached()
    assert lab.slot.cancel("client", batch.calls[1].counter)
    assert not lab.slot.cancel("another", batch.calls[0].counter)
    gate.open()
    await lab.until_ended(running, batch)
    one, cancelled, three = (lab.outcome(call.counter) for call in batch.calls)
    assert (one, three) == (1, 9)
    assert isinstance(cancelled, CallCancelled)


async def test_a_cancel_that_comes_too_late_hits_nobody(lab: SlotLab) -> None:
    batch = lab.give(square, *((n,) for n in range(500)))
    for call in batch.calls:
        lab.slot.cancel("client", call.counter)
        await asyncio.sleep(0)
    await lab.until_ended(batch)
    for number, call in enumerate(batch.calls):
        outcome = lab.outcome(call.counter)
        assert outcome == number * number or isinstance(outcome, CallCancelled)
    assert not lab.lost


async def test_output_belongs_to_the_call_that_wrote_it(lab: SlotLab) -> None:
    def say(word: str) -> None:
        import sys

        print(word)
        print(word, "aloud", file=sys.stderr)
        print("no newline", end="")

    batch = lab.give(say, *((f"word {n}",) for n in range(50)))
    await lab.until_ended(batch)
    for number, call in enumerate(batch.calls):
        assert lab.lines(call.counter) == [f"word {number}", "no newline"]
        assert lab.lines(call.counter, EventKind.STDERR) == [f"word {number} aloud"]


async def test_output_of_subprocesses_belongs_to_the_call_that_runs(lab: SlotLab) -> None:
    def shell() -> None:
        import subprocess

        subprocess.run(["echo", "from a subprocess"], check=True)

    batch = lab.give(shell, ())
    await lab.until_ended(batch)
    counter = batch.calls[0].counter
    await eventually(lambda: lab.lines(counter) == ["from a subprocess"], 5)


async def test_output_arrives_while_the_call_still_runs(lab: SlotLab, tmp_path: Path) -> None:
    def speak_and_wait(path: str) -> None:
        print("early")
        hold(path)

    gate = Gate(tmp_path)
    batch = lab.give(speak_and_wait, (str(gate.path),))
    await eventually(lambda: lab.lines(batch.calls[0].counter) == ["early"], 5)
    gate.open()
    await lab.until_ended(batch)


async def test_a_child_is_replaced_after_its_calls_without_losing_one(tmp_path: Path) -> None:
    async with slot_lab(tmp_path, recycle_after_calls=50) as lab:
        batches = []
        for _ in range(40):
            batches.append(lab.give(process_id, *[(n,) for n in range(10)]))
            await lab.until_ended(*batches[:-2])
        await lab.until_ended(*batches)
        pids = {lab.outcome(call.counter) for batch in batches for call in batch.calls}
        assert len(pids) >= 2
        assert None not in pids
        assert not lab.lost


async def test_a_child_that_grew_is_replaced(tmp_path: Path) -> None:
    def grow(size: int) -> int:
        import builtins

        builtins.hoard = bytearray(size)  # type: ignore[attr-defined]
        return os.getpid()

    async with slot_lab(tmp_path, recycle_over_bytes=100 * 1024 * 1024) as lab:
        small = await lab.call(grow, 1)
        big = await lab.call(grow, 200 * 1024 * 1024)
        assert big == small

        async def replaced() -> bool:
            return bool(await lab.call(process_id) != big)

        await eventually(replaced, 10, poll_s=0.1)
        assert not lab.lost


async def test_a_child_dies_with_its_subprocesses_when_the_slot_closes(tmp_path: Path) -> None:
    def leave_behind() -> int:
        import subprocess

        return subprocess.Popen(["sleep", "1000"]).pid

    async with slot_lab(tmp_path) as lab:
        pid = await lab.call(leave_behind)
        child = lab.slot.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{child}").exists()
    await eventually(lambda: _is_dead(pid), 5)


def _is_dead(pid: int) -> bool:
    """Gone, or a zombie that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux only")
async def test_a_child_is_the_first_to_go_when_memory_runs_out(lab: SlotLab) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    child = Path(f"/proc/{lab.slot.pid}/oom_score_adj")
    assert own < int(child.read_text()) == 1000
    assert await lab.call("os:system", "test $(cat /proc/self/oom_score_adj) = 1000") == 0


async def test_an_interpreter_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    lab = SlotLab(tmp_path, python="/no/such/python")
    with pytest.raises(Exception, match="no child could be started"):
        await lab.slot.start()


async def test_gpus_and_secrets_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_KEY", "secret")
    async with slot_lab(tmp_path, gpus=("GPU-a", "GPU-b"), environ={"OMP_NUM_THREADS": "1"}) as lab:
        names = ("CUDA_VISIBLE_DEVICES", "FLAME_KEY", "OMP_NUM_THREADS")
        assert await lab.run(os.getenv, *((name,) for name in names)) == ["GPU-a,GPU-b", None, "1"]


async def test_an_idle_child_is_small_and_imports_nothing_heavy(tmp_path: Path) -> None:
    async with slot_lab(tmp_path) as lab:
        assert lab.slot.pid is not None
        assert private_bytes(lab.slot.pid) < 45 * 1024 * 1024
        modules = await lab.call(lambda: sorted(__import__("sys").modules))
    heavy = {"asyncio", "pydantic", "boto3", "pika", "structlog", "numpy", "psutil"}
    assert not heavy & set(modules)
