"""The programs that README.md and docs/guide.md print run, and print what stands below them.

A block is a whole program. A comment line above it says what is special about it:
``<!-- file: test_NAME.py -->`` is a test module for pytest, ``<!-- needs a cluster -->`` runs
against RabbitMQ, an orchestrator and a worker. A ``text`` block right below is what the program
prints, to the letter. Other files are written beside each other for the ``sh`` blocks marked
``<!-- run -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.cluster import LabCluster

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Program:
    """One block of a page."""

    place: str
    code: str
    output: str | None
    mark: str

    def run(self, folder: Path, environ: Mapping[str, str]) -> None:
        """Run it in a folder and compare."""
        file = folder / (self.mark.removeprefix("file: ") if self._is_file else "program.py")
        file.write_text(self.code)
        pytest_options = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if self._is_file else []
        done = subprocess.run(
            [sys.executable, *pytest_options, file.name],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.output is None or done.stdout == self.output

    @property
    def _is_file(self) -> bool:
        return self.mark.startswith("file: ")

    @property
    def needs_cluster(self) -> bool:
        return self.mark == "needs a cluster"

    @property
    def is_run_alone(self) -> bool:
        """Not a file that a command needs."""
        return not self._is_file or self.mark.startswith("file: test_")


def _programs(page: str) -> Iterator[Program]:
    text = (_ROOT / page).read_text()
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        yield Program(f"{page}:{line}", block["code"], block["output"], block["mark"] or "")


PROGRAMS = [*_programs("README.md"), *_programs("docs/guide.md")]
LOCAL = [one for one in PROGRAMS if one.is_run_alone and not one.needs_cluster]
REMOTE = [program for program in PROGRAMS if program.needs_cluster]


def test_every_python_block_is_found() -> None:
    pages = ((_ROOT / page).read_text() for page in ("README.md", "docs/guide.md"))
    assert len(PROGRAMS) == sum(text.count("```python") for text in pages)
    assert LOCAL
    assert REMOTE


@pytest.mark.parametrize("program", LOCAL, ids=lambda program: program.place)
def test_a_printed_program_runs_as_it_stands(program: Program, tmp_path: Path) -> None:
    program.run(tmp_path, os.environ)


@pytest.mark.parametrize("program", REMOTE, ids=lambda program: program.place)
def test_a_printed_program_runs_on_a_cluster(
    program: Program, cluster: LabCluster, tmp_path: Path
) -> None:
    cluster.orchestrator()
    cluster.worker("--slots", "1")
    program.run(tmp_path, cluster.environ)


def test_the_printed_commands_run_on_the_printed_files(tmp_path: Path) -> None:
    page = (_ROOT / "docs/guide.md").read_text()
    for name, text in _FILE.findall(page):
        (tmp_path / name).write_text(text)
    (commands,) = _COMMANDS.findall(page)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "hello world" in done.stdout
