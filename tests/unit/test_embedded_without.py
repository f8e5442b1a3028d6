"""An embedded cluster whose orchestrator cannot be: calls run, and what needs it is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame.asking import Asker
from flame.client import Client
from flame.errors import NoOrchestrator
from flame_broker.config import load

EXTRA = r'pip install "flame\[orchestrator\]"'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAME_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def extra_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("flame_orchestrator.da")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)


@pytest.fixture
def client(extra_missing: None) -> Iterator[Client]:
    with Client(load(), works=False) as made:
        yield made


def test_without_the_extra_questions_say_what_to_install(
    extra_missing: None, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Asker(load()) as asker:
        for ask in (asker.calls, asker.schedules, lambda: asker.story("abc-1")):
            with pytest.raises(NoOrchestrator, match=EXTRA):
                ask()
    assert not (home / "embedded").exists()
    assert capfd.readouterr() == ("", "")


def test_without_the_extra_calls_that_need_time_are_refused(client: Client) -> None:
    call = flame.Runner(client=client).service(len, retry=flame.Retry(3))("abc")
    with pytest.raises(NoOrchestrator, match=EXTRA):
        call.result(30)
    assert call.cancel() is False


def test_a_history_that_cannot_be_opened_is_told_of_once_and_is_the_reason(
    home: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "embedded").mkdir()
    (home / "embedded" / "ledger.sqlite").write_bytes(b"no database at all, " * 100)
    with caplog.at_level(logging.WARNING), Asker(load()) as asker:
        for _ in range(2):
            with pytest.raises(NoOrchestrator, match="file is not a database"):
                asker.calls()
    told = caplog.text + "".join(capfd.readouterr())
    assert told.count("embedded.no_history") == 1
