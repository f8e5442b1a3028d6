"""A child's records of results as the rest of the worker knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgpack

from flame_broker.errors import CallError
from flame_broker.messages import Result, Status
from flame_broker.outcomes import encode_failure
from flame_worker.batches import SpooledResult
from flame_worker.pipes import NOTICE

__all__ = ["failure_of", "result_of", "take_records"]

_EVER_S: Final = 1e9
_STATUSES: Final = tuple(Status)
_NOTICES: Final = frozenset({(int,), (int, int), (int, int, float, str)})
"""Fields of a notice: loaded, ready with its process id, progress of a call."""


def result_of(counter: int, record: list[Any], spool_dir: Path) -> Result | SpooledResult:
    """Rebuild a result: ``serial, status, payload, seconds[, index, printed, spooled]``.

    A spooled file is sent away and deleted, so whatever a call wrote to the pipe in its child's
    name, only a file of the spool is touched.
    """
    status = _STATUSES[record[1]]
    if len(record) == 4:
        return Result(counter, status, record[2])
    _, _, payload, _, index, _, spooled = record
    if spooled is None:
        return Result(counter, status, payload, None, index)
    path, size, sha256 = spooled
    return SpooledResult(counter, status, spool_dir / Path(path).name, size, sha256, index)


def take_records(unpacker: msgpack.Unpacker) -> tuple[list[list[Any]], bool]:
    """The records that are complete, and whether nothing but records was there.

    The pipe is open to the user's code, so nothing is taken for granted.
    """
    records: list[list[Any]] = []
    try:
        for record in unpacker:
            if not _is_record(record):
                return records, False
            records.append(record)
    except (ValueError, msgpack.UnpackException):
        return records, False
    return records, True


def _is_record(record: object) -> bool:
    if type(record) is not list or not record:
        return False
    if record[0] == NOTICE:
        return tuple(map(type, record[1:])) in _NOTICES
    if len(record) not in (4, 7):
        return False
    serial, status, payload, seconds = record[:4]
    return (
        type(serial) is int
        and status in _STATUSES
        and type(payload) is bytes
        and type(seconds) is float
        and 0.0 <= seconds < _EVER_S
        and (len(record) == 4 or _is_tail(*record[4:]))
    )


def _is_tail(index: object, printed: object, spooled: object) -> bool:
    if type(index) is not int or type(printed) is not bool:
        return False
    if spooled is None:
        return True
    return isinstance(spooled, list) and tuple(map(type, spooled)) == (str, int, str)


def failure_of(counter: int, reason: type[CallError], message: str) -> Result:
    """The result of a call that the worker ended."""
    return Result(counter, Status.FAILED, encode_failure(reason, message))
