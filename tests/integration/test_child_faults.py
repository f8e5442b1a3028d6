"""Whatever a call does to its process: a clear outcome, and the next call works."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from flame_broker.errors import CallCancelled, OutOfMemory, PackagingError, StoreError, WorkerLost
from flame_broker.messages import EventKind
from flame_worker import process
from flame_worker.slots import Batch
from lab.slots import SlotLab, slot_lab
from lab.wait import eventually


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SlotLab]:
    async with slot_lab(tmp_path) as lab:
        yield lab


def square(number: int) -> int:
    return number * number


def first_is_fatal(number: int, die: Callable[[], object]) -> int:
    if number == 1:
        die()
    return number


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> NoReturn:
    os._exit(3)


def crash() -> None:
    import ctypes

    ctypes.string_at(0)


def close_everything() -> None:
    os.closerange(3, 4096)


def scribble_on_the_pipes() -> None:
    for descriptor in range(3, 300):
        try:
            os.write(descriptor, b"\xc1 this is no record \xc1")
        except OSError:
            continue
    time.sleep(30)


@pytest.mark.parametrize(
    ("die", "message"),
    [
        (kill_myself, "killed by SIGKILL"),
        (leave, "exited by itself with code 3"),
        (crash, "killed by SIGSEGV"),
        (close_everything, "closed the file descriptors"),
        (scribble_on_the_pipes, "killed by SIGKILL"),
    ],
)
async def test_a_death_costs_one_call_and_says_why(
    lab: SlotLab, die: Callable[[], object], message: str
) -> None:
    batch = lab.give(first_is_fatal, *((number, die) for number in range(4)))
    behind = lab.give(square, (5,))
    await lab.until_ended(batch, behind)
    (lost,) = lab.lost
    assert lost.reason is WorkerLost
    assert message in lost.message
    assert lost.running == (batch, batch.calls[1].counter)
    assert lost.unsent == []
    left = [(batch, call.counter) for call in batch.calls[2:]]
    assert lost.unstarted == [*left, (behind, behind.calls[0].counter)]
    assert lab.outcome(batch.calls[0].counter) == 0
    assert lab.slot.idle
    assert await lab.call(square, 3) == 9


async def test_a_crash_tells_where_it_happened(lab: SlotLab) -> None:
    batch = lab.give(crash, ())
    await lab.until_ended(batch)
    assert "in crash" in lab.lost[0].message


async def test_last_words_are_cut_to_a_few_kilobytes_and_the_end_is_kept(lab: SlotLab) -> None:
    def babble_and_crash() -> None:
        os.write(2, b"\xff" * 3_000_000 + b"\n")
        crash()

    batch = lab.give(babble_and_crash, ())
    await lab.until_ended(batch)
    message = lab.lost[0].message
    assert len(message.encode()) < 10 * 1024
    assert message.startswith("the process that ran the call was killed by SIGSEGV")
    assert "in babble_and_crash" in message


async def test_a_kill_from_outside_between_two_calls_blames_nobody(lab: SlotLab) -> None:
    assert await lab.call(square, 2) == 4
    assert lab.slot.pid is not None
    os.kill(lab.slot.pid, signal.SIGKILL)
    await eventually(lambda: bool(lab.lost), 5)
    assert lab.lost[0].running is None
    assert await lab.call(square, 3) == 9


async def test_a_child_that_dies_again_and_again_is_started_again_and_again(lab: SlotLab) -> None:
    for _ in range(5):
        await lab.until_ended(lab.give(kill_myself, ()))
    assert await lab.call(square, 3) == 9
    assert len(lab.lost) == 5
    assert lab.children == 6


async def test_sys_exit_is_an_error_of_the_call(lab: SlotLab) -> None:
    assert isinstance(await lab.call(sys.exit, 5), SystemExit)
    assert not lab.lost


async def test_an_exception_arrives_as_itself_with_its_traceback(lab: SlotLab) -> None:
    def fail() -> None:
        raise KeyError("what is missing")

    outcome = await lab.call(fail)
    assert isinstance(outcome, KeyError)
    assert outcome.args == ("what is missing",)
    assert "in fail" in str(outcome.__cause__)
    assert "child.py" not in str(outcome.__cause__)


async def test_a_forked_copy_does_not_answer_for_the_child(lab: SlotLab) -> None:
    def fork_and_return() -> str:
        return "the copy" if os.fork() == 0 else "the call"

    def fork_and_raise() -> str:
        if os.fork() == 0:
            raise ValueError("in the copy")
        return "the call"

    for function in (fork_and_return, fork_and_raise):
        outcomes = await lab.run(function, *[()] * 5)
        assert outcomes == ["the call"] * 5
    assert not lab.lost


async def test_a_forked_copy_that_lives_on_does_not_hide_a_death(lab: SlotLab) -> None:
    def fork_then_die() -> None:
        if os.fork() == 0:
            time.sleep(60)
        os._exit(1)

    batch = lab.give(fork_then_die, ())
    await lab.until_ended(batch)
    assert lab.lost[0].running == (batch, batch.calls[0].counter)
    assert await lab.call(square, 3) == 9


async def test_multiprocessing_works_inside_a_call(lab: SlotLab) -> None:
    def sum_of_sizes() -> int:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return sum(pool.map(abs, range(-100, 0)))

    assert await lab.run(sum_of_sizes, *[()] * 10) == [5050] * 10


@pytest.mark.parametrize("how", ["stream", "descriptor", "replaced", "detached", "dup2"])
async def test_a_closed_stdout_is_back_for_the_next_call(lab: SlotLab, how: str) -> None:
    def close(how: str) -> None:
        import io

        if how == "stream":
            sys.stdout.close()
        elif how == "descriptor":
            os.close(1)
        elif how == "replaced":
            sys.stdout = io.StringIO()
        elif how == "detached":
            sys.stdout.detach()
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(words: str) -> None:
        print(words)

    await lab.call(close, how)
    batch = lab.give(say, ("I can still speak",))
    await lab.until_ended(batch)
    counter = batch.calls[0].counter
    await eventually(lambda: lab.lines(counter) == ["I can still speak"], 5)
    assert not lab.lost


async def test_a_gigabyte_of_output_is_cut_off_and_blocks_nobody(lab: SlotLab) -> None:
    def shout(size: int) -> str:
        block = "x" * 99 + "\n"
        for _ in range(size // (100 * 10_000)):
            sys.stdout.write(block * 10_000)
        return "done"

    batch = lab.give(shout, (1_000_000_000,))
    await lab.until_ended(batch)
    counter = batch.calls[0].counter
    assert lab.outcome(counter) == "done"
    lines = lab.lines(counter)
    assert "output dropped" in lines[-1]
    assert len(lines) <= 100_001
    assert await lab.call(square, 3) == 9


async def test_a_line_without_end_comes_in_pieces(lab: SlotLab) -> None:
    def shout() -> None:
        sys.stdout.write("x" * 1_000_000)

    batch = lab.give(shout, ())
    await lab.until_ended(batch)
    lines = lab.lines(batch.calls[0].counter)
    assert sum(map(len, lines)) == 1_000_000
    assert max(map(len, lines)) <= 64 * 1024


async def test_bytes_that_are_no_text_do_no_harm(lab: SlotLab) -> None:
    def shout() -> None:
        os.write(1, b"\x00\xff\x00\x02flame-call x\n\x00")

    batch = lab.give(shout, ())
    await lab.until_ended(batch)
    counter = batch.calls[0].counter
    await eventually(lambda: len(lab.lines(counter)) >= 1, 5)
    assert await lab.call(square, 3) == 9


async def test_asking_for_too_much_memory_is_out_of_memory(tmp_path: Path) -> None:
    async with slot_lab(tmp_path, memory_bytes=256 * 2**20) as lab:
        outcome = await lab.call(bytearray, 8 * 2**30)
        assert isinstance(outcome, OutOfMemory)
        assert await lab.call(square, 3) == 9
        assert not lab.lost


async def test_using_too_much_memory_is_out_of_memory(tmp_path: Path) -> None:
    def fill() -> None:
        hoard = []
        while len(hoard) < 40:
            hoard.append(b"x" * 10 * 2**20)
        time.sleep(30)

    async with slot_lab(tmp_path, memory_bytes=256 * 2**20) as lab:
        batch = lab.give(fill, (), ())
        await lab.until_ended(batch)
        (lost,) = lab.lost
        assert lost.reason is OutOfMemory
        assert lost.running == (batch, batch.calls[0].counter)
        assert lost.unstarted == [(batch, batch.calls[1].counter)]
        assert await lab.call(square, 3) == 9


async def test_memory_of_subprocesses_counts(tmp_path: Path) -> None:
    def let_another_fill() -> None:
        import subprocess

        code = "x = b'x' * (400 * 2**20); import time; time.sleep(30)"
        subprocess.run([sys.executable, "-c", code], check=False)

    async with slot_lab(tmp_path, memory_bytes=256 * 2**20) as lab:
        batch = lab.give(let_another_fill, ())
        await lab.until_ended(batch)
        assert lab.lost[0].reason is OutOfMemory


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
async def test_a_call_that_ignores_signals_is_killed_all_the_same(
    tmp_path: Path, ignored: signal.Signals
) -> None:
    def ignore(number: int, path: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(number, signal.SIG_IGN)
        Path(path).touch()
        while True:
            time.sleep(1)

    async with slot_lab(tmp_path, grace_s=0.2) as lab:
        started = tmp_path / "started"
        batch = lab.give(ignore, (int(ignored), str(started)))
        await eventually(started.exists)
        assert lab.slot.cancel("client", batch.calls[0].counter)
        await lab.until_ended(batch)
        assert lab.lost[0].reason is CallCancelled
        assert lab.lost[0].running == (batch, batch.calls[0].counter)
        assert await lab.call(square, 3) == 9


async def test_a_value_that_cannot_be_pickled_is_a_described_error(lab: SlotLab) -> None:
    def locked() -> Any:
        import threading

        return threading.Lock()

    outcome, four = (await lab.call(locked)), (await lab.call(square, 2))
    assert isinstance(outcome, PackagingError)
    assert "lock" in str(outcome)
    assert four == 4


async def test_an_exception_that_cannot_be_rebuilt_is_described(lab: SlotLab) -> None:
    class Picky(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fail() -> None:
        raise Picky(1, 2)

    class Hostile(Exception):
        def __reduce__(self) -> NoReturn:
            raise RuntimeError("no pickling")

        def __str__(self) -> NoReturn:
            raise RuntimeError("no text")

    def fail_badly() -> None:
        raise Hostile

    outcome = await lab.call(fail)
    assert "Picky: 1 and 2" in str(outcome)
    assert "Hostile" in str(await lab.call(fail_badly))
    assert await lab.call(square, 3) == 9


async def test_arguments_whose_unpickling_fails_are_an_error_of_the_call(lab: SlotLab) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return int, ("no number",)

    assert "no number" in str(await lab.call(square, Bomb()))
    assert await lab.call(square, 3) == 9


async def test_a_target_gone_from_the_cache_is_said_and_found_when_it_is_back(
    lab: SlotLab,
) -> None:
    def triple(number: int) -> int:
        return 3 * number

    batches = [lab.batch(triple, [(number,)]) for number in (1, 2)]
    path = batches[0].target_path
    assert path is not None
    content = path.read_bytes()
    path.unlink()
    lab.slot.give(batches[0])
    await lab.until_ended(batches[0])
    problem = lab.outcome(batches[0].calls[0].counter)
    assert isinstance(problem, StoreError)
    assert "call again" in str(problem)
    path.write_bytes(content)
    lab.slot.give(batches[1])
    await lab.until_ended(batches[1])
    assert lab.outcome(batches[1].calls[0].counter) == 6


async def test_deep_recursion_is_an_error_of_the_call(lab: SlotLab) -> None:
    def deep(number: int) -> int:
        return deep(number + 1)

    def nest() -> list[Any]:
        outer: list[Any] = []
        for _ in range(100_000):
            outer = [outer]
        return outer

    assert isinstance(await lab.call(deep, 0), RecursionError)
    assert isinstance(await lab.call(nest), PackagingError)
    assert await lab.call(square, 3) == 9


async def test_what_a_call_changes_in_the_process_does_not_stop_the_next(lab: SlotLab) -> None:
    def vandalise(directory: str) -> None:
        import threading

        for name in [name for name in sys.modules if name.startswith("flame")]:
            del sys.modules[name]
        os.chdir(directory)
        Path(directory).rmdir()
        os.environ.clear()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        sys.setrecursionlimit(200)
        sys.path.clear()
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

    def tidy() -> str:
        sys.setrecursionlimit(1000)
        return str(Path.cwd())

    doomed = Path(lab.spool_dir.parent / "doomed")
    doomed.mkdir()
    assert await lab.call(vandalise, str(doomed)) is None
    assert await lab.call(tidy) == str(Path.cwd())
    assert await lab.run(square, (3,), (4,)) == [9, 16]
    started = lab.spool_dir.parent / "started"

    def linger(mark: str) -> None:
        Path(mark).touch()
        time.sleep(30)

    batch = lab.give(linger, (str(started),))
    await eventually(started.exists, 20)
    lab.slot.cancel("client", batch.calls[0].counter)
    await lab.until_ended(batch)
    assert isinstance(lab.outcome(batch.calls[0].counter), CallCancelled)
    assert not lab.lost


async def test_a_child_with_running_threads_still_ends(tmp_path: Path) -> None:
    def leave_a_thread() -> int:
        import threading

        threading.Thread(target=time.sleep, args=(600,)).start()
        return os.getpid()

    lab = SlotLab(tmp_path, grace_s=0.2)
    await lab.slot.start()
    pid = await lab.call(leave_a_thread)
    started = time.monotonic()
    await lab.slot.close(grace_s=0.3)
    assert time.monotonic() - started < 5
    assert not Path(f"/proc/{pid}").exists()


async def test_closing_gives_a_running_call_its_grace_then_ends_it(tmp_path: Path) -> None:
    async with slot_lab(tmp_path) as lab:
        short = lab.give(time.sleep, (0.2,))
        await lab.slot.close(grace_s=10)
        assert short in lab.ended
        assert not lab.lost
    (tmp_path / "second").mkdir()
    async with slot_lab(tmp_path / "second") as lab:
        long = lab.give(time.sleep, (60,))
        await lab.slot.close(grace_s=0.2)
        assert lab.lost[0].running == (long, long.calls[0].counter)


_WORKER = """
import asyncio, pathlib, sys
sys.path.insert(0, sys.argv[1])
from lab.slots import SlotLab

async def main():
    lab = SlotLab(pathlib.Path(sys.argv[2]))
    await lab.slot.start()
    lab.give("os:system", ("sleep 1000 & echo $! >program.new; mv program.new program; wait",))
    print(lab.slot.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_children_and_their_programs_die_with_a_killed_worker(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _WORKER, tests, str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        cwd=tmp_path,
    )
    assert worker.stdout is not None
    child = int(await worker.stdout.readline())
    await eventually((tmp_path / "program").exists)
    program = int((tmp_path / "program").read_text())
    worker.kill()
    await worker.wait()
    await eventually(lambda: _is_dead(child) and _is_dead(program), 10)


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_what_a_dying_call_said_last_is_not_lost(lab: SlotLab) -> None:
    def say_and_die() -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    batch: Batch = lab.give(say_and_die, ())
    await lab.until_ended(batch)
    assert lab.lines(batch.calls[0].counter, EventKind.STDOUT) == ["last words"]


async def test_deaths_are_noticed_without_a_pidfd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_pidfd", lambda _pid: None)
    async with slot_lab(tmp_path) as lab:
        batch = lab.give(leave, ())
        await lab.until_ended(batch)
        assert "code 3" in lab.lost[0].message
        assert await lab.call(square, 3) == 9


async def test_a_child_can_be_another_user(tmp_path: Path) -> None:
    check = [sys.executable, "-c", "import flame_worker.child"]
    nobody = pwd.getpwnam("nobody").pw_uid
    try:
        await asyncio.to_thread(
            subprocess.run, check, check=True, user=nobody, cwd="/", capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs to be root, and an interpreter that everybody may use")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        async with slot_lab(directory, user=nobody, directory=Path("/")) as lab:
            assert await lab.call("os:getuid") == nobody
            assert await lab.call("os:getgroups") == []
