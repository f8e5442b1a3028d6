"""The trial of ``flame doctor``: does the store carry code to a worker, and a value back?"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from flame.calls import Caller, CallOptions
from flame.packaging import PackedTarget, pack_target
from flame_broker.errors import ConfigError, FlameError, StoreError, VersionMismatch
from flame_broker.messages import INLINE_BYTES
from flame_broker.objects import ObjectRef

if TYPE_CHECKING:
    from flame.client import Client
    from flame.futures import ObjectFuture

__all__ = ["carry"]

_LEFT_BEHIND_S: Final = 60.0


def carry(client: Client, pool: str, timeout_s: float) -> str:
    """Call a function by value whose result is large, so that both travel through the store.

    Args:
        client: Who calls; it has a store.
        pool: Whose workers.
        timeout_s: How long it may take.

    Returns:
        What went wrong and on which side; ``""`` if all is well.

    Raises:
        TimeoutError: The call did not end in time.
        FlameError: It failed for a reason that is not the store's.
    """
    # New bytes each time: what a cache or an earlier trial has kept would prove nothing.
    packed = pack_target(_returns(secrets.token_bytes(16)))
    options = CallOptions(
        label="doctor", pool=pool, queue_timeout_s=timeout_s + _LEFT_BEHIND_S, echo=False
    )
    future = Caller(client, packed, options).submit((), {})
    try:
        future.result(timeout_s)
    except VersionMismatch:
        return ""  # the code has arrived; that it is another Python's is said elsewhere
    except (ConfigError, StoreError) as problem:
        return _blame(problem, went_well=future.went_well())
    finally:
        future.cancel()
        _clear_up(client, packed, future)
    return ""


def _returns(token: bytes) -> Callable[[], bytes]:
    repeated = INLINE_BYTES // len(token) + 1
    return lambda: token * repeated


def _blame(problem: FlameError, *, went_well: bool) -> str:
    if went_well:
        return f"a worker stored a large result where this client does not find it: {problem}"
    return f"a function sent by value fails on a worker: {problem}"


def _clear_up(client: Client, packed: PackedTarget, future: ObjectFuture[Any]) -> None:
    store = client.session.values.store
    store.delete(packed.key)
    result = future.as_argument() if future.went_well() else None
    if isinstance(result, ObjectRef):
        store.delete(result.key)
