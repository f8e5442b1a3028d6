"""What is said of a message that was set aside, and whether its calls can be sent again."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flame_broker.errors import ResourceError
from flame_broker.frames import encode
from flame_broker.keys import Key, Keyring
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Frame,
    Priority,
    Suspicion,
    Target,
)
from flame_broker.objects import ObjectRef
from flame_broker.topology import (
    REASON_HEADER,
    SET_ASIDE_HEADER,
    calls_queue,
    dead_queue,
    suspects_queue,
)
from flame_cli.aside import Aside, Fate, Shelf, digest_of, read, shelves
from flame_cli.replay import Edits, renewed
from flame_cli.survey import Survey
from lab.hostile import Forger

KEY = Key(b"a key of the cluster, which is long enough")
OTHER = Key(b"a key of somebody else, also long enough")
KEYRING = Keyring([KEY])
DEAD = Shelf(KEY.hex_id, "gpu", Fate.DEAD)
PARKED = Shelf(KEY.hex_id, "gpu", Fate.PARKED)
REF = ObjectRef("objects/x", 5_000_000, "0" * 64)


def frame_of(**changes: Any) -> CallFrame:
    """Two calls that were quarantined."""
    frame = CallFrame(
        queue=DEAD.queue,
        reply="replies",
        client="k3j9",
        spec=CallSpec(Target("m:train"), resources="c2-m4", timeout_s=9.0, label="train"),
        calls=(Call(4, b"12345"), Call(5, b"", (REF,))),
        strikes=3,
        suspicion=Suspicion.ALONE,
        handed=7,
        expires_at=1_790_000_000.0,
    )
    return replace(frame, **changes)


def aside_of(
    frame: Frame | bytes, shelf: Shelf = DEAD, headers: dict[str, object] | None = None
) -> Aside:
    body = frame if isinstance(frame, bytes) else encode(frame, KEY)
    return read(body, headers or {}, shelf, KEYRING)


# --- describing --------------------------------------------------------------------------------


def test_calls_are_described_by_target_ids_and_sizes() -> None:
    headers: dict[str, object] = {
        REASON_HEADER: "Quarantined: why",
        SET_ASIDE_HEADER: 1_780_000_000,
    }
    found = aside_of(frame_of(), headers=headers)
    row = found.row()
    assert row["holds"] == "2 calls of train"
    assert row["calls"] == ["k3j9-4", "k3j9-5"]
    assert (row["pool"], row["queue"], row["reason"]) == ("gpu", "dead", "Quarantined: why")
    assert row["since"] == datetime.fromtimestamp(1_780_000_000, UTC)
    assert row["id"] == digest_of(encode(frame_of(), KEY))[:10]
    record = found.record()
    assert (record["strikes"], record["suspicion"], record["resources"]) == (3, "alone", "c2-m4")
    assert [(a["payload_bytes"], a["objects"], a["object_bytes"]) for a in record["arguments"]] == [
        (5, 0, 0),
        (0, 1, 5_000_000),
    ]


def test_no_payload_is_kept_or_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "somebody-unpickled-it"
    found = aside_of(Forger(KEY, DEAD.queue, mark).body)
    assert found.frame is not None
    assert [call.payload for call in found.frame.calls] == [b""]
    found.record()
    assert not mark.exists()


def test_names_from_outside_are_fit_for_a_terminal() -> None:
    spec = CallSpec(Target("m:\x1b[2Jf"), label="\udc80\x1b[2J\n")
    found = aside_of(frame_of(spec=spec, client="c\0"))
    assert found.summary == "2 calls of \ufffd\ufffd[2J\ufffd"
    json.dumps(found.record(), default=str, ensure_ascii=False).encode()
    assert "\x1b" not in str(found.record())


@pytest.mark.parametrize(
    "make", [Forger.unsigned, Forger.wrongly_signed, Forger.truncated, Forger.newer, Forger.noise]
)
def test_whatever_lies_there_is_described_and_not_sent_again(make: Any, tmp_path: Path) -> None:
    forger = Forger(KEY, "elsewhere", tmp_path / "mark")
    for number in range(200):
        found = aside_of(make(forger, Random(number)))
        assert found.row()["id"]
        assert found.record()["problem"]
        assert not found.row()["replayable"]


@pytest.mark.parametrize("since", [None, "soon", -1, 0, float("nan"), 10**30])
def test_a_time_that_is_none_is_not_shown(since: object) -> None:
    headers: dict[str, object] = {} if since is None else {SET_ASIDE_HEADER: since}
    assert aside_of(b"noise", headers=headers).since is None


def test_a_frame_that_holds_no_calls_is_no_call() -> None:
    found = aside_of(ControlFrame(DEAD.queue, "hello"))
    assert found.problem == "it holds no calls"
    assert found.row()["holds"] == "no calls"


def test_every_key_has_its_own_shelves() -> None:
    found = shelves(["aa", "bb"], ["default", "gpu"])
    assert len({shelf.queue for shelf in found}) == len(found) == 8
    assert dead_queue("bb", "gpu").name in {shelf.queue for shelf in found}


# --- may it be sent again? ---------------------------------------------------------------------


def test_what_a_worker_quarantined_can_be_sent_again() -> None:
    assert aside_of(frame_of()).problem == ""


def test_what_is_dead_for_another_reason_stays() -> None:
    frame = frame_of(queue=calls_queue(KEY.hex_id, "gpu", "c2-m4").name)
    assert "of what is dead only quarantined calls" in aside_of(frame).problem


@pytest.mark.parametrize("priority", list(Priority))
def test_parked_calls_keep_their_priority(priority: Priority) -> None:
    queue = calls_queue(KEY.hex_id, "gpu", "c2-m4", priority).name
    frame = frame_of(queue=queue)
    assert aside_of(frame, PARKED).problem == ""
    assert renewed(frame, PARKED, Edits()).queue == queue


def test_parked_suspects_go_back_to_the_calls() -> None:
    frame = frame_of(queue=suspects_queue(KEY.hex_id, "gpu").name)
    assert renewed(frame, PARKED, Edits()).queue == calls_queue(KEY.hex_id, "gpu", "c2-m4").name


def test_calls_of_another_pool_that_somebody_parked_here_stay() -> None:
    frame = frame_of(queue=calls_queue(KEY.hex_id, "default", "c2-m4").name)
    assert "it was moved" in aside_of(frame, PARKED).problem


def test_a_key_that_is_not_held_here_is_named() -> None:
    found = aside_of(encode(frame_of(), OTHER), PARKED)
    assert OTHER.hex_id in found.problem
    assert "UnknownKey" in found.problem


# --- what is sent ------------------------------------------------------------------------------


def test_calls_start_afresh_and_are_no_copy_of_what_a_worker_had() -> None:
    fresh = renewed(frame_of(), DEAD, Edits())
    assert (fresh.strikes, fresh.suspicion, fresh.expires_at) == (0, Suspicion.SHARED, 0.0)
    assert fresh.handed == 8
    assert fresh.queue == calls_queue(KEY.hex_id, "gpu", "c2-m4").name
    kept = ("reply", "client", "calls", "attempt", "spec")
    assert [getattr(fresh, name) for name in kept] == [getattr(frame_of(), name) for name in kept]


def test_the_same_message_gives_the_same_frame_twice() -> None:
    assert renewed(frame_of(), DEAD, Edits()) == renewed(frame_of(), DEAD, Edits())


def test_limits_can_be_edited() -> None:
    edits = Edits.parse(timeout_s=0.0, queue_timeout_s=60.0, resources="cpu=3,gpu=1", mem="9g")
    fresh = renewed(frame_of(), DEAD, edits)
    assert fresh.spec == replace(frame_of().spec, timeout_s=0.0, resources="c4-m16-g1")
    assert fresh.queue == calls_queue(KEY.hex_id, "gpu", "c4-m16-g1").name
    assert 50 < fresh.expires_at - time.time() <= 60


def test_memory_alone_leaves_the_rest_of_the_class() -> None:
    assert renewed(frame_of(), DEAD, Edits.parse(mem="0")).spec.resources == "c2"


@pytest.mark.parametrize("wrong", [{"resources": "bananas"}, {"mem": "much"}, {"mem": "1g,cpu=2"}])
def test_resources_that_make_no_sense_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ResourceError):
        Edits.parse(resources=wrong.get("resources"), mem=wrong.get("mem"))


def test_a_class_that_no_worker_knows_is_refused_unless_another_is_named() -> None:
    frame = frame_of(spec=CallSpec(Target("m:f"), resources="bananas"))
    with pytest.raises(ResourceError, match="bananas"):
        renewed(frame, DEAD, Edits())
    assert renewed(frame, DEAD, Edits.parse(resources="c1")).spec.resources == "c1"


# --- ids ---------------------------------------------------------------------------------------


def test_the_beginning_of_an_id_is_enough_where_it_names_one_message() -> None:
    one, two = aside_of(b"one"), aside_of(b"two")
    survey = Survey([one, two, one], 3)
    assert survey.find([one.id[:4], one.digest]).asides == [one, one]
    assert survey.find([two.digest.upper(), two.id]).asides == [two]


def test_words_that_name_nothing_or_several_are_told_apart() -> None:
    one, two = aside_of(b"one"), replace(aside_of(b"two"), digest=aside_of(b"one").digest[:8] + "0")
    found = Survey([one, two], 2).find([one.digest[:6], "ffff", "no-id", "abc"])
    assert found.asides == []
    assert "is the beginning of several ids" in found.problems[one.digest[:6]]
    assert [*found.problems] == [one.digest[:6], "ffff", "no-id", "abc"]
