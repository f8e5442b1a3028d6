"""Whole programs on the embedded cluster: scripts, modules beside them, terminals, Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.wait import wait_until

Run = Callable[..., "subprocess.CompletedProcess[str]"]


_CPUS = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
PYTHON = ["taskset", "--cpu-list", _CPUS, sys.executable]
"""With two cpus, so two slots, on any machine."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program's text as ``program.py`` in a folder of its own."""

    def run_program(text: str, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(textwrap.dedent(text))
        return subprocess.run(
            [*PYTHON, *options, "program.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run_program


def test_a_plain_script_with_modules_beside_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(
        "class Square:\n"
        "    made = 'here'\n"
        "    def __init__(self, side): self.side = side\n"
        "    def area(self): return self.side ** 2\n"
    )
    (tmp_path / "tools.py").write_text(
        "import shapes\ndef grow(s): return shapes.Square(s.side + 1)"
    )
    done = run("""
        import flame, shapes, tools
        from tools import grow

        class Local:
            def __init__(self, value):
                self.value = value

        def work(square, local):
            return tools.grow(square), Local(local.value + 1), square.area()

        with flame.Runner() as runner:
            square, local, area = runner.service(work)(shapes.Square(3), Local(5)).get(30)
            assert type(square) is shapes.Square and square.side == 4, square
            assert type(local) is Local and local.value == 6
            assert area == 9 and shapes.Square.made == "here"
            grown = runner.service(grow).map([shapes.Square(n) for n in range(3)])
            assert [square.side for square in grown] == [1, 2, 3]
            ref = runner.put_object([shapes.Square(7)])
            assert runner.service(lambda squares: squares[0].area())(ref).get(30) == 49
        print("fine")
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


def test_output_of_calls_is_shown_even_if_the_program_ends_at_once(run: Run) -> None:
    done = run("""
        import sys, flame

        def talk(number):
            print("line", number)
            print("problem", number, file=sys.stderr)
            return number

        service = flame.Runner().service(talk)
        print(flame.Runner(echo=False).service(talk)(1).get(30))
        print(service(2).get(30))
    """)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["1", "2", "[talk] line 2"]
    assert done.stderr == "[talk] problem 2\n"


def test_a_program_without_a_file_can_call(tmp_path: Path) -> None:
    program = (
        "import flame\n"
        "def f(x): return x + 1\n"
        "print(flame.Runner().service(f)(1).get(30))\n"
        "def f(x): return x + 2\n"
        "print(flame.Runner().service(f)(1).get(30))\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=program, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("2\n3\n", "")


SLOW = """
    import time, flame

    def nap(n):
        time.sleep(0.3)
        return n

    with flame.Runner() as runner:
        service = runner.service(nap)
        print(sum(runner.get([service(n) for n in range(8)])))
        print(sum(service.map(range(7))))
        futures = [service(n) for n in range(6)]
        print(runner.wait(futures))
    with flame.Executor() as executor:
        print(sum(executor.map(nap, range(5))))
"""


def _on_terminal(text: str, folder: Path) -> tuple[bytes, bytes]:
    """What a program prints, and what it draws on the terminal that is its standard error."""
    (folder / "program.py").write_text(textwrap.dedent(text))
    main, terminal = pty.openpty()
    shown = subprocess.Popen(
        [*PYTHON, "program.py"], cwd=folder, stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    drawn = b""
    try:
        while chunk := os.read(main, 65536):
            drawn += chunk
    except OSError:
        pass  # what Linux says when the other side of a terminal is closed
    os.close(main)
    out, _ = shown.communicate(timeout=30)
    return out, drawn


def test_progress_bars_are_for_terminals_only(run: Run, tmp_path: Path) -> None:
    piped = run(SLOW)
    assert (piped.stdout, piped.stderr) == ("28\n21\nTrue\n10\n", "")
    out, drawn = _on_terminal(SLOW, tmp_path)
    assert out.decode() == piped.stdout
    assert b"nap" in drawn
    for all_of_them in (b"8/8", b"7/7", b"6/6", b"5/5"):
        assert all_of_them in drawn


def test_a_bar_inside_a_bar_is_left_out(tmp_path: Path) -> None:
    _, shown = _on_terminal(
        """
        import time, flame

        def nap(n):
            time.sleep(0.8)
            return n

        runner = flame.Runner()
        outer, inner = runner.service(nap), runner.service(lambda n: nap(n))
        for n in outer.map(range(4)):
            runner.get([inner(n) for n in range(3)])
        runner.get([inner(n) for n in range(2)])
    """,
        tmp_path,
    )
    assert b"4/4" in shown
    assert b"/3" not in shown
    assert b"2/2" in shown


def test_ctrl_c_ends_the_program_with_its_own_trace_only(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import time, flame\n"
        "future = flame.Runner().service(time.sleep)(60)\n"
        "print('waiting', flush=True)\n"
        "future.get()\n"
    )
    program = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    wait_until(program.stdout.readline)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=20)
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors
    assert program.returncode == -signal.SIGINT


def test_the_pytest_fixture_gives_an_embedded_cluster(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import flame\n"
        "def test_it(flame_client):\n"
        "    assert flame.Runner(client=flame_client).service(len)([1, 2]).get(30) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_an_executors_shutdown_cancels_what_waits_and_spares_what_runs(run: Run) -> None:
    done = run("""
        import time, flame

        def nap(n):
            time.sleep(0.5)
            return n

        with flame.connect() as client:
            executor = flame.Executor(client=client)
            executor.submit(nap, 0).result(30)
            futures = [executor.submit(nap, n) for n in range(50)]
            while not any(worker["busy"] for worker in client.workers()):
                pass
            executor.shutdown(wait=True, cancel_futures=True)
            assert all(future.done() for future in futures)
            cancelled = [future for future in futures if future.cancelled()]
            others = [future for future in futures if not future.cancelled()]
            assert len(cancelled) >= 35, len(cancelled)
            assert others
            assert all(future.exception() is None for future in others)
        print("fine")
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)
