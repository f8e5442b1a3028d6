"""The parts that transfers are made of: bodies from segments, pieces side by side, retries."""

from __future__ import annotations

import io
import threading
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import StoreError
from flame_broker.store.base import SegmentReader
from flame_broker.store.parallel import PARALLEL, Parallel
from flame_broker.store.retries import Retries, Transient

positions = st.integers(0, 60)


@given(
    st.lists(st.binary(max_size=20), max_size=6),
    positions,
    positions,
    st.lists(st.tuples(st.integers(0, 2), positions, st.integers(-1, 30)), max_size=6),
)
def test_a_body_of_segments_reads_as_a_file(
    segments: list[bytes], start: int, end: int, steps: list[tuple[int, int, int]]
) -> None:
    stretch = b"".join(segments)[start:end]
    reader, file = SegmentReader([memoryview(s) for s in segments], start, end), io.BytesIO(stretch)
    assert len(reader) == len(stretch)
    for whence, offset, size in steps:
        if whence == 0:
            file.seek(min(offset, len(stretch)))
            assert reader.seek(offset) == file.tell()
        elif whence == 1:
            assert reader.seek(0, io.SEEK_CUR) == file.tell()
        else:
            assert reader.seek(0, io.SEEK_END) == file.seek(0, io.SEEK_END)
        piece = reader.read(size)
        assert piece == file.read(len(piece) if size >= 0 else -1)
        assert piece or not size or not file.read(1)
        assert reader.tell() == file.tell()


def test_pieces_return_in_the_order_of_their_start() -> None:
    with Parallel[int]() as pieces:
        for number in range(30):
            pieces.start(partial(int, number))
        assert list(pieces.results()) == list(range(30))


def test_the_first_failure_ends_the_other_pieces_and_tells_its_reason() -> None:
    done: list[int] = []
    everybody = threading.Barrier(PARALLEL)

    def piece(number: int) -> None:
        everybody.wait(10)
        if number == PARALLEL - 1:
            raise StoreError("the reason")
        while True:
            pieces.check()
            threading.Event().wait(0.001)

    with Parallel[None]() as pieces:
        for number in range(PARALLEL):
            pieces.start(partial(piece, number))
        for number in range(100):
            pieces.start(partial(done.append, number))
        with pytest.raises(StoreError, match="the reason"):
            list(pieces.results())
    assert done == []


def test_leaving_early_ends_the_pieces() -> None:
    def piece() -> None:
        while True:
            pieces.check()
            threading.Event().wait(0.001)

    with Parallel[None]() as pieces:
        pieces.start(piece)
    with pytest.raises(StoreError, match="given up"):
        list(pieces.results())


def test_a_second_try_happens_however_long_the_first_took() -> None:
    tries = []

    def attempt() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise Transient("a connection that died long ago")
        return "done"

    assert Retries(retry_s=1e-9).run(attempt) == "done"


def test_other_errors_are_not_tried_again() -> None:
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise StoreError("for good")

    with pytest.raises(StoreError, match=r"^for good$"):
        Retries().run(attempt)
    assert len(tries) == 1
