"""Large values: results on their way to the store, objects on their way to children."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from flame_broker.errors import ConfigError, FlameError, StoreError
from flame_broker.logs import get_logger
from flame_broker.messages import CallFrame, Result, Status, Target
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import encode_failure
from flame_broker.store import Store
from flame_broker.store.cache import NodeCache, Pin
from flame_worker.convoy import Convoy
from flame_worker.holding import Holding
from flame_worker.outbox import Outbox
from flame_worker.slots import SpooledResult

__all__ = ["Spool"]

_log = get_logger("flame.worker")

_THREADS: Final = 4
_TARGETS: Final = 256

P = ParamSpec("P")
T = TypeVar("T")


class Spool:
    """Moves large values between the store and this node, in threads.

    Args:
        store: The object store; None where none is configured.
        cache: The node's cache, shared with the children.
        outbox: Takes results whose value has arrived in the store.
    """

    def __init__(self, store: Store | None, cache: NodeCache, outbox: Outbox) -> None:
        self._store = store
        self._cache = cache
        self._outbox = outbox
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="flame-spool")
        self._targets: OrderedDict[str, Pin] = OrderedDict()
        self._work: set[asyncio.Task[Any]] = set()

    def in_order(self, holding: Holding, results: Iterable[Result | SpooledResult]) -> list[Result]:
        """Begin to store large results; their references are sent when they are there.

        Returns:
            The results that may be sent now. Those behind a large one of the same call follow it.
        """
        ready: list[Result] = []
        for result in results:
            if isinstance(result, Result) and result.counter not in holding.convoys:
                ready.append(result)
            else:
                self._join(holding, result)
        return ready

    def move(self, holding: Holding, leased: Holding) -> None:
        """Another holding has these calls: what is on its way to the store belongs to it."""
        for counter in [call.counter for call in leased.frame.calls]:
            if convoy := holding.convoys.pop(counter, None):
                convoy.advance = partial(self._release, leased, counter)
                leased.convoys[counter] = convoy

    def needed(self, frame: CallFrame) -> list[ObjectRef]:
        """What must be held on this node before a frame's calls may start."""
        refs = [ref for call in frame.calls if call.refs for ref in call.refs]
        target = frame.spec.target
        if target.sha256 and not self._lies_here(target.sha256):
            refs.append(_target_ref(target))
        return refs

    def _lies_here(self, sha256: str) -> bool:
        """Whether a target is kept, and nobody has cleared the cache since."""
        if sha256 in self._targets and not self._cache.path_for(sha256).exists():
            self._targets.pop(sha256).release()
        return sha256 in self._targets

    def target_path(self, target: Target) -> Path | None:
        """Where a target by value lies on this node; None for one by reference."""
        return self._cache.path_for(target.sha256) if target.sha256 else None

    def provide(
        self,
        holding: Holding,
        refs: list[ObjectRef],
        then: Callable[[], None],
        otherwise: Callable[[FlameError], None],
    ) -> None:
        """Bring objects to this node, each once, and hold them until the frame is settled."""
        self._spawn(self._provide(holding, refs, then, otherwise))

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _provide(
        self,
        holding: Holding,
        refs: list[ObjectRef],
        then: Callable[[], None],
        otherwise: Callable[[FlameError], None],
    ) -> None:
        once = {ref.sha256: ref for ref in refs}
        try:
            for pin in await asyncio.gather(*(self._hold(ref) for ref in once.values())):
                holding.pins.append(pin)
            target = holding.frame.spec.target.sha256
            if target in once:
                self._keep_target(target)
        except FlameError as problem:
            otherwise(problem)
            return
        except OSError as problem:
            otherwise(StoreError(f"this node failed: {problem}"))
            return
        then()

    async def _hold(self, ref: ObjectRef) -> Pin:
        """Pin an object; the cache downloads it once, however many ask."""
        return await self._in_thread(self._cache.hold, ref, self._required_store())

    def _keep_target(self, sha256: str) -> None:
        """Targets are small and come again: the latest stay pinned, and are not looked up."""
        if sha256 not in self._targets:
            self._targets[sha256] = self._cache.pin(sha256)
        if len(self._targets) > _TARGETS:
            self._targets.popitem(last=False)[1].release()

    def _join(self, holding: Holding, result: Result | SpooledResult) -> None:
        convoy = holding.convoys.get(result.counter)
        if convoy is None:
            convoy = Convoy(partial(self._release, holding, result.counter))
            holding.convoys[result.counter] = convoy
        convoy.ended = result.status is not Status.ITEM
        if isinstance(result, Result):
            convoy.add(result)
        elif convoy.failed:
            result.path.unlink(missing_ok=True)
        else:
            upload = self._spawn(self._upload(result))
            convoy.add(upload)
            upload.add_done_callback(partial(_advance, convoy))
        convoy.advance()

    def _release(self, holding: Holding, counter: int) -> None:
        convoy = holding.convoys.get(counter)
        if convoy is None:
            return  # the call failed and has ended: what was still on its way is for nobody
        ready = convoy.take()
        if convoy.over:
            del holding.convoys[counter]
        if ready:
            self._outbox.results(holding, ready)

    async def _upload(self, result: SpooledResult) -> Result:
        """Store a large result. The node keeps a copy in its cache."""
        ref = ObjectRef(f"objects/{result.sha256}", result.size, result.sha256)
        try:
            await self._in_thread(self._store_file, ref, result.path)
        except (FlameError, OSError) as problem:
            if not isinstance(problem, _Ending):
                _log.warning("result.upload_failed", reason=str(problem))
            payload = encode_failure(StoreError, f"the result could not be stored: {problem}")
            return Result(result.counter, Status.FAILED, payload, None, result.index)
        return Result(result.counter, result.status, b"", ref, result.index)

    def _store_file(self, ref: ObjectRef, path: Path) -> None:
        try:
            store = self._required_store()
            if store.stat(ref.key) is None:
                store.put_file(ref.key, path, sha256=ref.sha256, frozen=True)
            self._cache.adopt(path, ref.sha256)
        finally:
            path.unlink(missing_ok=True)

    def _required_store(self) -> Store:
        if self._store is None:
            raise ConfigError(
                "this worker has no object store, which values over 64 KiB and functions by value "
                "travel through: set FLAME_STORE_URL on clients and workers"
            )
        return self._store

    def _in_thread(
        self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._threads, partial(work, *args, **kwargs))
        except RuntimeError as exc:
            raise _Ending(f"this process ends: {exc}") from exc

    def _spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task


class _Ending(StoreError):
    """No thread takes work any more: the program around an embedded cluster has ended."""


def _advance(convoy: Convoy, upload: asyncio.Future[Result]) -> None:
    if not upload.cancelled():
        convoy.advance()


def _target_ref(target: Target) -> ObjectRef:
    return ObjectRef(f"targets/{target.sha256}", target.size, target.sha256)
