"""What ``flame doctor`` makes of facts, and ``flame ping`` of times."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flame_broker.config import load
from flame_broker.errors import (
    BrokerUnavailable,
    ConfigError,
    FlameError,
    ObjectNotFound,
    StoreError,
    VersionMismatch,
)
from flame_broker.frames import FORMAT_VERSION
from flame_broker.keys import Key, generate_key
from flame_broker.objects import ObjectRef
from flame_cli import trial
from flame_cli.advice import start_worker
from flame_cli.checkup import (
    check_clocks,
    check_key,
    check_pools,
    check_store,
    check_versions,
    check_worker_stores,
)
from flame_cli.findings import Finding, Verdict
from flame_cli.ping import summary


def facts(name: str = "w1", **others: Any) -> dict[str, Any]:
    return {"worker": name, "python": platform.python_version(), "format": FORMAT_VERSION, **others}


class Pool:
    """A client whose ping ends as it is told."""

    key_id = "abcd1234"

    def __init__(self, outcome: float | BaseException) -> None:
        self._outcome = outcome

    def ping(self, pool: str, *, timeout_s: float) -> float:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def only(found: Any) -> Finding:
    (finding,) = found
    return finding


def test_figures_keep_the_first_trip_apart() -> None:
    series = [1.0, *(n / 1000 for n in range(1, 101))]
    assert summary(series) == {
        "trips": 100,
        "first_ms": 1000.0,
        "p50_ms": 50.5,
        "p99_ms": 99.0,
        "max_ms": 100.0,
    }


def test_a_worker_is_started_in_the_pool_that_needs_it() -> None:
    assert start_worker("abcd1234").startswith("start one with flame-worker, with the same broker")
    assert "flame-worker --pool gpu, with" in start_worker("abcd1234", "gpu")
    assert "abcd1234" in start_worker("abcd1234")


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (FlameError("no"), 1),
        (ConfigError("no"), 22),
        (BrokerUnavailable("no"), 69),
        (StoreError("no"), 69),
        ("just words", 1),
    ],
)
def test_a_failure_brings_its_exit_code(problem: FlameError | str, code: int) -> None:
    assert Finding.fail("check", problem, "do something").code == code


def test_same_versions_are_well_and_a_patch_release_does_not_matter() -> None:
    patched = platform.python_version().rpartition(".")[0] + ".99"
    finding = only(check_versions([facts(), facts("w2", python=patched)]))
    assert finding.verdict is Verdict.OK


def test_another_python_is_a_warning_that_names_the_worker() -> None:
    finding = only(check_versions([facts(), facts("old", python="3.9.1")]))
    assert finding.verdict is Verdict.WARN
    assert "old runs Python 3.9.1" in finding.text


def test_another_message_format_is_a_failure() -> None:
    finding = only(check_versions([facts("new", format=FORMAT_VERSION + 1)]))
    assert (finding.verdict, finding.code) == (Verdict.FAIL, 1)
    assert "new" in finding.text


@pytest.mark.parametrize(("skew_s", "word"), [(5.0, "ahead"), (-5.0, "behind")])
def test_a_clock_that_is_off_is_a_warning(skew_s: float, word: str) -> None:
    finding = only(check_clocks([facts(clock_skew_s=0.01), facts("off", clock_skew_s=skew_s)]))
    assert finding.verdict is Verdict.WARN
    assert finding.text == f"off is 5 s {word}"


def test_clocks_that_agree_are_well_and_without_workers_nothing_is_said() -> None:
    assert only(check_clocks([facts(clock_skew_s=-0.9)])).verdict is Verdict.OK
    assert [*check_clocks([]), *check_versions([])] == []


def test_a_pool_whose_slots_are_all_busy_is_a_warning_and_a_silent_one_a_failure() -> None:
    full = [facts(pool="default", slots=2, busy=2)]
    free = [facts(pool="default", slots=2, busy=1)]
    late: Any = Pool(TimeoutError())
    assert only(check_pools(late, full)).verdict is Verdict.WARN
    assert only(check_pools(late, free)).verdict is Verdict.FAIL


def test_each_pool_is_called() -> None:
    client: Any = Pool(0.0015)
    found = [*check_pools(client, [facts(pool="b"), facts(pool="a", slots=2), facts(pool="a")])]
    assert [finding.verdict for finding in found] == [Verdict.OK, Verdict.OK]
    assert found[0].text == "pool a: 2 with our key, 2 slots, 0 busy; a call took 1.5 ms"


def test_a_store_that_does_not_carry_is_a_failure_though_calls_by_name_run() -> None:
    client: Any = Pool(0.0015)
    lacks = "a function sent by value fails on a worker: there is no targets/ab"
    finding = only(check_pools(client, [facts(pool="a")], lambda *_: lacks))
    assert finding.verdict is Verdict.FAIL
    assert lacks in finding.text
    assert "same FLAME_STORE_URL" in finding.remedy


class Trip:
    """A call of the trial whose result is fetched, or not, as it is told."""

    def __init__(self, problem: Exception | None, *, went_well: bool) -> None:
        self._problem = problem
        self._went_well = went_well

    def submit(self, *_: Any) -> Trip:
        return self

    def result(self, _timeout_s: float) -> None:
        if self._problem is not None:
            raise self._problem

    def went_well(self) -> bool:
        return self._went_well

    def as_argument(self) -> ObjectRef:
        return ObjectRef("objects/" + "0" * 64, 1, "0" * 64)

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    ("trip", "says", "deleted"),
    [
        (Trip(None, went_well=True), "", 2),
        (Trip(VersionMismatch("Python 3.9"), went_well=False), "", 1),
        (Trip(ConfigError("no store"), went_well=False), "by value fails on a worker", 1),
        (Trip(ObjectNotFound("gone"), went_well=True), "where this client does not find it", 2),
    ],
)
def test_a_trial_says_on_which_side_the_store_fails_and_clears_up(
    trip: Trip, says: str, deleted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "Caller", lambda *_: trip)
    client = Mock()
    said = trial.carry(client, "default", 1.0)
    assert says in said
    assert bool(says) == bool(said)
    assert client.session.values.store.delete.call_count == deleted


def test_workers_that_name_another_store_or_none_are_warned_of(tmp_path: Path) -> None:
    settings = load(store="s3://bucket/a", environ={"FLAME_HOME": str(tmp_path)})
    same, older = facts("same", store="s3://bucket/a"), facts("older")
    assert [*check_worker_stores(settings, [same, older])] == []
    found = [*check_worker_stores(settings, [facts("b", store="s3://b"), facts("n", store="")])]
    assert [one.verdict for one in found] == [Verdict.WARN, Verdict.WARN]
    assert found[0].text == "b has s3://b, this is s3://bucket/a"
    assert found[1].text.startswith("n has none")


def test_without_workers_the_key_is_named() -> None:
    client: Any = Pool(0.0)
    finding = only(check_pools(client, []))
    assert finding.verdict is Verdict.FAIL
    assert "abcd1234" in finding.remedy


def test_a_remote_broker_without_a_store_is_a_warning(tmp_path: Path) -> None:
    settings = load(broker="amqp://broker.invalid/", environ={"FLAME_HOME": str(tmp_path)})
    finding = check_store(settings)
    assert finding.verdict is Verdict.WARN
    assert "FLAME_STORE_URL" in finding.remedy


def test_a_folder_as_the_store_of_a_remote_broker_is_a_warning(tmp_path: Path) -> None:
    settings = load(
        broker="amqp://broker.invalid/",
        store=(tmp_path / "store").as_uri(),
        environ={"FLAME_HOME": str(tmp_path)},
    )
    assert check_store(settings).verdict is Verdict.WARN
    assert [path for path in tmp_path.rglob("doctor/*") if path.is_file()] == []


def test_keys_show_by_their_ids_alone(tmp_path: Path) -> None:
    signs, verifies = generate_key(), generate_key()
    environ = {"FLAME_HOME": str(tmp_path), "FLAME_KEY": f"{signs},{verifies}"}
    finding = check_key(load(environ=environ))
    ids = [Key.parse(text).hex_id for text in (signs, verifies)]
    assert finding.text == f"signs with id {ids[0]}, also verifies {ids[1]}, from FLAME_KEY"


def test_a_key_file_shows_its_mode(tmp_path: Path) -> None:
    finding = check_key(load(environ={"FLAME_HOME": str(tmp_path)}))
    assert finding.verdict is Verdict.OK
    assert finding.text.endswith(f"from {tmp_path / 'key'} of mode 600")


def test_a_key_file_that_others_may_read_is_to_be_closed(tmp_path: Path) -> None:
    file = tmp_path / "shared.key"
    file.write_text(generate_key())
    file.chmod(0o644)
    environ = {"FLAME_HOME": str(tmp_path), "FLAME_KEY_FILE": str(file)}
    finding = check_key(load(environ=environ))
    assert finding.verdict is Verdict.FAIL
    assert finding.remedy.startswith(f"chmod 600 {file}")
