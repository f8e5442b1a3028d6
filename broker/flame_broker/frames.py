"""Records to signed bytes and back.

A frame is::

    "FLM" · version u8 · key id 4 · HMAC-SHA256 32 · msgpack [kind, queue, …, items]

The signature covers the first eight bytes and the payload, and the payload begins with the
circumstances: the queue it is meant for, reply address, attempt, expiry. So a frame that was moved
to another queue, or changed in flight, does not hold (PROTOCOL.md, rule 1).

``decode`` trusts nothing: whatever bytes it is given, it returns a record or raises one of
``MalformedMessage``, ``VersionMismatch``, ``UnknownKey``, ``SignatureError``. It never unpickles.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Final, NamedTuple, cast

import msgpack

from flame_broker.errors import (
    MalformedMessage,
    PayloadTooLarge,
    SignatureError,
    UnknownKey,
    VersionMismatch,
)
from flame_broker.keys import KEY_ID_BYTES, Key, Keyring
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    Claim,
    ControlFrame,
    Deposit,
    Event,
    EventFrame,
    EventKind,
    Frame,
    Limitation,
    Result,
    ResultFrame,
    RetryPolicy,
    Status,
    Suspicion,
    Target,
    parse_call_id,
)
from flame_broker.objects import ObjectRef, is_sha256
from flame_broker.signing import SIGNATURE_BYTES, sign, verify

__all__ = [
    "FORMAT_VERSION",
    "MAX_FRAME_BYTES",
    "Opened",
    "decode",
    "encode",
    "identity",
    "open_frame",
    "reread",
    "resign",
]

FORMAT_VERSION: Final = 1
"""Written into every frame; a frame of a higher one is refused, not guessed at."""

MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
"""Larger bodies are refused unread: payloads over 64 KiB belong into the object store."""

_MAGIC: Final = b"FLM"
_PREFIX_BYTES: Final = len(_MAGIC) + 1 + KEY_ID_BYTES
_BODY_AT: Final = _PREFIX_BYTES + SIGNATURE_BYTES
_CALLS, _RESULTS, _EVENTS, _CONTROL, _DEPOSIT, _CLAIM = range(6)
_MAX_CALLS: Final = 2048  # far above what a client sends; a slot takes several such frames
_MAX_ATTEMPTS: Final = 1_000_000
_MAX_SECONDS: Final = 1e9  # the timers of an operating system end somewhere
_STATUSES: Final = {int(status): status for status in Status}
_KINDS: Final = {kind.value: kind for kind in EventKind}
_SUSPICIONS: Final = {int(suspicion): suspicion for suspicion in Suspicion}

_pack = msgpack.Packer(use_bin_type=True, unicode_errors="surrogatepass").pack


class Opened(NamedTuple):
    """A decoded frame and the key that it was signed with, which signs the answer."""

    frame: Frame
    key: Key


def encode(frame: Frame, key: Key) -> bytes:
    """Turn a record into signed bytes.

    Raises:
        PayloadTooLarge: Nobody would take it; its values belong into the object store.
    """
    payload = cast(bytes, _pack(_ENCODERS[type(frame)](frame)))
    if len(payload) > MAX_FRAME_BYTES - _BODY_AT:
        raise PayloadTooLarge(
            f"a message of {len(payload)} bytes; the limit is {MAX_FRAME_BYTES}: pass fewer object "
            "references or smaller values in one call, or put them into one object"
        )
    prefix = _MAGIC + bytes((FORMAT_VERSION,)) + key.id
    return prefix + sign(key, prefix, payload) + payload


def decode(
    body: bytes, keyring: Keyring, *, queue: str | None = None, also: Container[str] = ()
) -> Frame:
    """Check and decode a frame; see ``open_frame``."""
    return open_frame(body, keyring, queue=queue, also=also).frame


def open_frame(
    body: bytes, keyring: Keyring, *, queue: str | None = None, also: Container[str] = ()
) -> Opened:
    """Check and decode a frame.

    Args:
        body: What arrived.
        keyring: The keys whose signatures count.
        queue: Where it arrived; None to read a frame outside its queue (tools do).
        also: Other queues whose frames may arrive there.

    Raises:
        MalformedMessage: Truncated, oversized, or not one of our records.
        VersionMismatch: Of a newer format version.
        UnknownKey: Signed with a key that ``keyring`` does not hold.
        SignatureError: A known key, but the signature does not hold, or not for this queue.
    """
    key = _find_key(body, keyring)
    verify(key, body[_PREFIX_BYTES:_BODY_AT], body[:_PREFIX_BYTES], memoryview(body)[_BODY_AT:])
    frame = _read(memoryview(body)[_BODY_AT:])
    if queue is not None and frame.queue != queue and frame.queue not in also:
        raise SignatureError(f"a frame signed for the queue {frame.queue!r} arrived in {queue!r}")
    return Opened(frame, key)


def reread(body: bytes) -> Frame:
    """Decode a frame whose signature was checked when it arrived, as it was stored.

    Raises:
        MalformedMessage: It was not stored whole.
    """
    return _read(memoryview(body)[_BODY_AT:])


def resign(body: bytes, by: Key, key: Key) -> bytes:
    """The same frame, signed with another key of the same id; the payload is not looked at.

    Raises:
        MalformedMessage: Truncated, or not one of our frames.
        SignatureError: ``by`` did not sign it.
    """
    if len(body) < _BODY_AT or not body.startswith(_MAGIC):
        raise MalformedMessage("these bytes are not a frame")
    prefix, payload = body[:_PREFIX_BYTES], memoryview(body)[_BODY_AT:]
    verify(by, body[_PREFIX_BYTES:_BODY_AT], prefix, payload)
    return prefix + sign(key, prefix, payload) + bytes(payload)


def identity(body: bytes) -> bytes:
    """What two copies of the same message share and no two messages do: the signature."""
    return body[_PREFIX_BYTES:_BODY_AT]


def _find_key(body: bytes, keyring: Keyring) -> Key:
    if len(body) > MAX_FRAME_BYTES:
        raise MalformedMessage(f"a message of {len(body)} bytes; the limit is {MAX_FRAME_BYTES}")
    if len(body) <= _BODY_AT or not body.startswith(_MAGIC):
        raise MalformedMessage(f"{len(body)} bytes that do not begin like a frame")
    version = body[len(_MAGIC)]
    if version != FORMAT_VERSION:
        raise VersionMismatch(
            f"a frame of format {version}; this process reads {FORMAT_VERSION}: upgrade Flame here"
        )
    key_id = body[len(_MAGIC) + 1 : _PREFIX_BYTES]
    key = keyring.find(key_id)
    if key is None:
        raise UnknownKey(f"a frame signed with the key {key_id.hex()}, which is not held here")
    return key


def _read(payload: memoryview) -> Frame:
    try:
        fields = msgpack.unpackb(
            payload, use_list=False, strict_map_key=False, unicode_errors="surrogatepass"
        )
        decoder = _DECODERS[fields[0]]
        return decoder(*fields[1:])
    # Everything that a wrong length, type or value can raise on its way into a record.
    except (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException) as exc:
        raise MalformedMessage(f"a signed frame that is no record of ours: {exc!r}") from exc


def _check(value: object, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where a {kind} is expected")
    return value


def _seconds(value: object) -> float:
    """Timers are set by it: one that is not a number would stop all others."""
    seconds: float = _check(value, (int, float))
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{seconds} is no duration")
    return min(seconds, _MAX_SECONDS)


def _encode_calls(frame: CallFrame) -> tuple[object, ...]:
    spec, target = frame.spec, frame.spec.target
    return (
        _CALLS,
        frame.queue,
        frame.reply,
        frame.client,
        frame.attempt,
        frame.strikes,
        int(frame.suspicion),
        frame.handed,
        frame.expires_at,
        (target.name, target.sha256, target.size, target.python),
        _encode_spec(spec),
        [call[:2] if not call[2] else _call_with_refs(call) for call in frame.calls],
    )


def _encode_spec(spec: CallSpec) -> tuple[object, ...]:
    fields = (spec.resources, spec.timeout_s, spec.grace_s, spec.echo, spec.label, spec.track)
    if spec.at_most_once:
        return *fields, spec.retry_on, spec.exit_codes, True
    if spec.retry_on or spec.exit_codes:
        return *fields, spec.retry_on, spec.exit_codes
    return fields


def _call_with_refs(call: Call) -> tuple[object, ...]:
    return call.counter, call.payload, [tuple(ref.to_wire()) for ref in call.refs]


def _decode_calls(  # noqa: PLR0913, PLR0917  # one parameter a field on the wire
    queue: str,
    reply: str,
    client: str,
    attempt: int,
    strikes: int,
    suspicion: int,
    handed: int,
    expires_at: float,
    target: tuple[Any, ...],
    spec: tuple[Any, ...],
    items: tuple[Any, ...],
) -> CallFrame:
    if not 0 < len(items) <= _MAX_CALLS:
        raise ValueError(f"a frame of {len(items)} calls")
    return CallFrame(
        queue=_check(queue, str),
        reply=_check(reply, str),
        client=_check(client, str),
        spec=_spec(_target(*target), *spec),
        calls=tuple([_call(*item) for item in items]),
        attempt=_check(attempt, int),
        strikes=_check(strikes, int),
        suspicion=_SUSPICIONS[suspicion],
        handed=_check(handed, int),
        expires_at=_check(expires_at, (int, float)),
    )


def _target(name: str, sha256: str, size: int, python: str) -> Target:
    if _check(sha256, str) and not is_sha256(sha256):
        raise ValueError("a target by value has a sha256 that is not 64 hex digits")
    return Target(_check(name, str), sha256, _check(size, int), _check(python, str))


def _spec(  # noqa: PLR0913, PLR0917  # one parameter a field on the wire
    target: Target,
    resources: str,
    timeout_s: float,
    grace_s: float,
    echo: bool,
    label: str,
    track: bool,
    retry_on: tuple[Any, ...] = (),
    exit_codes: tuple[Any, ...] = (),
    at_most_once: bool = False,
) -> CallSpec:
    return CallSpec(
        target=target,
        resources=_check(resources, str),
        timeout_s=_seconds(timeout_s),
        grace_s=_seconds(grace_s),
        echo=_check(echo, bool),
        label=_check(label, str),
        track=_check(track, bool),
        retry_on=tuple([_check(name, str) for name in retry_on]),
        exit_codes=tuple([_check(code, int) for code in exit_codes]),
        at_most_once=_check(at_most_once, bool),
    )


def _call(counter: int, payload: bytes, refs: tuple[Any, ...] = ()) -> Call:
    if type(counter) is not int or type(payload) is not bytes:
        raise TypeError("a call is a number and bytes")
    return Call(counter, payload, tuple([ObjectRef.from_wire(ref) for ref in refs]))


def _encode_results(frame: ResultFrame) -> tuple[object, ...]:
    items = [r[:3] if r[3] is None and not r[4] else _result_with_ref(r) for r in frame.results]
    head = (_RESULTS, frame.queue, frame.client, frame.worker, frame.attempt, frame.seconds)
    return *head, items


def _result_with_ref(result: Result) -> tuple[object, ...]:
    counter, status, payload, ref, index = result
    return counter, status, payload, None if ref is None else tuple(ref.to_wire()), index


def _decode_results(
    queue: str,
    client: str,
    worker: str,
    attempt: int,
    seconds: float,
    items: tuple[Any, ...],
) -> ResultFrame:
    return ResultFrame(
        queue=_check(queue, str),
        client=_check(client, str),
        worker=_check(worker, str),
        results=tuple([_result(*item) for item in items]),
        attempt=_check(attempt, int),
        seconds=_check(seconds, (int, float)),
    )


def _result(
    counter: int, status: int, payload: bytes, ref: tuple[Any, ...] | None = None, index: int = 0
) -> Result:
    if type(counter) is not int or type(payload) is not bytes or type(index) is not int:
        raise TypeError("a result is a number, a status and bytes")
    loaded = None if ref is None else ObjectRef.from_wire(ref)
    return Result(counter, _STATUSES[status], payload, loaded, index)


def _encode_events(frame: EventFrame) -> tuple[object, ...]:
    events = [e if e[4:] != (0, 0) else e[:4] for e in frame.events]
    head = (_EVENTS, frame.queue, frame.client, frame.worker, frame.label, events)
    return *head, frame.attempt, frame.at, frame.echo


def _decode_events(  # noqa: PLR0917  # one parameter a field on the wire
    queue: str,
    client: str,
    worker: str,
    label: str,
    items: tuple[Any, ...],
    attempt: int = 1,
    at: float = 0.0,
    echo: bool = True,
) -> EventFrame:
    return EventFrame(
        queue=_check(queue, str),
        client=_check(client, str),
        worker=_check(worker, str),
        label=_check(label, str),
        events=tuple([_event(*item) for item in items]),
        attempt=_check(attempt, int),
        at=_seconds_since_1970(at),
        echo=_check(echo, bool),
    )


def _event(
    counter: int, kind: str, text: str, fraction: float, run: int = 0, index: int = 0
) -> Event:
    if type(counter) is not int or type(text) is not str:
        raise TypeError("an event is a number, a kind and a text")
    if type(run) is not int or type(index) is not int or run < 0 or index < 0:
        raise ValueError("the lines of a run are counted from 0 on")
    return Event(counter, _KINDS[kind], text, _check(fraction, (int, float)), run, index)


def _encode_control(frame: ControlFrame) -> tuple[object, ...]:
    return _CONTROL, frame.queue, frame.verb, dict(frame.arguments)


def _decode_control(queue: str, verb: str, arguments: Mapping[str, Any]) -> ControlFrame:
    named = {_check(name, str): value for name, value in _check(arguments, dict).items()}
    return ControlFrame(_check(queue, str), _check(verb, str), named)


def _encode_deposit(frame: Deposit) -> tuple[object, ...]:
    retry = frame.retry
    policy = None if retry is None else (
        retry.attempts, retry.backoff_s, retry.factor, retry.jitter
    )  # fmt: skip
    calls = _encode_calls(frame.frame)[1:]
    head = (_DEPOSIT, frame.queue, frame.due, frame.keys, policy, frame.queue_timeout_s, calls)
    return (*head, frame.after, frame.limits) if frame.after or frame.limits else head


def _decode_deposit(  # noqa: PLR0917  # one parameter a field on the wire
    queue: str,
    due: tuple[Any, ...],
    keys: tuple[Any, ...],
    policy: tuple[Any, ...] | None,
    queue_timeout_s: float,
    calls: tuple[Any, ...],
    after: tuple[Any, ...] = (),
    limits: tuple[Any, ...] = (),
) -> Deposit:
    frame = _decode_calls(*calls)
    number = len(frame.calls)
    if not len(due) == len(keys) == number or {len(after), len(limits)} - {0, number}:
        raise ValueError(f"a deposit of {number} calls with terms for more or fewer of them")
    return Deposit(
        queue=_check(queue, str),
        frame=frame,
        due=tuple([_seconds_since_1970(at) for at in due]),
        keys=tuple([_check(key, str) for key in keys]),
        retry=None if policy is None else _policy(*policy),
        queue_timeout_s=_seconds(queue_timeout_s),
        after=tuple([tuple([_call_id(call) for call in calls]) for calls in after]),
        limits=tuple([None if limit is None else _limitation(*limit) for limit in limits]),
    )


def _call_id(text: object) -> str:
    parse_call_id(_check(text, str))
    return cast(str, text)


def _limitation(key: str, calls: int) -> Limitation:
    if not 0 < _check(calls, int) <= _MAX_ATTEMPTS:
        raise ValueError(f"a limit of {calls} calls")
    return Limitation(_check(key, str), calls)


def _encode_claim(claim: Claim) -> tuple[object, ...]:
    calls = _encode_calls(claim.frame)[1:]
    return _CLAIM, claim.queue, claim.run, claim.worker, claim.reply, claim.look, calls


def _decode_claim(
    queue: str, run: str, worker: str, reply: str, look: bool, calls: tuple[Any, ...]
) -> Claim:
    return Claim(
        queue=_check(queue, str),
        frame=_decode_calls(*calls),
        run=_check(run, str),
        worker=_check(worker, str),
        reply=_check(reply, str),
        look=_check(look, bool),
    )


def _policy(attempts: int, backoff_s: float, factor: float, jitter: bool) -> RetryPolicy:
    if not 0 < _check(attempts, int) <= _MAX_ATTEMPTS:
        raise ValueError(f"{attempts} attempts")
    return RetryPolicy(attempts, _seconds(backoff_s), _seconds(factor), _check(jitter, bool))


def _seconds_since_1970(value: object) -> float:
    at: float = _check(value, (int, float))
    if not 0 <= at < float("inf"):
        raise ValueError(f"{at} is no time")
    return float(at)


_ENCODERS: Final[dict[type, Callable[[Any], tuple[object, ...]]]] = {
    CallFrame: _encode_calls,
    ResultFrame: _encode_results,
    EventFrame: _encode_events,
    ControlFrame: _encode_control,
    Deposit: _encode_deposit,
    Claim: _encode_claim,
}
_DECODERS: Final[dict[int, Callable[..., Frame]]] = {
    _CALLS: _decode_calls,
    _RESULTS: _decode_results,
    _EVENTS: _decode_events,
    _CONTROL: _decode_control,
    _DEPOSIT: _decode_deposit,
    _CLAIM: _decode_claim,
}
