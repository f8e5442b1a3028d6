"""How `flame logs` shows lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Self

import pytest

from flame.logs import LogLine
from flame_cli import exits
from flame_cli.main import main

HALF_PAST = 1_700_000_000.25


def line(text: str, *, stream: str = "stdout", attempt: int = 1, run: int = 1) -> LogLine:
    return LogLine(HALF_PAST, stream, text, attempt, "w", run)


class Cluster:
    """Stands for a connection."""

    lines: tuple[LogLine, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def log(self, call: str, *, follow: bool) -> Iterator[LogLine]:
        assert (call, follow) == ("c-1", False)
        yield from self.lines


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr("flame_cli.logs.asking", lambda context: made)
    return made


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit) as left:
        main(["logs", "c-1", *words])
    assert left.value.code in (None, exits.DONE)
    return capsys.readouterr().out.splitlines()


def test_runs_and_notes_are_told_from_what_was_printed(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.lines = (
        line("a"),
        line("a line was dropped here", stream="note"),
        line("again", run=2, stream="stderr"),
        line("tried again", attempt=2, run=3),
    )
    assert shown(capsys) == [
        "a",
        "… a line was dropped here",
        "… attempt 1 on w",
        "again",
        "… attempt 2 on w",
        "tried again",
    ]
    both = shown(capsys, "--stdout", "--stderr")
    assert [text for text in both if not text.startswith("…")] == ["a", "again", "tried again"]
    assert shown(capsys, "--stderr") == ["… a line was dropped here", "… attempt 1 on w", "again"]
    assert shown(capsys, "--stdout", "--timestamps")[0] == "2023-11-14T22:13:20.250Z a"
    records = [json.loads(text) for text in shown(capsys, "--json")]
    assert [(r["stream"], r["attempt"], r["run"]) for r in records][-1] == ("stdout", 2, 3)
    assert {record["at"] for record in records} == {"2023-11-14T22:13:20.250Z"}


def test_a_terminal_gets_colours_and_no_other_controls(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = "\x1b[31mred\x1b[0m\x1b[2J\x07\tand\x9b2J"
    cluster.lines = (line(wild),)
    assert shown(capsys) == [wild]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert shown(capsys) == ["\x1b[31mred\x1b[0m[2J\tand2J"]
