"""Which bindings a routing key goes to, as AMQP 0-9-1 defines it."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["binding_takes"]


@lru_cache(maxsize=4096)
def binding_takes(kind: str, pattern: str, key: str) -> bool:
    """Whether a binding of an exchange of this kind takes a message.

    Args:
        kind: ``fanout`` (all), ``direct`` (the same key) or ``topic`` (words with dots between
            them; in the pattern ``*`` stands for one word and ``#`` for any number).
        pattern: The binding's key.
        key: The message's routing key.
    """
    if kind != "topic":
        return kind == "fanout" or pattern == key
    return _words_match(tuple(pattern.split(".")), tuple(key.split(".")))


def _words_match(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return _words_match(pattern[1:], words) or bool(words and _words_match(pattern, words[1:]))
    return bool(words) and pattern[0] in ("*", words[0]) and _words_match(pattern[1:], words[1:])
