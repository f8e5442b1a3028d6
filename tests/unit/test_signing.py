"""Signatures over frames."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import SignatureError
from flame_broker.keys import Key, generate_key
from flame_broker.signing import SIGNATURE_BYTES, sign, verify

KEY = Key.parse("an-example-key-of-more-than-32-bytes")


def test_a_signature_is_hmac_sha256_under_the_signing_subkey() -> None:
    expected = hmac.new(KEY.signing, b"header" + b"body", hashlib.sha256).digest()
    assert sign(KEY, b"header", b"body") == expected
    assert len(expected) == SIGNATURE_BYTES


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5))
def test_parts_and_views_sign_like_the_whole(parts: list[bytes]) -> None:
    whole = sign(KEY, b"".join(parts))
    assert sign(KEY, *(memoryview(part) for part in parts)) == whole
    verify(KEY, memoryview(whole), *parts)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_changed_bit_anywhere_is_refused(message: bytes, data: st.DataObject) -> None:
    signed = bytearray(sign(KEY, message) + message)
    bit = data.draw(st.integers(0, len(signed) * 8 - 1))
    signed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        verify(KEY, bytes(signed[:SIGNATURE_BYTES]), bytes(signed[SIGNATURE_BYTES:]))


@pytest.mark.parametrize("length", [0, 1, 31, 33])
def test_a_signature_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(SignatureError):
        verify(KEY, (sign(KEY, b"x") * 2)[:length], b"x")


def test_another_key_does_not_verify_and_the_message_names_the_key_id() -> None:
    other = Key.parse(generate_key())
    with pytest.raises(SignatureError, match=other.hex_id):
        verify(other, sign(KEY, b"x"), b"x")
