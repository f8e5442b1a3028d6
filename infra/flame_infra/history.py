"""The history and the custody of an embedded cluster: an orchestrator inside the program.

All programs of a ``FLAME_HOME`` write one history. Their clusters have keys of their own, so none
leads another one's calls; what a killed program has left is ended by the next one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flame_broker.connect import open_transport
from flame_broker.errors import FlameError, NoOrchestrator
from flame_broker.keys import Keyring
from flame_broker.logs import get_logger
from flame_broker.topology import (
    bound_ledger_queue,
    calls_exchange,
    custody_queue,
    kept_logs_queue,
    ledger_queue,
    logs_exchange,
    questions_queue,
)
from flame_infra.absent import Absent
from flame_infra.programs import Programs
from flame_orchestrator.threads import in_thread

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from flame_orchestrator.daemon import Orchestrator

__all__ = ["EmbeddedHistory"]

_KEEP_CALLS: Final = 1_000_000
_GATHER_S: Final = 2.0
"""The program, its broker and the orchestrator share one interpreter: a burst goes first."""

_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 3.0
_LOOK_EVERY_S: Final = 0.5
_CLEAR_EVERY_S: Final = 2.0
_LONGEST_START_S: Final = 30.0
_ENDED: Final = "the program that made it ended before the call did"
_KILLED: Final = "the program that made it was killed before the call ended"
_MISSING: Final = (
    "the embedded cluster keeps no history and no calls that need time, since its orchestrator is "
    'not installed ({problem}): pip install "flame[orchestrator]"'
)

_log = get_logger("flame.embedded")


class EmbeddedHistory:
    """An orchestrator that starts in the background. ``start``, then ``stop``; in one loop.

    Args:
        url: The broker of this cluster.
        keyring: Its key, which no other cluster has.
        home: ``FLAME_HOME``.
        store_url: The object store, for large logs.
        at_once: Whether somebody waits for it; else calls that are made first go first.
    """

    def __init__(
        self, url: str, keyring: Keyring, home: Path, store_url: str, *, at_once: bool
    ) -> None:
        self._at_once = at_once
        self._url = url
        self._keyring = keyring
        self._folder = home / "embedded"
        self._store_url = store_url
        self._programs = Programs(self._folder, keyring.signer.hex_id)
        self._transport = open_transport(url, name="flame embedded")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flame-history")
        self._ending = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._orchestrator: Orchestrator | None = None

    async def start(self) -> None:
        """From now on nothing is missed; the orchestrator itself is there a moment later."""
        key_id, transport = self._keyring.signer.hex_id, self._transport
        await transport.open()
        for exchange in (calls_exchange(key_id), logs_exchange(key_id)):
            await transport.declare_exchange(exchange, "topic")
        await transport.declare(
            bound_ledger_queue(key_id),
            questions_queue(key_id),
            custody_queue(key_id),
            kept_logs_queue(key_id),
        )
        self._starting = asyncio.ensure_future(self._begin())

    async def stop(self) -> None:
        """Write down what has arrived, end what nobody will run, and leave."""
        self._ending.set()
        if self._clearing is not None:
            self._clearing.cancel()
        if self._starting is not None:
            await asyncio.wait([self._starting], timeout=_LONGEST_START_S)
            self._starting.cancel()
        if self._orchestrator is not None:
            await self._orchestrator.finish(_ENDED)
        if self._engine is not None:
            self._engine.dispose()
        self._programs.leave()
        await self._transport.close()
        self._thread.shutdown(wait=False)

    async def _begin(self) -> None:
        if not self._at_once:
            await self._wait_for_a_pause()
        try:
            orchestrator = await in_thread(self._thread, self._make)
            await orchestrator.start()
        except NoOrchestrator as problem:
            await Absent(self._transport, self._keyring, str(problem)).start()
        except (FlameError, OSError) as problem:
            reason = f"the embedded cluster keeps no history: {problem}"
            _log.warning("embedded.no_history", reason=reason)
            await Absent(self._transport, self._keyring, reason).start()
        else:
            self._orchestrator = orchestrator
            self._clearing = asyncio.ensure_future(self._clear_up())

    async def _wait_for_a_pause(self) -> None:
        """Let the program's first calls go first: to load the database's library takes their time.

        Not while somebody waits for an answer, or the program for its end.
        """
        loop, key_id = asyncio.get_running_loop(), self._keyring.signer.hex_id
        ledger, *urgent = (f(key_id).name for f in (ledger_queue, questions_queue, custody_queue))
        until, known = loop.time() + _LONGEST_PAUSE_S, -1
        while loop.time() < until and not self._ending.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_S):
                    await self._ending.wait()
            depth = await self._transport.depth(ledger) or 0
            if depth == known or any([await self._transport.depth(name) for name in urgent]):
                return
            known = depth

    def _make(self) -> Orchestrator:
        """Bring the database up to date, which takes a while; one program does it at a time."""
        try:
            from flame_orchestrator.daemon import Orchestrator, OrchestratorSettings
            from flame_orchestrator.database import default_url, open_database
        except ModuleNotFoundError as exc:
            raise NoOrchestrator(_MISSING.format(problem=exc)) from exc
        url = default_url(self._folder)
        with self._programs.alone():
            self._programs.come()
            self._engine = open_database(url)
            self._end_left()
        settings = OrchestratorSettings(
            broker_url=self._url,
            keyring=self._keyring,
            database_url=url,
            keep_calls=_KEEP_CALLS,
            store_url=self._store_url,
            gather_s=_GATHER_S,
            look_every_s=_LOOK_EVERY_S,
        )
        return Orchestrator(settings)

    async def _clear_up(self) -> None:
        """Look again and again for programs that were killed meanwhile."""
        while True:
            await asyncio.sleep(_CLEAR_EVERY_S)
            try:
                await in_thread(self._thread, self._clear)
            except OSError as problem:
                _log.warning("embedded.not_cleared", reason=str(problem))

    def _clear(self) -> None:
        with self._programs.alone():
            self._end_left()

    def _end_left(self) -> None:
        """End what killed programs have left; do so ``alone``."""
        from flame_orchestrator.leftovers import end_calls

        assert self._engine is not None
        try:
            for key_id in self._programs.gone():
                ended = end_calls(self._engine, key_id, _KILLED, self._keyring.signer)
                _log.info("embedded.cleared", key=key_id, calls=ended)
        except FlameError as problem:
            _log.warning("embedded.not_cleared", reason=str(problem))
