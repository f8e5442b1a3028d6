"""A program does not end before the calls of its executors have: what the standard library says.

"All threads and processes are joined, and all pending futures done, before the interpreter can
exit, regardless of the value of wait" (``concurrent.futures.Executor.shutdown``).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[[str], list[str]]
Start = Callable[[str], "subprocess.Popen[str]"]

_WORK = """
import threading, time
from pathlib import Path
import flame

def work(number):
    Path(f"started-{number}").touch()
    time.sleep(0.2)
    Path(f"done-{number}").touch()
    return number

"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a program that has ``work``, in a folder of its own."""

    def start_program(text: str) -> subprocess.Popen[str]:
        (tmp_path / "program.py").write_text(_WORK + textwrap.dedent(text))
        return subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_program


@pytest.fixture
def run(start: Start, tmp_path: Path) -> Run:
    """Run such a program to its end, without a word; which of its calls were done then."""

    def run_program(text: str) -> list[str]:
        program = start(text)
        said = program.communicate(timeout=60)
        assert (*said, program.returncode) == ("", "", 0)
        return sorted(path.name for path in tmp_path.glob("done-*"))

    return run_program


def test_a_call_submitted_by_the_last_line_is_done(run: Run) -> None:
    assert run("""
        executor = flame.Executor()
        executor.submit(work, 1)
    """) == ["done-1"]


def test_an_executor_that_nobody_refers_to_is_waited_for_too(run: Run) -> None:
    assert run("flame.Executor().submit(work, 1)") == ["done-1"]


def test_a_map_whose_results_nobody_reads_is_done(run: Run) -> None:
    assert run("flame.Executor(1).map(work, range(3))") == ["done-0", "done-1", "done-2"]


def test_calls_are_done_after_a_shutdown_that_did_not_wait(run: Run) -> None:
    assert run("""
        executor = flame.Executor(max_workers=1)
        executor.submit(work, 1)
        executor.submit(work, 2)
        executor.shutdown(wait=False)
    """) == ["done-1", "done-2"]


def test_what_runs_is_done_after_a_shutdown_that_cancels(run: Run) -> None:
    assert run("""
        executor = flame.Executor(max_workers=1)
        for number in range(30):
            executor.submit(work, number)
        while not Path("started-0").exists():
            time.sleep(0.01)
        executor.shutdown(wait=False, cancel_futures=True)
    """) == ["done-0"]


def test_a_with_block_as_the_last_line_leaves_nothing_to_wait_for(run: Run) -> None:
    assert run("""
        with flame.Executor() as executor:
            executor.submit(work, 1)
    """) == ["done-1"]


def test_a_call_with_large_arguments_is_done(run: Run) -> None:
    assert run("""
        executor = flame.Executor()
        first = executor.submit(work, 1)
        executor.submit(lambda *_: work(2), bytes(500_000), first)
    """) == ["done-1", "done-2"]


def test_nothing_can_be_submitted_once_the_interpreter_ends(run: Run) -> None:
    assert run("""
        old, refused = flame.Executor(), []

        def submit_late():
            threading.main_thread().join()
            for executor in (old, flame.Executor()):
                try:
                    executor.submit(work, 2)
                except RuntimeError as problem:
                    refused.append(str(problem))
            assert refused == ["cannot schedule new futures after interpreter shutdown"] * 2
            Path("done-refused").touch()

        threading.Thread(target=submit_late).start()
        old.submit(work, 1)
    """) == ["done-1", "done-refused"]


def test_a_forked_child_ends_whatever_its_parent_waits_for(run: Run) -> None:
    assert run("""
        import os, sys, warnings
        warnings.simplefilter("ignore")  # Python 3.12 warns of any fork with threads
        executor = flame.Executor()
        executor.submit(work, 1)
        child = os.fork()
        if child == 0:
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """) == ["done-1"]


def test_ctrl_c_ends_the_wait_without_a_word(start: Start) -> None:
    # It says so when its main thread waits: a moment earlier, Ctrl-C would hit the interpreter.
    program = start("""
        import sys

        def names(frame):
            while frame is not None:
                yield frame.f_code.co_qualname
                frame = frame.f_back

        def watch():
            main = threading.main_thread().ident
            while not {"Leaving._wait", "Bell.wait_for"} <= {*names(sys._current_frames()[main])}:
                time.sleep(0.01)
            print("leaving", flush=True)

        executor = flame.Executor()
        executor.submit(time.sleep, 600)
        threading.Thread(target=watch, daemon=True).start()
    """)
    assert _complaints_after_ctrl_c(program, "leaving") == ""


_SLOW = """
    with flame.Executor() as executor:
        futures = [executor.submit(time.sleep, 600) for _ in range(6)]
        print("waiting", flush=True)
        futures[0].result()
"""


def test_ctrl_c_leaves_a_with_block_with_one_traceback(start: Start) -> None:
    program = start(_SLOW)
    complaints = _complaints_after_ctrl_c(program, "waiting")
    assert complaints.count("Traceback") == 1
    assert complaints.endswith("KeyboardInterrupt\n")
    assert program.returncode == -signal.SIGINT


def test_a_program_that_catches_ctrl_c_does_not_wait_at_its_end(start: Start) -> None:
    text = textwrap.indent(textwrap.dedent(_SLOW), "    ")
    program = start(f"try:{text}\nexcept KeyboardInterrupt:\n    raise SystemExit(3)")
    assert _complaints_after_ctrl_c(program, "waiting") == ""
    assert program.returncode == 3


def test_ctrl_c_leaves_an_executor_without_a_with_block(start: Start) -> None:
    program = start("""
        future = flame.Executor().submit(time.sleep, 600)
        print("waiting", flush=True)
        future.result()
    """)
    assert _complaints_after_ctrl_c(program, "waiting").count("Traceback") == 1
    assert program.returncode == -signal.SIGINT


def _complaints_after_ctrl_c(program: subprocess.Popen[str], line: str) -> str:
    """Press Ctrl-C when the program has said this; what it then wrote on standard error."""
    assert program.stdout is not None
    assert program.stdout.readline() == f"{line}\n"
    program.send_signal(signal.SIGINT)
    return program.communicate(timeout=20)[1]
