"""Records from a child are taken as they are meant, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import CallTimeout
from flame_broker.messages import Result, Status
from flame_broker.outcomes import decode_failure
from flame_worker.batches import SpooledResult
from flame_worker.results import failure_of, result_of, take_records

SPOOL = Path("/spool")


def unpacker_of(*records: Any) -> msgpack.Unpacker:
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    for record in records:
        unpacker.feed(msgpack.packb(record))
    return unpacker


def test_a_short_record_is_a_result() -> None:
    assert result_of(7, [3, 0, b"x", 0.1], SPOOL) == Result(7, Status.OK, b"x")


def test_a_long_record_is_an_item_or_a_spooled_result() -> None:
    assert result_of(7, [3, 3, b"x", 0.1, 5, True, None], SPOOL) == Result(
        7, Status.ITEM, b"x", None, 5
    )
    spooled = result_of(7, [3, 0, b"", 0.1, 0, False, ["/spool/1", 99, "ab"]], SPOOL)
    assert spooled == SpooledResult(7, Status.OK, Path("/spool/1"), 99, "ab")


def test_a_spooled_result_lies_in_the_spool_whatever_the_child_says() -> None:
    for path in ("/etc/passwd", "../../etc/passwd", "/spool/../etc/passwd"):
        found = result_of(7, [3, 0, b"", 0.1, 0, False, [path, 9, "ab"]], SPOOL)
        assert isinstance(found, SpooledResult)
        assert found.path == SPOOL / "passwd"


def test_the_worker_itself_can_fail_a_call() -> None:
    result = failure_of(7, CallTimeout, "too long")
    assert isinstance(decode_failure(result.payload, "c-7"), CallTimeout)


def test_good_records_before_a_bad_one_count() -> None:
    good = [0, 0, b"", 0.5]
    assert take_records(unpacker_of(good, "bad", good)) == ([good], False)
    assert take_records(unpacker_of(good, good)) == ([good, good], True)


@pytest.mark.parametrize(
    "bad",
    [
        5,
        [],
        [0],
        [0, 9, b"", 0.5],
        [0, 0, "text", 0.5],
        ["0", 0, b"", 0.5],
        [0, 0, b"", 0.5, 0, False],
        [0, 0, b"", 0.5, "0", False, None],
        [0, 0, b"", 0.5, 0, False, ["/spool/1", "99", "ab"]],
        [0, 0, b"", 0.5, 0, False, 5],
        [-1, "loaded"],
        [-1, 2, 0, "half", "text"],
    ],
)
def test_other_records_are_refused(bad: Any) -> None:
    assert take_records(unpacker_of(bad)) == ([], False)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_wait_for_more(data: bytes) -> None:
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    records, _ = take_records(unpacker)
    for record in records:
        assert isinstance(record, list)
