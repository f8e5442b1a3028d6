"""The ledger: the same rows, whatever comes first or twice."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from flame_broker.codec import encode_value
from flame_broker.errors import (
    CallCancelled,
    CallExpired,
    ConfigError,
    FlameError,
    Quarantined,
    WorkerLost,
)
from flame_broker.frames import encode
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.outcomes import encode_error, encode_failure
from flame_orchestrator.database import SCHEMA_VERSION, open_database
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Arrival, Ledger
from flame_orchestrator.schema import metadata
from flame_orchestrator.states import CallState
from lab.bench import KEYRING
from lab.ports import free_port

KEY = KEYRING.signer
QUEUE = "flame.v1.0a0b0c0d.default.c1.normal"


def database(folder: Path) -> Engine:
    return open_database(f"sqlite:///{folder}/ledger.sqlite")


def queued(counters: Iterable[int], *, client: str = "c", label: str = "work") -> Arrival:
    calls = tuple(Call(counter, b"") for counter in counters)
    frame = CallFrame(QUEUE, "r", client, CallSpec(Target("m:f"), label=label), calls)
    return Arrival(frame, encode(frame, KEY))


def ended(*results: Result, client: str = "c", worker: str = "w") -> Arrival:
    frame = ResultFrame("r", client, worker, results)
    return Arrival(frame, encode(frame, KEY))


def good(counter: int) -> Result:
    return Result(counter, Status.OK, encode_value(counter).join())


def bad(counter: int, kind: type[Exception] = WorkerLost) -> Result:
    return Result(counter, Status.FAILED, encode_failure(kind, "it is so"))  # type: ignore[arg-type]


STORY = [
    queued([1, 2, 3, 4]),
    queued([6, 9, 12]),
    ended(good(1), good(9)),
    ended(bad(2), good(3), worker="w2"),
    ended(good(2), good(12)),
]


def seen(folder: Path) -> list[dict[str, object]]:
    """All that can be asked, but for the times."""
    history = History(database(folder))
    calls = [*history.calls(limit=100), *history.calls(state=CallState.FAILED, limit=100)]
    stories = [history.story("c", counter) for counter in range(1, 13)]
    known = [story for story in [*calls, *stories] if story is not None]
    for story in known:
        story.pop("queued_at", None)
        story.pop("ended_at", None)
    return sorted(known, key=lambda story: str(sorted(story.items(), key=str)))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10_000))
def test_transitions_commute_and_repeats_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice = random.Random(seed)
    plain, shuffled = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("shuffled")
    for arrival in STORY:
        Ledger(database(plain)).record([arrival])
    calls, results = STORY[:2], STORY[2:]
    # The first outcome counts, so outcomes keep their order; calls may come at any time.
    mixed = results[:]
    for arrival in [*calls, *calls, results[0]]:
        mixed.insert(dice.randrange(len(mixed) + 1) if arrival in calls else len(mixed), arrival)
    ledger = Ledger(database(shuffled))
    while mixed:
        taken = dice.randrange(1, len(mixed) + 1)
        ledger.record(mixed[:taken])
        del mixed[:taken]
    assert seen(shuffled) == seen(plain)


def test_a_frame_is_one_row_and_its_calls_are_told_apart(tmp_path: Path) -> None:
    engine = database(tmp_path)
    ledger, history = Ledger(engine), History(engine)
    told = ledger.record([queued(range(1, 257)), ended(*map(good, range(1, 256)), bad(256))])
    assert told == {"c": set(range(1, 257))}
    with engine.connect() as connection:
        for table, rows in (("batches", 1), ("outcomes", 1), ("failures", 1)):
            assert connection.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar() == rows
    assert [call["id"] for call in history.calls(limit=3)] == ["c-256", "c-255", "c-254"]
    assert [call["state"] for call in history.calls(limit=2)] == ["failed", "succeeded"]
    assert len(history.calls(state=CallState.SUCCEEDED, limit=1000)) == 255
    assert history.calls(state=CallState.QUEUED, limit=10) == []


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (WorkerLost, "failed"),
        (CallCancelled, "cancelled"),
        (CallExpired, "expired"),
        (Quarantined, "quarantined"),
    ],
)
def test_an_error_of_ours_names_the_state(
    tmp_path: Path, kind: type[Exception], state: str
) -> None:
    engine = database(tmp_path)
    Ledger(engine).record([queued([1]), ended(bad(1, kind))])
    story = History(engine).story("c", 1)
    assert story is not None
    assert (story["state"], story["error"], story["reason"]) == (state, kind.__name__, "it is so")
    assert [call["id"] for call in History(engine).calls(state=CallState(state), limit=5)] == [
        "c-1"
    ]


def test_an_exception_of_the_users_is_named_without_unpickling_it(tmp_path: Path) -> None:
    engine = database(tmp_path)
    raised = Result(1, Status.ERROR, encode_error(ValueError("seven is wrong")))
    Ledger(engine).record([queued([1], label="a"), queued([2], label="b"), ended(raised)])
    (call,) = History(engine).calls(state=CallState.FAILED, label="a", limit=5)
    assert (call["error"], call["reason"]) == ("ValueError", "seven is wrong")
    assert History(engine).calls(state=CallState.FAILED, label="b", limit=5) == []
    assert [c["id"] for c in History(engine).calls(label="b", limit=5)] == ["c-2"]


def test_text_that_no_database_takes_is_written_all_the_same(tmp_path: Path) -> None:
    engine = database(tmp_path)
    raised = Result(1, Status.ERROR, encode_error(ValueError("a name \udcff with \0 in it")))
    Ledger(engine).record([queued([1], label="\udc80"), ended(raised)])
    (call,) = History(engine).calls(state=CallState.FAILED, limit=5)
    assert call["reason"] == "a name ? with  in it"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("first", [good(1), bad(1)])
def test_a_second_run_changes_no_story_however_it_ends(
    tmp_path: Path, first: Result, together: bool
) -> None:
    second = bad(1) if first == good(1) else good(1)
    engine = database(tmp_path)
    arrivals = [queued([1]), ended(first), ended(second, worker="other")]
    for written in [arrivals] if together else [[arrival] for arrival in arrivals]:
        Ledger(engine).record(written)
    history = History(engine)
    state = "succeeded" if first == good(1) else "failed"
    story = history.story("c", 1)
    assert story is not None
    assert (story["state"], story["worker"]) == (state, "w")
    assert [facts["state"] for facts in history.calls(limit=9)] == [state]
    assert history.calls(state=CallState("failed"), limit=9) == [] or state == "failed"


def test_the_outcome_of_a_stream_has_its_items_in_order(tmp_path: Path) -> None:
    engine = database(tmp_path)
    item = [Result(1, Status.ITEM, b"%d" % n, None, n) for n in range(3)]
    end = Result(1, Status.OK, b"end", None, 3)
    Ledger(engine).record([queued([1]), ended(item[1]), ended(item[0], item[2]), ended(end)])
    outcome = History(engine).outcome("c", 1)
    assert outcome is not None
    assert [result.payload for result in outcome.items] == [b"0", b"1", b"2"]
    assert outcome.final == end
    assert History(engine).outcome("c", 2) is None


def test_old_and_too_many_ended_calls_are_forgotten_and_open_ones_stay(tmp_path: Path) -> None:
    engine = database(tmp_path)
    ledger, history = Ledger(engine), History(engine)
    ledger.record([queued([1]), queued([2]), ended(good(1))])
    assert ledger.forget(before=0.0, keep_calls=100) == 0
    assert ledger.forget(before=float("inf"), keep_calls=100) == 2
    assert [call["id"] for call in history.calls(limit=5)] == ["c-2"]
    for number in range(10, 20):
        ledger.record([queued([number]), ended(good(number))])
    ledger.forget(before=0.0, keep_calls=4)
    assert "c-19" in [call["id"] for call in history.calls(limit=50)]
    assert "c-10" not in [call["id"] for call in history.calls(limit=50)]
    assert "c-2" in [call["id"] for call in history.calls(limit=50)]


def test_clients_whose_calls_interleave_are_told_apart(tmp_path: Path) -> None:
    engine = database(tmp_path)
    arrivals = [queued(range(n, 400, 4), label=f"l{n}") for n in range(1, 5)]
    arrivals += [queued([1], client="d"), ended(good(1), client="d")]
    Ledger(engine).record([*arrivals, ended(*map(good, range(1, 400, 4)))])
    history = History(engine)
    assert len(history.calls(state=CallState.QUEUED, limit=1000)) == 399 - 100
    assert history.story("c", 1)["state"] == "succeeded"  # type: ignore[index]
    assert history.story("c", 2)["label"] == "l2"  # type: ignore[index]
    assert history.story("e", 1) is None


def test_the_schema_is_what_the_migrations_make_of_an_empty_database(tmp_path: Path) -> None:
    engine = database(tmp_path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == SCHEMA_VERSION
        assert compare_metadata(context, metadata) == []
    with database(tmp_path).connect() as connection:  # opened a second time
        assert connection.execute(text("SELECT COUNT(*) FROM batches")).scalar() == 0


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgres"])
def test_a_database_that_does_not_answer_yet_is_no_wrong_setting(scheme: str) -> None:
    url = f"{scheme}://flame:secret@127.0.0.1:{free_port()}/flame"
    with pytest.raises(FlameError, match=r"flame:\*\*\*@127.*is it running\?") as raised:
        open_database(url)
    assert not isinstance(raised.value, ConfigError)


def test_a_database_that_cannot_be_opened_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected sqlite:///file or postgresql"):
        open_database("nonsense://x/y")
    (tmp_path / "file").write_text("no database at all, but some text of a certain length" * 100)
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/file")
