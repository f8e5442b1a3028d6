"""``ObjectRef``: the name of a value in the object store, with what is needed to check it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flame_broker.errors import MalformedMessage

__all__ = ["MAX_KEY_BYTES", "REF_BYTES", "ObjectRef", "is_key", "is_sha256"]

REF_BYTES = 160
"""About what a reference of ours takes in a message."""

MAX_KEY_BYTES = 1024
"""The longest key in bytes of UTF-8; the limit of S3 (its user guide, "Naming objects")."""

_MAX_SIZE = 2**63 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """Where a value lies, and how to know it again.

    Args:
        key: Its key in the store, below the store's prefix.
        size: Its length in bytes.
        sha256: Of its bytes, 64 lower-case hex digits; readers check it.
        version: Counts the updates of a versioned object; 0 for one that never changes.
    """

    key: str
    size: int
    sha256: str
    version: int = 0

    def to_wire(self) -> tuple[str, int, str, int]:
        """The fields as msgpack takes them."""
        return (self.key, self.size, self.sha256, self.version)

    @classmethod
    def from_wire(cls, wire: object) -> ObjectRef:
        """Rebuild a reference that came from outside, trusting nothing.

        Raises:
            MalformedMessage: A field is missing, of another type, or out of its range.
        """
        if not isinstance(wire, (tuple, list)) or len(wire) != 4:
            raise MalformedMessage("an object reference has four fields")
        return cls._checked(wire)

    @classmethod
    def _checked(cls, wire: Sequence[object]) -> ObjectRef:
        key, size, sha256, version = wire
        if not isinstance(key, str) or not is_key(key):
            raise MalformedMessage("an object reference has a key that no store accepts")
        if not isinstance(sha256, str) or not is_sha256(sha256):
            raise MalformedMessage("an object reference has a sha256 that is not 64 hex digits")
        if type(size) is not int or type(version) is not int:
            raise MalformedMessage("an object reference has a size or version that is no integer")
        if not (0 <= size <= _MAX_SIZE and 0 <= version <= _MAX_SIZE):
            raise MalformedMessage("an object reference has a size or version out of range")
        return cls(key, size, sha256, version)


def is_key(text: str) -> bool:
    """Whether every backend takes this as a key: relative, no empty, ``.`` or ``..`` part."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return False
    if not 0 < length <= MAX_KEY_BYTES or _CONTROL.search(text):
        return False
    return not any(part in ("", ".", "..") for part in text.split("/"))


def is_sha256(text: str) -> bool:
    """Whether this is a sha256 as we write it: 64 lower-case hex digits."""
    return _SHA256.fullmatch(text) is not None
