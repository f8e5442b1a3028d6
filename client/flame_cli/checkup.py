"""The checks of ``flame doctor``: each looks at one thing and returns what it found."""

from __future__ import annotations

import asyncio
import platform
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flame_broker.config import Settings
from flame_broker.errors import ConfigError, FlameError, StoreError
from flame_broker.keys import KEY_FILE_NAME
from flame_broker.topology import DEFAULT_POOL
from flame_broker.urls import mask_url
from flame_cli.advice import start_worker
from flame_cli.findings import Finding

if TYPE_CHECKING:
    from flame.client import Client
    from flame.inquiry import Facts

__all__ = [
    "check_access",
    "check_aside",
    "check_broker",
    "check_clocks",
    "check_home",
    "check_key",
    "check_pools",
    "check_store",
    "check_unseen_workers",
    "check_versions",
    "check_worker_stores",
]

_CONNECT_S: Final = 5.0
_PING_S: Final = 5.0
_SKEW_S: Final = 1.0
_CONTENT: Final = b"flame doctor"
_SAME_STORE: Final = "give clients and workers the same FLAME_STORE_URL, and restart the workers"

Trial = Callable[["Client", str, float], str]
"""Sends code and a large value through the store; says what went wrong, or ``""``."""


def check_home(settings: Settings) -> Finding:
    """Can Flame keep its files where it is told to?"""
    try:
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.home):
            pass
    except OSError as exc:
        return Finding.fail(
            "home",
            ConfigError(f"{settings.home} is not writable: {exc.strerror}"),
            "make it writable for this user, or set FLAME_HOME to a folder that is",
        )
    return Finding.ok("home", f"{settings.home} is writable")


def check_key(settings: Settings) -> Finding:
    """Is there a key, and is it private?"""
    try:
        signs, *others = settings.keyring.ids
    except ConfigError as exc:
        return Finding.fail("key", exc, _key_remedy(settings))
    also = f", also verifies {', '.join(others)}" if others else ""
    return Finding.ok("key", f"signs with id {signs}{also}, from {_key_source(settings)}")


def _key_remedy(settings: Settings) -> str:
    path = _key_path(settings)
    if settings.key_text is None and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return f"chmod 600 {path}, and make a new key if others may have read it"
    return "give this machine the key that the workers have, in a file of mode 600"


def _key_path(settings: Settings) -> Path:
    return settings.key_file or settings.home / KEY_FILE_NAME


def _key_source(settings: Settings) -> str:
    if settings.key_text is not None:
        return settings.sources.get("key", "argument")
    path = _key_path(settings)
    return f"{path} of mode {stat.S_IMODE(path.stat().st_mode):03o}"


def check_broker(settings: Settings) -> Finding:
    """Is a broker there, and does it let us in?"""
    if settings.broker_url is None:
        return Finding.ok("broker", "none configured: each program has an embedded one")
    where = mask_url(settings.broker_url)
    try:
        server = asyncio.run(_introduce(settings.broker_url))
    except FlameError as exc:
        source = settings.sources.get("broker", "FLAME_BROKER_URL")
        return Finding.fail(
            "broker", exc, f"start the broker, or correct host, login and vhost in {source}"
        )
    return Finding.ok("broker", f"{server} at {where}")


async def _introduce(url: str) -> str:
    from flame_broker.connect import open_transport

    transport = open_transport(url, name="flame doctor")
    try:
        await transport.open(deadline_s=_CONNECT_S)
        return transport.server
    finally:
        await transport.close()


def check_store(settings: Settings) -> Finding:
    """Can an object be written, read and deleted?"""
    from flame_broker.store import open_store

    if settings.store_url is None:
        return Finding.warn(
            "store",
            "none configured: values over 64 KiB and functions of scripts cannot be sent",
            "set FLAME_STORE_URL here and for the workers, for example to s3://bucket/prefix",
        )
    where = mask_url(settings.store_url)
    try:
        store = open_store(settings.store_url)
        key = f"doctor/{secrets.token_hex(8)}"
        store.put(key, _CONTENT)
        if store.get(key) != _CONTENT:
            raise StoreError(f"{where} gave back other bytes than it was given")
        store.delete(key)
        store.close()
    except FlameError as exc:
        source = settings.sources.get("store", "FLAME_STORE_URL")
        return Finding.fail(
            "store", exc, f"start the store, or correct address and credentials in {source}"
        )
    if settings.store_url.startswith("file:") and not settings.local:
        return Finding.warn(
            "store",
            f"{where} takes, gives and deletes, and the broker is on another machine",
            "make sure that the workers see this very folder, or use s3://",
        )
    return Finding.ok("store", f"{where} takes, gives and deletes objects")


def check_access(client: Client) -> Finding:
    """May we declare, publish and consume? Connecting did the first and the last."""
    try:
        seconds = client.ping_broker()
    except FlameError as exc:
        return Finding.fail(
            "access", exc, "grant this user configure, write and read on flame.* of the vhost"
        )
    return Finding.ok(
        "access", f"may declare, publish and consume; a message is back in {seconds * 1e3:.2g} ms"
    )


def check_pools(
    client: Client, workers: Sequence[Facts], trial: Trial | None = None
) -> Iterator[Finding]:
    """Does every pool with workers run a call, and see the store that we see?

    Args:
        client: Who asks.
        workers: Those that answered.
        trial: Tries the store; None where there is none to try.
    """
    pools = sorted({str(facts.get("pool")) for facts in workers})
    if not pools:
        yield Finding.fail(
            "workers",
            "no worker answered",
            f"{start_worker(client.key_id)}; one with another key or vhost does not hear us",
        )
    for pool in pools:
        there = [f for f in workers if f.get("pool") == pool]
        yield _check_pool(client, pool, there, trial)


def _check_pool(
    client: Client, pool: str, workers: Sequence[Facts], trial: Trial | None
) -> Finding:
    slots, busy = (sum(int(str(f.get(name, 0))) for f in workers) for name in ("slots", "busy"))
    size = f"pool {pool}: {len(workers)} with our key, {slots} slots, {busy} busy"
    try:
        seconds = client.ping(pool, timeout_s=_PING_S)
        problem = trial(client, pool, _PING_S) if trial else ""
    except TimeoutError:
        late = f"{size}; no call was taken within {_PING_S:g} s"
        if busy >= slots > 0:
            return Finding.warn("workers", late, "wait, or start more workers")
        return Finding.fail("workers", late, "look into the worker's log, or restart it")
    except FlameError as exc:
        return Finding.fail("workers", f"{size}; a call failed: {exc}", "see the worker's log")
    return _judge(size, seconds, problem)


def _judge(who: str, seconds: float, problem: str) -> Finding:
    if problem:
        return Finding.fail("workers", f"{who}; {problem}", _SAME_STORE)
    return Finding.ok("workers", f"{who}; a call took {seconds * 1e3:.2g} ms")


def check_worker_stores(settings: Settings, workers: Sequence[Facts]) -> Iterator[Finding]:
    """Does every worker name our store? A call tries only the one that takes it."""
    ours = mask_url(settings.store_url or "")
    for facts in workers:
        theirs = str(facts.get("store", ours))
        if not theirs:
            text = f"{_name(facts)} has none: no large values and no functions by value there"
            yield Finding.warn("store", text, _SAME_STORE)
        elif ours and theirs != ours:
            yield Finding.warn("store", f"{_name(facts)} has {theirs}, this is {ours}", _SAME_STORE)


def check_unseen_workers(client: Client, trial: Trial | None = None) -> Finding:
    """Does a call come back, where workers cannot be asked who they are?"""
    unseen = f"{client.server} has no fan-out, so workers cannot be listed"
    try:
        seconds = client.ping(timeout_s=_PING_S)
        problem = trial(client, DEFAULT_POOL, _PING_S) if trial else ""
    except TimeoutError:
        late = f"{unseen}; no call in pool {DEFAULT_POOL} was taken within {_PING_S:g} s"
        remedy = f"if none runs, {start_worker(client.key_id)}; if all are busy, wait"
        return Finding.warn("workers", late, remedy)
    except FlameError as exc:
        return Finding.fail("workers", f"{unseen}; a call failed: {exc}", "see the worker's log")
    return _judge(unseen, seconds, problem)


def check_versions(workers: Sequence[Facts]) -> Iterator[Finding]:
    """Do both sides speak one format, and run one Python?"""
    from flame_broker.frames import FORMAT_VERSION

    ours = platform.python_version()
    stale = [_name(f) for f in workers if f.get("format", FORMAT_VERSION) != FORMAT_VERSION]
    others = [f for f in workers if not _same_python(str(f.get("python", ours)), ours)]
    if stale:
        yield Finding.fail(
            "versions",
            f"another message format than our {FORMAT_VERSION}: {', '.join(stale)}",
            "install the same version of flame on both sides",
        )
    for facts in others:
        yield Finding.warn(
            "versions",
            f"{_name(facts)} runs Python {facts.get('python')!s}, this is {ours}",
            "functions of scripts and notebooks need one Python: take the same on both sides",
        )
    if workers and not stale and not others:
        yield Finding.ok(
            "versions", f"message format {FORMAT_VERSION}, Python {ours} on both sides"
        )


def check_clocks(workers: Sequence[Facts]) -> Iterator[Finding]:
    """Do the clocks agree? Queue timeouts are set by one and judged by another."""
    skews = {_name(f): float(str(f["clock_skew_s"])) for f in workers if "clock_skew_s" in f}
    wrong = {name: skew_s for name, skew_s in skews.items() if abs(skew_s) > _SKEW_S}
    for name, skew_s in wrong.items():
        yield Finding.warn(
            "clocks",
            f"{name} is {abs(skew_s):.3g} s {'ahead' if skew_s > 0 else 'behind'}",
            "run an NTP client (chrony, systemd-timesyncd) on both machines",
        )
    if skews and not wrong:
        yield Finding.ok("clocks", f"within {_SKEW_S:g} s of each other")


def check_aside(client: Client, pools: Sequence[str]) -> Iterator[Finding]:
    """Was anything set aside that a person should look at?"""
    aside = [q for q in client.queues(pools) if q.kind in ("dead", "parked") and q.messages]
    for queue in aside:
        remedy = (
            "`flame dead` says why; start a worker that has the key or version they need, then "
            "`flame dead replay`"
            if queue.kind == "parked"
            else "`flame dead` says what they hold and why; then `flame dead replay` or `drop`"
        )
        yield Finding.warn(
            "queues", f"pool {queue.pool}: {queue.messages} messages are {queue.kind}", remedy
        )
    if not aside:
        yield Finding.ok("queues", "nothing was set aside")


def _name(facts: Facts) -> str:
    return str(facts.get("worker"))


def _same_python(theirs: str, ours: str) -> bool:
    return theirs.split(".")[:2] == ours.split(".")[:2]
