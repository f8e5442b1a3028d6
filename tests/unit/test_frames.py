"""Frames: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_broker import frames
from flame_broker.errors import (
    FlameError,
    MalformedMessage,
    PayloadTooLarge,
    SignatureError,
    UnknownKey,
    VersionMismatch,
)
from flame_broker.keys import Key, Keyring
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Event,
    EventFrame,
    EventKind,
    Frame,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.objects import ObjectRef
from flame_broker.signing import sign

KEY = Key(b"k" * 32)
OTHER = Key(b"o" * 32)
KEYS = Keyring([KEY])
REF = ObjectRef("objects/x", 10, "a" * 64)

text = st.text(max_size=20)
calls = st.builds(
    Call,
    st.integers(0, 2**63),
    st.binary(max_size=50),
    st.lists(st.just(REF), max_size=2).map(tuple),
)
call_frames = st.builds(
    CallFrame,
    queue=text,
    reply=text,
    client=text,
    spec=st.builds(
        CallSpec,
        target=st.builds(Target, text, st.sampled_from(["", "a" * 64]), st.integers(0, 99), text),
        timeout_s=st.floats(0, 1e6),
        label=text,
    ),
    calls=st.lists(calls, min_size=1, max_size=4).map(tuple),
    strikes=st.integers(0, 3),
    expires_at=st.floats(0, 1e10),
)
results = st.builds(
    Result,
    st.integers(0, 2**63),
    st.sampled_from(Status),
    st.binary(max_size=50),
    st.none() | st.just(REF),
    st.integers(0, 9),
)
records = st.one_of(
    call_frames,
    st.builds(
        ResultFrame,
        text,
        text,
        text,
        st.lists(results, max_size=4).map(tuple),
        seconds=st.floats(0, 9),
    ),
    st.builds(
        EventFrame,
        text,
        text,
        text,
        text,
        st.lists(
            st.builds(
                Event,
                st.integers(0, 9),
                st.sampled_from(EventKind),
                text,
                st.floats(0, 1),
                run=st.integers(0, 9),
                index=st.integers(0, 9),
            ),
            max_size=3,
        ).map(tuple),
        attempt=st.integers(1, 9),
        at=st.floats(0, 2e9),
        echo=st.booleans(),
    ),
    st.builds(ControlFrame, text, text, st.dictionaries(text, st.integers(0, 9))),
)

SAMPLE = CallFrame("q", "r", "c", CallSpec(Target("m:f")), (Call(1, b"\0\x90"), Call(2, b"x")))


@given(records)
def test_a_record_survives_the_journey(record: Frame) -> None:
    assert frames.decode(frames.encode(record, KEY), KEYS, queue=record.queue) == record


@given(records)
def test_truncated_frames_are_refused_with_a_typed_error(record: Frame) -> None:
    body = frames.encode(record, KEY)
    for length in {0, 3, 4, 8, 39, 40, len(body) // 2, len(body) - 1}:
        with pytest.raises((MalformedMessage, SignatureError)):
            frames.decode(body[:length], KEYS)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    body = bytearray(frames.encode(SAMPLE, KEY))
    body[position % len(body)] ^= change
    with pytest.raises((MalformedMessage, SignatureError, VersionMismatch, UnknownKey)):
        frames.decode(bytes(body), KEYS)


@settings(max_examples=1_000, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_untyped(body: bytes) -> None:
    with pytest.raises(FlameError):
        frames.decode(body, KEYS)


wild = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**63) | st.floats() | text | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(text, inner, max_size=3),
    max_leaves=30,
)


@settings(max_examples=1_000, deadline=None)
@given(st.integers(-1, 5), st.lists(wild, max_size=11))
def test_signed_nonsense_is_a_record_or_malformed(kind: int, fields: list[object]) -> None:
    body = _signed(msgpack.packb([kind, *fields]))
    try:
        record = frames.decode(body, KEYS)
    except MalformedMessage:
        return
    assert frames.decode(frames.encode(record, KEY), KEYS) == record


@settings(max_examples=1_000, deadline=None)
@given(st.binary(max_size=100))
def test_signed_random_payloads_are_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        frames.decode(_signed(payload), KEYS)


def test_a_frame_in_another_queue_does_not_hold() -> None:
    with pytest.raises(SignatureError, match="'q' arrived in 'other'"):
        frames.decode(frames.encode(SAMPLE, KEY), KEYS, queue="other")


def test_a_wrong_signature_is_told_from_an_unknown_key() -> None:
    body = frames.encode(SAMPLE, KEY)
    forged = body[:4] + KEY.id + bytes(32) + body[40:]
    with pytest.raises(SignatureError):
        frames.decode(forged, KEYS)
    with pytest.raises(UnknownKey, match=OTHER.hex_id):
        frames.decode(frames.encode(SAMPLE, OTHER), KEYS)


def test_all_keys_of_a_ring_verify_during_rotation() -> None:
    ring = Keyring([OTHER, KEY])
    assert frames.open_frame(frames.encode(SAMPLE, KEY), ring).key == KEY
    assert frames.open_frame(frames.encode(SAMPLE, OTHER), ring).key == OTHER


def test_a_newer_format_is_refused_by_name() -> None:
    body = bytearray(frames.encode(SAMPLE, KEY))
    body[3] = frames.FORMAT_VERSION + 1
    with pytest.raises(VersionMismatch, match="upgrade Flame"):
        frames.decode(bytes(body), KEYS)


def test_an_oversized_message_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="limit"):
        frames.decode(bytes(frames.MAX_FRAME_BYTES + 1), KEYS)


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    with pytest.raises(MalformedMessage):
        frames.decode(_signed(b"\x91" * 100_000), KEYS)


def test_copies_share_an_identity_and_different_messages_do_not() -> None:
    body = frames.encode(SAMPLE, KEY)
    handed = frames.encode(CallFrame("q", "r", "c", SAMPLE.spec, SAMPLE.calls, handed=1), KEY)
    assert frames.identity(body) == frames.identity(frames.encode(SAMPLE, KEY))
    assert frames.identity(body) != frames.identity(handed)


def _signed(payload: bytes) -> bytes:
    prefix = b"FLM" + bytes([frames.FORMAT_VERSION]) + KEY.id
    return prefix + sign(KEY, prefix, payload) + payload


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_timeout_that_is_no_duration_is_malformed(seconds: float) -> None:
    for spec in (
        CallSpec(Target("m:f"), timeout_s=seconds),
        CallSpec(Target("m:f"), grace_s=seconds),
    ):
        body = frames.encode(CallFrame("q", "r", "c", spec, SAMPLE.calls), KEY)
        with pytest.raises(MalformedMessage):
            frames.decode(body, KEYS)


def test_a_timeout_beyond_all_timers_is_as_good_as_the_longest() -> None:
    frame = CallFrame("q", "r", "c", CallSpec(Target("m:f"), timeout_s=1e300), SAMPLE.calls)
    read = frames.decode(frames.encode(frame, KEY), KEYS)
    assert isinstance(read, CallFrame)
    assert 1e9 <= read.spec.timeout_s < 1e10


def test_a_frame_of_more_calls_than_a_slot_takes_is_malformed() -> None:
    calls = tuple(Call(n, b"x") for n in range(10_000))
    body = frames.encode(CallFrame("q", "r", "c", SAMPLE.spec, calls), KEY)
    with pytest.raises(MalformedMessage):
        frames.decode(body, KEYS)


def test_a_frame_that_every_reader_would_refuse_is_not_written() -> None:
    ref = ObjectRef("objects/" + "0" * 64, 1, "0" * 64)
    call = Call(1, b"", (ref,) * 40_000)
    frame = CallFrame("q", "r", "c", CallSpec(Target("m:f")), (call,))
    with pytest.raises(PayloadTooLarge, match="fewer object references"):
        frames.encode(frame, KEYS.signer)
