"""The codec: plain data as msgpack, everything else as a pickle, and nothing changed on the way."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker import codec
from flame_broker.errors import MalformedMessage, ObjectNotFound, PackagingError
from flame_broker.objects import ObjectRef

REF = ObjectRef("objects/x", 10, "a" * 64)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


class Colour(IntEnum):
    RED = 1


@dataclass
class Point:
    x: int
    y: Any


@given(plain)
def test_plain_data_comes_back_the_same(value: object) -> None:
    assert codec.decode_value(codec.encode_value(value).join()) == value


@given(st.lists(plain).map(tuple), st.dictionaries(st.text(), plain))
def test_arguments_come_back_the_same(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    got_args, got_kwargs = codec.decode_arguments(codec.encode_arguments(args, kwargs).join())
    assert (tuple(got_args), got_kwargs) == (args, kwargs)


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        [(1, 2)],
        {"a": (1,)},
        {(1, 2): 3},
        {1, 2},
        bytearray(b"abc"),
        [bytearray(b"abc")],
        Colour.RED,
        OrderedDict(a=1),
        1 + 2j,
        Point(1, [2]),
        2**70,
        "half a surrogate: \ud800",
    ],
)
def test_what_msgpack_would_change_is_pickled(value: object) -> None:
    got = codec.decode_value(codec.encode_value(value).join())
    assert got == value
    assert type(got) is type(value)


def test_plain_data_needs_no_pickle() -> None:
    payload = codec.encode_value({"a": [1, 2.5, None, True, b"x"]}).join()
    assert payload[0] == codec.PLAIN


def test_a_cycle_survives() -> None:
    loop: list[Any] = []
    loop.append(loop)
    got = codec.decode_value(codec.encode_value(loop).join())
    assert got[0] is got


def test_arrays_are_not_copied_into_the_pickle_and_lie_aligned() -> None:
    array = np.arange(1000, dtype=np.float64)
    encoded = codec.encode_value({"a": array, "b": array[:10].copy()})
    assert len(encoded.segments[0]) < 1000
    offset = 0
    for segment in encoded.segments:
        if segment.nbytes if isinstance(segment, memoryview) else False:
            assert offset % codec.ALIGNMENT == 0
        offset += len(segment)
    assert encoded.nbytes == offset


def test_an_array_in_a_mapped_file_is_used_where_it_lies(tmp_path: Path) -> None:
    array = np.arange(100_000)
    path = tmp_path / "value"
    path.write_bytes(codec.encode_value(array).join())
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    got = codec.decode_value(mapped)
    assert np.array_equal(got, array)
    assert not got.flags.owndata
    assert not got.flags.writeable


def test_references_are_listed_and_resolved_inside_any_structure() -> None:
    encoded = codec.encode_arguments(([REF], {"deep": Point(1, (REF,))}), {})
    assert set(encoded.refs) == {REF}
    args, _ = codec.decode_arguments(encoded.join(), load_ref=lambda ref: ("loaded", ref.key))
    assert args[0] == [("loaded", "objects/x")]
    assert args[1]["deep"].y == (("loaded", "objects/x"),)


def test_without_a_loader_references_stay_references() -> None:
    assert codec.decode_value(codec.encode_value([REF]).join()) == [REF]


@pytest.mark.parametrize("payload", [b"", b"\x07abc", b"\x00\xc1", b"\x01", b"\x01" + b"\xff" * 15])
def test_malformed_payloads_are_named_so(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        codec.decode_value(payload)


@given(st.integers(0, 2**20))
def test_a_truncated_pickle_is_malformed_before_it_is_loaded(cut: int) -> None:
    payload = codec.encode_value((1, np.arange(100))).join()
    with pytest.raises(MalformedMessage):
        codec.decode_value(payload[: 1 + cut % (len(payload) - 1)])


class Locked:
    """Refuses to be rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


def test_what_cannot_be_rebuilt_says_what_its_code_raised() -> None:
    payload = codec.encode_value(Locked()).join()
    with pytest.raises(PackagingError, match=r"ValueError: .*not a number") as caught:
        codec.decode_value(payload)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_object_that_is_gone_is_named_so() -> None:
    def load(ref: ObjectRef) -> object:
        raise ObjectNotFound(ref.key)

    with pytest.raises(ObjectNotFound):
        codec.decode_value(codec.encode_value([REF]).join(), load_ref=load)


def test_what_cannot_be_pickled_says_its_type() -> None:
    with pytest.raises(PackagingError, match="generator"):
        codec.encode_value(i for i in range(3))


def test_endless_nesting_is_a_typed_error() -> None:
    deep: Any = ()
    for _ in range(100_000):
        deep = (deep,)
    with pytest.raises(PackagingError, match="deep"):
        codec.encode_value(deep)


_CHILD = """
import sys
from flame_broker.codec import ResultPickler, decode_value, encode_value
function = decode_value(sys.stdin.buffer.read())
sys.stdout.buffer.write(encode_value(function(), pickler=ResultPickler).join())
"""


def test_a_result_never_redefines_a_class_of_the_client() -> None:
    """The class goes there by value; it comes back as the very same class, state untouched."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Thing:\n    count = 0\n    def hello(self): return 'old'\n", namespace)
    thing = namespace["Thing"]
    namespace["make"] = lambda: thing()  # noqa: PLW0108  # a function to send
    payload = codec.encode_value(namespace["make"]).join()
    thing.count = 42
    thing.hello = lambda self: "new"
    answer = subprocess.run(
        [sys.executable, "-c", _CHILD], input=payload, capture_output=True, check=True
    ).stdout
    got = codec.decode_value(answer)
    assert type(got) is thing
    assert (thing.count, got.hello()) == (42, "new")


def test_a_class_born_in_the_child_travels_by_value() -> None:
    def make() -> object:
        class Local:
            answer = 42

        return Local()

    payload = cloudpickle.dumps(make)
    child = _CHILD.replace(
        "decode_value(sys.stdin.buffer.read())",
        "__import__('pickle').loads(sys.stdin.buffer.read())",
    )
    answer = subprocess.run(
        [sys.executable, "-c", child], input=payload, capture_output=True, check=True
    ).stdout
    assert codec.decode_value(answer).answer == 42
