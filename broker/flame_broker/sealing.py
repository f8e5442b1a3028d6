"""Sealed fields: secrets that travel encrypted inside a message.

A sealed field is ``key id (4 bytes) | nonce (12) | AES-256-GCM ciphertext and tag``. The key id and
a *context* (for example the call id) are authenticated with it, so that a sealed value can't be
moved into another message. Nonces are random: by NIST SP 800-38D (section 8.3) one key may seal
2³² fields, which is far above what secrets need.

The limits of it: who holds the cluster key opens everything sealed under it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flame_broker.errors import SignatureError, UnknownKey
from flame_broker.keys import KEY_ID_BYTES, Key, Keyring

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["OVERHEAD_BYTES", "seal", "unseal"]

_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD_BYTES = KEY_ID_BYTES + _NONCE_BYTES

OVERHEAD_BYTES = _HEAD_BYTES + _TAG_BYTES
"""How much longer a sealed field is than its plain text."""


def seal(key: Key, plaintext: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate.

    Args:
        key: The keyring's signer.
        plaintext: What is to be hidden; its length is not.
        context: Where the value belongs; ``unseal`` needs the same.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return key.id + nonce + _cipher(key).encrypt(nonce, plaintext, key.id + context)


def unseal(keyring: Keyring, sealed: bytes, context: bytes) -> bytes:
    """Decrypt what ``seal`` made for the same context.

    Raises:
        UnknownKey: It was sealed under a key that this process does not hold.
        SignatureError: It was changed, cut, moved from another context, or never sealed.
    """
    if len(sealed) < OVERHEAD_BYTES:
        raise SignatureError("a sealed field is cut short")
    key = keyring.find(sealed[:KEY_ID_BYTES])
    if key is None:
        raise UnknownKey(f"a field is sealed under the unknown key {sealed[:KEY_ID_BYTES].hex()}")
    from cryptography.exceptions import InvalidTag

    nonce, ciphertext = sealed[KEY_ID_BYTES:_HEAD_BYTES], sealed[_HEAD_BYTES:]
    try:
        return _cipher(key).decrypt(nonce, ciphertext, key.id + context)
    except InvalidTag as error:
        raise SignatureError(
            f"a field sealed under the key {key.hex_id} was changed or belongs elsewhere"
        ) from error


def _cipher(key: Key) -> AESGCM:
    # Imported here: it costs 30 ms, and only calls that carry secrets need it.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key.encryption)
