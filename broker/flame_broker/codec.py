"""Values to bytes and back.

A payload begins with a tag byte. ``PLAIN`` is msgpack of plain data: exactly ``None``, ``bool``,
``int``, ``float``, ``str``, ``bytes``, ``list`` and ``dict``; anything can read it. ``PICKLED`` is
cloudpickle at protocol 5 with its buffers out of band::

    tag u8 · 3 zero bytes · buffers u32 · pickle bytes u64 · each buffer's bytes u64
    pickle · padding · buffer · padding · buffer …

Every buffer starts at a multiple of 64 bytes, so an array in a memory-mapped file is used where
it lies, and ten processes share one copy. Such arrays are read-only.

Decoding a ``PICKLED`` payload runs code. Callers verify a signature first (PROTOCOL.md, P6).
"""

from __future__ import annotations

import io
import pickle
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, NoneType
from typing import Any, Final, NamedTuple, cast

import cloudpickle
import msgpack

from flame_broker.by_value import CachedFunction, reduce_cached, reduce_module
from flame_broker.classes import by_reference
from flame_broker.errors import FlameError, MalformedMessage, PackagingError
from flame_broker.objects import ObjectRef

__all__ = [
    "Encoded",
    "LoadRef",
    "ResultPickler",
    "ValuePickler",
    "decode_arguments",
    "decode_value",
    "encode_arguments",
    "encode_scalars",
    "encode_value",
    "is_plain",
]

PLAIN: Final = 0
PICKLED: Final = 1
ALIGNMENT: Final = 64
"""Bytes; the widest vector registers and cache lines of today's machines."""

_MAX_PLAIN_DEPTH: Final = 32
_HEAD: Final = struct.Struct("<B3xIQ")
_SCALARS: Final = frozenset({NoneType, bool, int, float, str, bytes})
_PLAIN_TAG: Final = b"\x00"

LoadRef = Callable[[ObjectRef], object]

# One packer for all threads: plain data runs no Python code, so the interpreter lock is not
# released half-way; a packer a call would allocate 256 KiB each time.
_pack = msgpack.Packer(use_bin_type=True).pack


class Encoded(NamedTuple):
    """A payload in pieces, so that a large buffer is never copied.

    Attributes:
        segments: The payload is their concatenation.
        nbytes: Its length.
        refs: Objects that the value refers to.
    """

    segments: tuple[bytes | memoryview, ...]
    nbytes: int
    refs: tuple[ObjectRef, ...] = ()

    def join(self) -> bytes:
        """The payload in one piece."""
        return b"".join(self.segments)  # a single ``bytes`` comes back itself, not copied


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    """Pickles what the client sends: code by value where cloudpickle does so, refs collected."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.refs: list[ObjectRef] = []

    def reducer_override(self, obj: Any) -> Any:
        """Send an ``ObjectRef`` as "the object it names"; the rest as cloudpickle would."""
        if type(obj) is ObjectRef:
            self.refs.append(obj)
            return _resolve_ref, tuple(obj.to_wire())
        if type(obj) is CachedFunction:
            return reduce_cached(obj)
        if type(obj) is ModuleType:
            return reduce_module(obj)
        return super().reducer_override(obj)


class ResultPickler(ValuePickler):
    """Pickles what a child sends back: a class that came from the client goes by reference.

    By value, it would redefine the client's own class: methods replaced, attributes reset.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Name the client's classes instead of describing them."""
        if isinstance(obj, type):
            reference = by_reference(obj)
            if reference is not None:
                return reference
        return super().reducer_override(obj)


def is_plain(value: object, depth: int = 0) -> bool:
    """Whether msgpack gives back exactly this: no subclass, no tuple, no bytearray, no cycle."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is list:
        return _all_plain(cast("list[object]", value), depth)
    if kind is dict:
        mapping = cast("dict[object, object]", value)
        return set(map(type, mapping)) <= _SCALARS and _all_plain([*mapping.values()], depth)
    return False


def _all_plain(values: Sequence[object], depth: int) -> bool:
    kinds = set(map(type, values))
    if kinds <= _SCALARS:
        return True
    if depth >= _MAX_PLAIN_DEPTH or not kinds <= _SCALARS | {list, dict}:
        return False
    return all(is_plain(value, depth + 1) for value in values)


def encode_value(value: object, *, pickler: type[ValuePickler] = ValuePickler) -> Encoded:
    """Encode one value.

    Raises:
        PackagingError: Something in it cannot be pickled; the message names the type.
    """
    if is_plain(value):
        plain = _encode_plain(value)
        if plain is not None:
            return Encoded((plain,), len(plain))
    return _encode_pickled(value, pickler)


def encode_scalars(args: tuple[object, ...]) -> bytes | None:
    """The payload of arguments that are numbers and text, as most are; None for any others."""
    if not _SCALARS.issuperset(map(type, args)):
        return None
    return _encode_plain((args,))


def encode_arguments(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Encoded:
    """Encode the arguments of one call; see ``encode_value``."""
    if _all_plain(args, 0) and (not kwargs or is_plain(kwargs)):
        plain = _encode_plain([[*args], kwargs] if kwargs else [args])
        if plain is not None:
            return Encoded((plain,), len(plain))
    return _encode_pickled((args, dict(kwargs)), ValuePickler)


def _encode_plain(value: object) -> bytes | None:
    """None where msgpack has no form for it: an integer over 64 bits, half a surrogate pair."""
    try:
        return _PLAIN_TAG + _pack(value)  # type: ignore[no-any-return]  # a cast costs 0.1 µs
    except (OverflowError, ValueError):
        return None


def _encode_pickled(value: object, pickler_class: type[ValuePickler]) -> Encoded:
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = pickler_class(file, buffers)
    try:
        pickler.dump(value)
    except RecursionError as exc:
        raise PackagingError(f"a {_type_name(value)} is nested too deeply to be pickled") from exc
    # Any exception may come out of a user's __reduce__ or __getstate__.
    except Exception as exc:
        raise PackagingError(f"a {_type_name(value)} cannot be pickled: {exc}") from exc
    return _lay_out(file.getbuffer(), [b.raw() for b in buffers], tuple(pickler.refs))


def _lay_out(
    pickled: memoryview, buffers: list[memoryview], refs: tuple[ObjectRef, ...]
) -> Encoded:
    head = _HEAD.pack(PICKLED, len(buffers), pickled.nbytes)
    lengths = struct.pack(f"<{len(buffers)}Q", *(b.nbytes for b in buffers))
    segments: list[bytes | memoryview] = [head + lengths + bytes(pickled)]
    position = len(segments[0])
    for buffer in buffers:
        padding = -position % ALIGNMENT
        segments += [bytes(padding), buffer]
        position += padding + buffer.nbytes
    return Encoded(tuple(segments), position, refs)


def decode_value(payload: bytes | memoryview, *, load_ref: LoadRef | None = None) -> Any:
    """Decode one value. UNSAFE: it may unpickle; verify where the payload comes from first.

    Args:
        payload: What ``encode_value`` gave, possibly memory-mapped.
        load_ref: Called for each ``ObjectRef`` inside; without it refs stay refs.

    Raises:
        MalformedMessage: Not a payload.
        PackagingError: The pickled object's own code raised, which is the cause.
        FlameError: Whatever ``load_ref`` raises.
    """
    if not payload:
        raise MalformedMessage("an empty payload; expected a tag byte")
    if payload[0] == PLAIN:
        return _unpack(payload[1:])
    if payload[0] == PICKLED:
        with _loading(load_ref):
            return _decode_pickled(memoryview(payload))
    raise MalformedMessage(f"unknown payload tag {payload[0]}; expected {PLAIN} or {PICKLED}")


def decode_arguments(
    payload: bytes | memoryview, *, load_ref: LoadRef | None = None
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Decode the arguments of a call; see ``decode_value``."""
    value = decode_value(payload, load_ref=load_ref)
    if len(value) == 1:
        return value[0], {}
    return value[0], value[1]


def _unpack(body: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as exc:
        raise MalformedMessage(f"a plain payload that is not msgpack: {exc}") from exc


def _decode_pickled(view: memoryview) -> Any:
    try:
        _, count, pickle_bytes = _HEAD.unpack_from(view)
        lengths = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    except struct.error as exc:
        raise MalformedMessage(f"a truncated payload: {exc}") from exc
    if count and type(view.obj) is bytes:
        # An array of a small value is the receiver's own, to be changed; a mapped one is shared.
        view = memoryview(bytearray(view))
    start = _HEAD.size + 8 * count
    position = start + pickle_bytes
    buffers = []
    for length in lengths:
        position += -position % ALIGNMENT
        buffers.append(view[position : position + length])
        position += length
    if position > view.nbytes:
        raise MalformedMessage(f"a truncated payload: {view.nbytes} bytes of {position}")
    return _unpickle(view[start : start + pickle_bytes], buffers)


def _unpickle(view: memoryview, buffers: Sequence[memoryview]) -> Any:
    try:
        return pickle.loads(view, buffers=buffers)
    except FlameError:  # from load_ref
        raise
    # Unpickling runs code of the user's classes, and imports their modules: anything may come.
    except Exception as exc:
        raise PackagingError(
            f"a pickled value cannot be rebuilt here: {type(exc).__name__}: {exc}"
        ) from exc


class _Loader(threading.local):
    """Which ``load_ref`` unpickling in this thread should use."""

    load_ref: LoadRef | None = None


_loader = _Loader()


class _loading:  # noqa: N801  # a context manager, read as a verb where it is used
    def __init__(self, load_ref: LoadRef | None) -> None:
        self._load_ref = load_ref

    def __enter__(self) -> None:
        self._before, _loader.load_ref = _loader.load_ref, self._load_ref

    def __exit__(self, *exc_info: object) -> None:
        _loader.load_ref = self._before


def _resolve_ref(*wire: Any) -> object:
    """What an ``ObjectRef`` in a pickle becomes: its object, or itself where none can be loaded."""
    ref = ObjectRef.from_wire(wire)
    return ref if _loader.load_ref is None else _loader.load_ref(ref)


def _type_name(value: object) -> str:
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"
