"""Cluster keys: the secret that says who may run code on the workers.

A key is text of 32 bytes or more. It is never used as it stands: HKDF-SHA256 derives one subkey
for signing, one for encryption, and a short public *key id* that queue names and frames carry.
None of the three reveals another.

Several keys may be held at once, for rotation: the first signs, all of them verify.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from flame_broker.errors import ConfigError

__all__ = [
    "KEY_FILE_NAME",
    "KEY_ID_BYTES",
    "MIN_KEY_BYTES",
    "Key",
    "Keyring",
    "ensure_key_file",
    "generate_key",
    "hkdf_sha256",
    "load_key_file",
]

MIN_KEY_BYTES = 32
"""The shortest key text that is accepted, in bytes."""

KEY_ID_BYTES = 4
"""Length of a key id: enough to tell the keys of one cluster apart, and no more is promised."""

KEY_FILE_NAME = "key"
"""The key file's name inside ``FLAME_HOME``."""

_SALT = b"flame.v1"
_HASH_BYTES = hashlib.sha256().digest_size
_KEY_FILE_LIMIT_BYTES = 64 * 1024
_STAND_IN = re.compile(r"stand-in:([0-9a-f]{8}):(.*)")
_ADVICE = "make one with `flame config key`"


def hkdf_sha256(secret: bytes, *, info: bytes, salt: bytes = b"", length: int = 32) -> bytes:
    """Derive ``length`` bytes from a secret, as RFC 5869 says (extract, then expand).

    Args:
        secret: The input keying material.
        info: What the result is for; another label gives an independent result.
        salt: Public; empty means a block of zeros.
        length: Bytes wanted, at most 255 × 32.
    """
    pseudo_random_key = hmac.digest(salt or bytes(_HASH_BYTES), secret, "sha256")
    block, derived = b"", b""
    for counter in range(1, -(-length // _HASH_BYTES) + 1):
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), "sha256")
        derived += block
    return derived[:length]


class Key:
    """One cluster key and what is derived from it.

    It can't be pickled or printed, so that it never travels to a child or into a log by accident.

    Attributes:
        id: Public key id, 4 raw bytes, as frames carry it.
        hex_id: The same as 8 hex digits, as queue names carry it.
        signing: Subkey for HMAC-SHA256, 32 bytes.
        encryption: Subkey for sealed fields, 32 bytes.
    """

    __slots__ = ("encryption", "hex_id", "id", "signing")

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_KEY_BYTES:
            raise ConfigError(
                f"the key has {len(secret)} bytes, {MIN_KEY_BYTES} or more are needed: {_ADVICE}"
            )
        self.signing = hkdf_sha256(secret, salt=_SALT, info=b"signing")
        self.encryption = hkdf_sha256(secret, salt=_SALT, info=b"encryption")
        self.id = hkdf_sha256(secret, salt=_SALT, info=b"key id", length=KEY_ID_BYTES)
        self.hex_id = self.id.hex()

    @classmethod
    def stand_in(cls, hex_id: str, secret: bytes) -> Key:
        """A key that goes by another one's id, and signs and opens nothing of that one's.

        A worker gives it to its children: queues keep their names, and the worker replaces the
        signatures of what passes through it (see ``bridged``).
        """
        key = cls(secret)
        key.id, key.hex_id = bytes.fromhex(hex_id), hex_id
        return key

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read a key from text; blanks around it do not count.

        ``stand-in:ID:SECRET`` is a stand-in.

        Raises:
            ConfigError: It is shorter than 32 bytes, or holds blanks or commas.
        """
        text = text.strip()
        if re.search(r"[\s,]", text):
            raise ConfigError(f"a key holds no blanks or commas: {_ADVICE}")
        match = _STAND_IN.fullmatch(text)
        if match is not None:
            return cls.stand_in(match[1], match[2].encode())
        return cls(text.encode())

    def __repr__(self) -> str:
        return f"Key(id={self.hex_id}, secret=***)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self.signing, other.signing)

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster key is never pickled: it must not leave this process")


class Keyring:
    """The keys a process holds: the first signs, all of them verify.

    Args:
        keys: One key or more; a key named twice counts once.

    Raises:
        ConfigError: There is no key, or two different keys have the same id.
    """

    __slots__ = ("_by_id", "signer")

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_id: dict[bytes, Key] = {}
        for key in keys:
            if self._by_id.setdefault(key.id, key) != key:
                raise ConfigError(f"two different keys have the id {key.hex_id}: replace one")
        if not self._by_id:
            raise ConfigError(f"no key given: {_ADVICE}")
        self.signer = next(iter(self._by_id.values()))

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read several keys with ``,`` between them; a single one is fine too.

        Raises:
            ConfigError: None is given, or one is too short; the message says which, never what.
        """
        parts = [part for part in (part.strip() for part in text.split(",")) if part]
        keys = []
        for number, part in enumerate(parts, start=1):
            try:
                keys.append(Key.parse(part))
            except ConfigError as error:
                place = f"key {number} of {len(parts)}: " if len(parts) > 1 else ""
                raise ConfigError(f"{place}{error}") from None
        return cls(keys)

    def find(self, key_id: bytes) -> Key | None:
        """The key with this id, or None if another process may hold it."""
        return self._by_id.get(key_id)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all keys as hex digits, the signer's first."""
        return tuple(key.hex_id for key in self)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __repr__(self) -> str:
        return f"Keyring(ids={', '.join(self.ids)}, secrets=***)"


def generate_key() -> str:
    """A new key: 32 random bytes as URL-safe text (43 characters)."""
    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


def load_key_file(path: Path) -> Keyring:
    """Read a key file: keys separated by commas or lines; ``#`` starts a comment line.

    Raises:
        ConfigError: It can't be read, others may read it, or what it holds is no key.
    """
    try:
        text = _read_private(path)
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        return Keyring.parse(",".join(lines))
    except ConfigError as error:
        raise ConfigError(f"key file {path}: {error}") from error.__cause__


def ensure_key_file(home: Path) -> Path:
    """The key file of ``home``; made with mode 600 if it is not there.

    Processes that race here end up with the same key: the file appears whole, under its name, once.

    Raises:
        ConfigError: The folder or file can't be made.
    """
    path = home / KEY_FILE_NAME
    if path.exists():
        return path
    draft = home / f".{KEY_FILE_NAME}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(draft, "x", encoding="ascii", opener=_private_opener) as file:
            file.write(generate_key() + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first: its key counts
            os.link(draft, path)
    except OSError as error:
        raise ConfigError(
            f"cannot make the key file {path}: {error.strerror}; set FLAME_KEY or FLAME_HOME"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return path


def _private_opener(path: str, flags: int) -> int:
    """Opens so that no other user may ever read the file, not even for a moment."""
    return os.open(path, flags, 0o600)


def _read_private(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"its mode is {mode:03o}, so others may read it: run `chmod 600 {path}`"
                )
            return file.read(_KEY_FILE_LIMIT_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not text") from error
