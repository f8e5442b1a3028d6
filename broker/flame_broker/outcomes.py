"""How a call that did not succeed is described on the wire.

An ``ERROR`` is an exception of the user's code: a description that anything can read, and the
pickled exception where it survives a round trip. A ``FAILED`` names one of our own error classes.
"""

from __future__ import annotations

import traceback as tracebacks
from typing import Any, cast

import msgpack

from flame_broker import errors
from flame_broker.codec import ResultPickler, decode_value, encode_value
from flame_broker.errors import CallError, FlameError, MalformedMessage, RemoteError
from flame_broker.messages import Result, Status

__all__ = ["decode_error", "decode_failure", "describe", "encode_error", "encode_failure"]

_TEXT_BYTES = 32 * 1024
"""Three such texts and a pickle of that size fit into the smallest message that a broker takes
(180 KiB of SQS), beside the 64 KiB of other results."""


def encode_error(exc: BaseException) -> bytes:
    """Describe an exception of the user's code, with its traceback and, if possible, itself."""
    kind = type(exc)
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        message, traceback = _message_of(exc), "".join(tracebacks.format_exception(exc))
        pickled = _rebuildable(exc)
    # A class may raise from the very attributes that a description needs (__getattr__, __notes__).
    except Exception as problem:  # noqa: BLE001
        message = f"<it cannot be described: {type(problem).__name__}>"
        traceback = "".join(tracebacks.format_tb(exc.__traceback__)) + f"{name}: {message}\n"
        pickled = None
    fields = [_clip(name), _clip(message), _clip(traceback), pickled]
    return cast(bytes, msgpack.packb(fields, unicode_errors="surrogatepass"))


def _rebuildable(exc: BaseException) -> bytes | None:
    """The pickled exception, if it can be loaded again (many with a custom ``__init__`` can't)."""
    try:
        payload = encode_value(exc, pickler=ResultPickler).join()
        decode_value(payload)
    except FlameError:
        return None
    return payload if len(payload) <= _TEXT_BYTES else None


def decode_error(payload: bytes, call_id: str) -> BaseException:
    """The exception, itself if possible, with the remote traceback as its cause.

    UNSAFE: it may unpickle; verify where the payload comes from first.
    """
    type_name, message, traceback, pickled = _unpack(payload, 4)
    remote = RemoteError(message, call_id, type_name, traceback)
    if pickled is None:
        return remote
    try:
        exc = decode_value(pickled)
    except FlameError:  # the class is missing or different here; the description has to do
        return remote
    if not isinstance(exc, BaseException):
        return remote
    exc.__cause__ = remote
    return exc


def encode_failure(kind: type[FlameError], message: str) -> bytes:
    """Name one of our own errors."""
    fields = [kind.__name__, _clip(message)]
    return cast(bytes, msgpack.packb(fields, unicode_errors="surrogatepass"))


def decode_failure(payload: bytes, call_id: str, label: str = "") -> FlameError:
    """The error that ``encode_failure`` named; its message begins with what was called.

    Raises:
        MalformedMessage: Not such a payload, or no error of ours.
    """
    name, message = _unpack(payload, 2)
    kind = getattr(errors, str(name), None) if name in errors.__all__ else None
    if kind is None:
        raise MalformedMessage(f"a result names the unknown error {name!r}")
    if label:
        message = f"{label}: {message}"
    return cast(
        FlameError, kind(message, call_id) if issubclass(kind, CallError) else kind(message)
    )


def describe(result: Result) -> tuple[str, str]:
    """Name and message of what went wrong, for people; nothing is unpickled.

    Raises:
        MalformedMessage: The payload describes no failure.
    """
    length = 4 if result.status in (Status.ERROR, Status.AGAIN) else 2
    name, message = _unpack(result.payload, length)[:2]
    return str(name).removeprefix("builtins."), str(message)


def _unpack(payload: bytes, length: int) -> list[Any]:
    try:
        fields = msgpack.unpackb(payload, unicode_errors="surrogatepass")
    except (ValueError, msgpack.UnpackException) as exc:
        raise MalformedMessage(f"an outcome that is not msgpack: {exc}") from exc
    if not isinstance(fields, list) or len(fields) != length:
        raise MalformedMessage(f"an outcome that has not {length} fields")
    return fields


def _message_of(exc: BaseException) -> str:
    """``str(exc)`` as the standard library renders it, which outlives a bad ``__str__``."""
    rendered = "".join(tracebacks.TracebackException.from_exception(exc).format_exception_only())
    return rendered.partition(": ")[2].removesuffix("\n")


def _clip(text: str) -> str:
    """Begin and end of a text, in no more bytes than a result has room for."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) <= _TEXT_BYTES:
        return text
    half = _TEXT_BYTES // 2
    head, tail = (part.decode("utf-8", "ignore") for part in (raw[:half], raw[-half:]))
    return f"{head}\n… {len(raw) - 2 * half} bytes left out …\n{tail}"
