"""What a worker says about itself, folded into one value of a heartbeat.

An orchestrator hears many more heartbeats than it is asked about, so it keeps them folded, and who
asks unfolds them. The signature of the heartbeat covers them; they are plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import msgpack

from flame_broker.errors import MalformedMessage
from flame_broker.messages import Plain

__all__ = ["MAX_FACTS_BYTES", "Facts", "fold", "unfold"]

MAX_FACTS_BYTES: Final = 8 * 1024
"""More of one worker is not kept."""

Facts = Mapping[str, Plain]


def fold(facts: Facts) -> bytes:
    """Facts as bytes; texts that are none keep what can be told of them."""
    return cast(bytes, msgpack.packb(facts, unicode_errors="surrogatepass"))


def unfold(folded: bytes) -> dict[str, Plain]:
    """The facts.

    Raises:
        MalformedMessage: These bytes hold none.
    """
    try:
        facts = msgpack.unpackb(folded, use_list=False, unicode_errors="surrogatepass")
    except (ValueError, msgpack.UnpackException) as exc:
        raise MalformedMessage(f"no facts of a worker: {exc!r}") from exc
    if not isinstance(facts, dict) or not all(isinstance(name, str) for name in facts):
        raise MalformedMessage(f"a {type(facts).__name__} where the facts of a worker are expected")
    return facts
