"""An object reference survives the wire, and nothing malformed does."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import MalformedMessage
from flame_broker.objects import ObjectRef, is_key

SHA = "0123456789abcdef" * 4


def test_a_reference_comes_back_from_msgpack_as_it_was() -> None:
    ref = ObjectRef("objects/" + SHA, 12, SHA, 3)
    assert ObjectRef.from_wire(msgpack.unpackb(msgpack.packb(ref.to_wire()))) == ref


@pytest.mark.parametrize(
    "wire",
    [
        None,
        {},
        "four",
        (),
        ("k", 1, SHA),
        ("k", 1, SHA, 0, 0),
        (b"k", 1, SHA, 0),
        ("", 1, SHA, 0),
        ("../k", 1, SHA, 0),
        ("/k", 1, SHA, 0),
        ("k", -1, SHA, 0),
        ("k", 2**63, SHA, 0),
        ("k", 1.0, SHA, 0),
        ("k", True, SHA, 0),
        ("k", 1, SHA[:-1], 0),
        ("k", 1, SHA.upper(), 0),
        ("k", 1, SHA + "\n", 0),
        ("k", 1, SHA, -1),
        ("k", 1, SHA, "0"),
    ],
)
def test_a_malformed_reference_is_refused(wire: object) -> None:
    with pytest.raises(MalformedMessage):
        ObjectRef.from_wire(wire)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(plain | st.tuples(st.text(), st.integers(), st.text() | st.just(SHA), st.integers()))
def test_anything_is_a_reference_or_a_typed_error(wire: object) -> None:
    try:
        ref = ObjectRef.from_wire(wire)
    except MalformedMessage:
        return
    assert is_key(ref.key)
    assert ref.size >= 0


@pytest.mark.parametrize("key", ["a", "a/b", "objects/x.y", "ü/名", "a" * 1024, "..a/b..", "-"])
def test_ordinary_names_are_keys(key: str) -> None:
    assert is_key(key)


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\x00b", "a\nb", "\ud800", "a" * 1025],
)
def test_names_that_could_leave_the_store_are_not_keys(key: str) -> None:
    assert not is_key(key)
