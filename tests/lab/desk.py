"""The orchestrator's custody with its database, and the letters that it gets."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from time import time
from typing import Any

from flame_broker.codec import encode_value
from flame_broker.errors import FlameError, WorkerLost
from flame_broker.frames import encode, identity
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Claim,
    ControlFrame,
    Deposit,
    Plain,
    Result,
    ResultFrame,
    RetryPolicy,
    Status,
    Target,
)
from flame_broker.outcomes import encode_error, encode_failure
from flame_broker.topology import calls_queue, custody_queue
from flame_orchestrator.custody import Custody, Due
from flame_orchestrator.database import open_database
from flame_orchestrator.history import History
from flame_orchestrator.ledger import Ledger
from flame_orchestrator.letters import Letter, Writing
from flame_orchestrator.session import News
from lab.bench import KEYRING

__all__ = [
    "ANY",
    "AT_ONCE",
    "CALLS",
    "CUSTODY",
    "Desk",
    "again",
    "cancel",
    "claim",
    "deposit",
    "failed",
    "good",
    "late",
    "letter",
    "lost",
    "outcome",
    "overdue",
    "release",
]

KEY = KEYRING.signer
CUSTODY = custody_queue(KEY.hex_id).name
CALLS = calls_queue(KEY.hex_id, "default", "c1").name
AT_ONCE = RetryPolicy(3, 0.0, 1.0, jitter=False)
ANY = ("builtins.Exception",)


@cache
def _empty_database() -> bytes:
    """Migrated once for all: that takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        open_database(f"sqlite:///{folder}/ledger.sqlite").dispose()
        return (Path(folder) / "ledger.sqlite").read_bytes()


class Desk:
    """A custody, its database, and all that clients were told."""

    def __init__(self, folder: Path) -> None:
        (folder / "ledger.sqlite").write_bytes(_empty_database())
        self.engine = open_database(f"sqlite:///{folder}/ledger.sqlite")
        self.ledger = Ledger(self.engine)
        self.custody = Custody(self.engine, self.ledger, KEY)
        self.history = History(self.engine)
        self.epoch = self.custody.lead("us")
        self.told: dict[str, list[Result]] = defaultdict(list)

    def take(self, *letters: Letter) -> News:
        """Letters arrive together."""
        news = self.custody.record(self.epoch, letters)
        for frame in news.results:
            for result in frame.results:
                self.told[f"{frame.client}-{result.counter}"].append(result)
        return news

    def start_due(self) -> list[Due]:
        """Queue all that is due."""
        calls = self.custody.due(time(), 100)
        self.custody.queued(self.epoch, calls)
        return calls

    def state(self, counter: int, client: str = "c") -> object:
        """As ``flame show`` has it."""
        story = self.history.story(client, counter)
        return None if story is None else story["state"]


def letter(frame: Writing) -> Letter:
    """As it arrives in the custody queue."""
    return Letter(frame, identity(encode(frame, KEY)))


def deposit(
    *counters: int, client: str = "c", due: float = 0.0, key: str = "", **changes: Any
) -> Letter:
    """Calls of a client.

    ``changes`` are fields of ``Deposit``, or ``on``, ``at_most_once`` and ``timeout_s``.
    """
    on = changes.pop("on", ANY)
    spec = CallSpec(
        Target("m:f"),
        label="work",
        retry_on=on if "retry" in changes else (),
        at_most_once=changes.pop("at_most_once", False),
        timeout_s=changes.pop("timeout_s", 0.0),
    )
    calls = tuple(Call(counter, b"") for counter in counters)
    frame = CallFrame(CALLS, f"reply.{client}", client, spec, calls)
    times, keys = (due,) * len(calls), (key,) * len(calls)
    return letter(Deposit(CUSTODY, frame, times, keys, **changes))


def outcome(*results: Result, client: str = "c", attempt: int = 1, worker: str = "w") -> Letter:
    """Results of a worker."""
    return letter(ResultFrame(CUSTODY, client, worker, results, attempt))


def good(counter: int) -> Result:
    """A value."""
    return Result(counter, Status.OK, encode_value(counter).join())


def again(counter: int) -> Result:
    """An error that is to be tried again."""
    return Result(counter, Status.AGAIN, encode_error(OSError("not yet")))


def failed(counter: int, kind: type[FlameError] = WorkerLost) -> Result:
    """What a worker says of a call that did not end by itself."""
    return Result(counter, Status.FAILED, encode_failure(kind, "it is so"))


def cancel(*counters: int, client: str = "c", spare_running: bool = False) -> Letter:
    """A client gives calls up."""
    arguments: dict[str, Plain] = {
        "client": client,
        "counters": counters,
        "spare_running": spare_running,
    }
    return letter(ControlFrame(CUSTODY, "cancel", arguments))


def claim(
    *counters: int,
    run: str = "w/1",
    client: str = "c",
    frame: CallFrame | None = None,
    look: bool = False,
) -> Letter:
    """A worker, whose name is the run's up to the slash, wants the lease on calls.

    Args:
        counters: Which, of a frame as a client sends it.
        run: The run.
        client: Whose calls.
        frame: Those of this frame instead.
        look: Only ask.
    """
    if frame is None:
        calls = tuple(Call(counter, b"") for counter in counters)
        frame = CallFrame(CALLS, f"reply.{client}", client, CallSpec(Target("m:f")), calls)
    return letter(Claim(CUSTODY, frame, run, run.partition("/")[0], "its.ear", look))


def lost(*counters: int, epoch: int, run: str = "w/1", client: str = "c") -> Letter:
    """A run was silent for too long."""
    return _of_a_run("lost", counters, epoch, run, client)


def overdue(*counters: int, epoch: int, run: str = "w/1", client: str = "c") -> Letter:
    """A run goes on that its worker should have ended."""
    return _of_a_run("overdue", counters, epoch, run, client)


def late(counter: int, *, attempt: int = 1, client: str = "c") -> Letter:
    """No worker has taken an attempt in its time."""
    about: dict[str, Plain] = {"client": client, "counters": (counter,), "attempt": attempt}
    return letter(ControlFrame(CUSTODY, "late", about))


def _of_a_run(verb: str, counters: tuple[int, ...], epoch: int, run: str, client: str) -> Letter:
    about: dict[str, Plain] = {"client": client, "counters": counters, "run": run, "epoch": epoch}
    return letter(ControlFrame(CUSTODY, verb, about))


def release(*counters: int, run: str = "w/1", client: str = "c") -> Letter:
    """A worker gives calls back."""
    about: dict[str, Plain] = {"client": client, "counters": counters, "run": run}
    return letter(ControlFrame(CUSTODY, "release", about))
