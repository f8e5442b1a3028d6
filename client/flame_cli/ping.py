"""``flame ping``: how far away the broker is, and a worker behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flame_broker.errors import FlameError
from flame_broker.topology import DEFAULT_POOL
from flame_cli.advice import start_worker
from flame_cli.connecting import connected
from flame_cli.options import ContextName, Json
from flame_cli.tables import Column, show_json, show_table

if TYPE_CHECKING:
    from flame.client import Client

__all__ = ["ping", "summary"]

_ANSWER_S: Final = 1.0
_COLUMNS = (
    Column("to"),
    *(
        Column(key, header, right=True)
        for key, header in (
            ("trips", "trips"),
            ("first_ms", "first ms"),
            ("p50_ms", "p50 ms"),
            ("p99_ms", "p99 ms"),
            ("max_ms", "max ms"),
        )
    ),
)


def ping(
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Round trips to make.")] = 10,
    pool: Annotated[str, typer.Option(help="Whose workers.")] = DEFAULT_POOL,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that a round trip may take.")
    ] = 10.0,
    context: ContextName = None,
    json: Json = False,
) -> None:
    """Measure round trips to the broker, and of calls that do nothing through a worker.

    The first trip of each kind opens the way and stands in a column of its own; p50, p99 and max
    are of the others. Trips follow each other without a pause.

    \b
    Examples:
      flame ping
      flame ping -n 1000
      flame ping --pool default --json
    """
    with connected(context) as client:
        to_broker = _measure(client.ping_broker, count)
        to_worker = _measure(_trip_through(client, pool, timeout_s), count)
        server = client.server
    broker, worker = summary(to_broker), summary(to_worker)
    if json:
        show_json({"broker": {"server": server, **broker}, "worker": {"pool": pool, **worker}})
    else:
        rows = [{"to": f"broker ({server})", **broker}, {"to": f"worker (pool {pool})", **worker}]
        show_table(rows, _COLUMNS)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """The figures of a series of two or more round trips, the first of which is kept apart.

    >>> summary([0.009, 0.001, 0.002, 0.003])
    {'trips': 3, 'first_ms': 9.0, 'p50_ms': 2.0, 'p99_ms': 3.0, 'max_ms': 3.0}
    """
    first, *others = seconds
    counted = sorted(others)
    rank = ceil(0.99 * len(counted)) - 1
    return {
        "trips": len(counted),
        "first_ms": _ms(first),
        "p50_ms": _ms(median(counted)),
        "p99_ms": _ms(counted[rank]),
        "max_ms": _ms(counted[-1]),
    }


def _no_worker(pool: str, elsewhere: Sequence[str], key_id: str) -> str:
    """What to say when nobody answers in a pool, but perhaps elsewhere."""
    others = f" (there are some in {', '.join(elsewhere)})" if elsewhere else ""
    return f"no worker in pool {pool}{others}: {start_worker(key_id, pool)}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _measure(trip: Callable[[], float], count: int) -> list[float]:
    # One more than asked for: the first opens channels and lanes.
    return [trip() for _ in range(count + 1)]


def _expect_worker(client: Client, pool: str) -> None:
    found = client.workers(_ANSWER_S, enough=lambda all_: any(f.get("pool") == pool for f in all_))
    pools = sorted({str(facts.get("pool")) for facts in found})
    if pool not in pools:
        raise FlameError(_no_worker(pool, pools, client.key_id))


def _trip_through(client: Client, pool: str, timeout_s: float) -> Callable[[], float]:
    """A round trip through a worker; refused at once where there is none."""
    from flame.pinger import Pinger

    if client.reaches_workers:
        _expect_worker(client, pool)
    pinger = Pinger(client, pool, timeout_s=timeout_s)

    def trip() -> float:
        try:
            return pinger.trip()
        except TimeoutError as exc:
            raise FlameError(
                f"no slot of pool {pool} took the call within {timeout_s:g} s: all are busy, see "
                "`flame workers`; start more, or wait longer with --timeout"
            ) from exc

    return trip
