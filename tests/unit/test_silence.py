"""A client whose calls bring no results asks who is there, and says so if nobody is."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

import flame
from flame import silence
from flame_broker.keys import Key, generate_key
from lab.fake_worker import FakeWorker
from lab.wait import wait_until

_numbers = count()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = silence.Silence.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "quiet_s", 0.1)
    monkeypatch.setattr(silence, "_ANSWER_S", 0.2)
    monkeypatch.setattr(silence, "_BUSY_S", 0.1)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "workers.none" in r.getMessage()]


def test_calls_that_no_worker_takes_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = generate_key()
    url, store = f"memory://silence-{next(_numbers)}", (tmp_path / "store").as_uri()
    with (
        flame.connect(url, store=store, key=key) as client,
        flame.Runner("lonely", client=client) as runner,
    ):
        service = runner.service(len)
        futures = [service("abc") for _ in range(3)]
        wait_until(lambda: said(caplog), 10)
        (line,) = said(caplog)
        assert "3 calls wait in pool 'default'" in line
        assert "flame-worker" in line
        assert "flame doctor" in line
        assert Key.parse(key).hex_id in line
        assert not futures[0].wait(0.5)
        assert len(said(caplog)) == 1


def test_the_pool_that_has_no_worker_is_named(
    client: flame.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with flame.Runner("lonely", client=client) as runner:
        runner.service(len, pool="gpu")("abc")
        wait_until(lambda: said(caplog), 10)
    (line,) = said(caplog)
    assert "1 calls wait in pool 'gpu'" in line
    assert "flame-worker --pool gpu" in line


def test_nothing_is_said_while_workers_are_merely_busy(
    worker: FakeWorker,
    runner: flame.Runner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker.hold()
    future = runner.service(len)("abc")
    wait_until(lambda: worker.hellos >= 2, 10)
    worker.release()
    assert future.result(10) == 3
    assert said(caplog) == []
