"""A program whose cluster lives in it does not end before its calls have: nobody else runs them."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[[str], "subprocess.Popen[str]"]

_WORK = """
import threading, time
from pathlib import Path
import flame

def work(number, seconds=0.2):
    time.sleep(seconds)
    Path(f"done-{number}").touch()
    return bytes(500_000)

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


def _done(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("done-*"))


def test_calls_that_nobody_waits_for_are_done(start: Start, tmp_path: Path) -> None:
    program = start("""
        with flame.Runner() as runner:
            service = runner.service(work)
            first = service(0)
            for number in range(1, 8):
                service(number)
    """)
    said = program.communicate(timeout=60)
    assert (*said, program.returncode) == ("", "", 0)
    assert _done(tmp_path) == [f"done-{number}" for number in range(8)]


def test_a_map_that_was_left_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    program = start("""
        with flame.Runner() as runner:
            results = runner.service(work).map(range(500))
            next(results)
    """)
    said = program.communicate(timeout=60)
    assert (*said, program.returncode) == ("", "", 0)
    assert 0 < len(_done(tmp_path)) < 500


def test_an_explicit_close_does_not_wait(start: Start, tmp_path: Path) -> None:
    program = start("""
        client = flame.connect()
        flame.Runner(client=client).service(work)(1, 600)
        client.close()
    """)
    said = program.communicate(timeout=60)
    assert (*said, program.returncode) == ("", "", 0)
    assert _done(tmp_path) == []


def test_a_long_wait_is_told_once_and_ctrl_c_ends_it(start: Start) -> None:
    program = start("""
        flame.Executor().submit(work, 1, 600)
        service = flame.Runner().service(work)
        for number in range(3):
            service(number, 600)
    """)
    assert program.stderr is not None
    told = program.stderr.readline()
    assert "Ctrl-C" in told
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=20) == ("", "")
