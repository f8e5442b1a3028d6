"""Sealed fields: nobody without the key reads or changes them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import SignatureError, UnknownKey
from flame_broker.keys import Key, Keyring, generate_key
from flame_broker.sealing import OVERHEAD_BYTES, seal, unseal

KEYRING = Keyring.parse("an-example-key-of-more-than-32-bytes")
KEY = KEYRING.signer


@given(st.binary(max_size=300), st.binary(max_size=30))
def test_what_is_sealed_opens_in_the_same_context(plaintext: bytes, context: bytes) -> None:
    sealed = seal(KEY, plaintext, context)
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert unseal(KEYRING, sealed, context) == plaintext


def test_the_plain_text_does_not_show_and_no_two_seals_are_equal() -> None:
    sealed = [seal(KEY, b"hunter2", b"call-1") for _ in range(20)]
    assert len(set(sealed)) == 20
    assert not any(b"hunter2" in one for one in sealed)


@given(st.binary(max_size=60), st.data())
def test_one_changed_bit_anywhere_is_refused(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal(KEY, plaintext, b"call-1"))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UnknownKey if bit < 32 else SignatureError):
        unseal(KEYRING, bytes(sealed), b"call-1")


@given(st.binary(max_size=OVERHEAD_BYTES * 2))
def test_random_bytes_never_open(noise: bytes) -> None:
    with pytest.raises((SignatureError, UnknownKey)):
        unseal(KEYRING, noise, b"")


def test_every_shorter_piece_is_refused() -> None:
    sealed = seal(KEY, b"hunter2", b"call-1")
    for length in range(len(sealed)):
        with pytest.raises(SignatureError):
            unseal(KEYRING, sealed[:length], b"call-1")


def test_a_field_moved_into_another_context_is_refused() -> None:
    with pytest.raises(SignatureError, match="belongs elsewhere"):
        unseal(KEYRING, seal(KEY, b"hunter2", b"call-1"), b"call-2")


def test_a_rotated_key_still_opens_and_a_dropped_one_is_unknown() -> None:
    sealed = seal(KEY, b"hunter2", b"")
    fresh = Key.parse(generate_key())
    assert unseal(Keyring([fresh, KEY]), sealed, b"") == b"hunter2"
    with pytest.raises(UnknownKey, match=KEY.hex_id):
        unseal(Keyring([fresh]), sealed, b"")


def test_importing_the_module_does_not_import_cryptography() -> None:
    program = "import sys, flame_broker.sealing; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0
