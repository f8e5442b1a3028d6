"""The process that runs calls, one at a time. ``process`` starts it; the daemon never imports it.

It has no key and never talks to the network: arguments arrive verified, large values lie in the
node's cache. It must outlive whatever a call does, or die in a way that tells which call did it.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple, NoReturn

import msgpack

from flame_broker import context
from flame_broker.codec import ResultPickler, decode_arguments, encode_value
from flame_broker.context import CallContext
from flame_broker.errors import FlameError, OutOfMemory, PackagingError, RemoteError, StoreError
from flame_broker.messages import INLINE_BYTES, Status, call_id
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import encode_error, encode_failure
from flame_worker.capture import Capture
from flame_worker.descriptors import move_high
from flame_worker.interrupts import Interrupts
from flame_worker.limits import die_first, die_with_parent, limit_memory
from flame_worker.pipes import DESCRIPTORS_CLOSED, LOADED, READY, TOKEN, ChildEnds
from flame_worker.reports import Progress, Reporter
from flame_worker.streams import STREAMED, Coroutines
from flame_worker.targets import TargetName, Targets
from flame_worker.values import Spool, StoredValues

__all__ = ["CallLoop", "ChildSettings", "main"]

_OK: Final = int(Status.OK)
_ERROR: Final = int(Status.ERROR)
_FAILED: Final = int(Status.FAILED)
_ITEM: Final = int(Status.ITEM)
_AGAIN: Final = int(Status.AGAIN)
_NONE: Final = encode_value(None).join()
_READ_BYTES: Final = 1024 * 1024

Spooled = tuple[str, int, str]
Outcome = tuple[int, bytes, Spooled | None]
Chunk = tuple[bytes, int, list[Any], list[Any]]


class ChildSettings(NamedTuple):
    """What the daemon tells a child first."""

    cache_dir: str
    spool_dir: str
    memory_bytes: int
    worker: str
    gpus: tuple[str, ...]


class Task(NamedTuple):
    """What the calls of a chunk share: a target, limits, and whose calls they are."""

    name: str
    sha256: str
    python: str
    path: str
    timeout_s: float
    client: str
    attempt: int
    retry_on: list[str]
    exit_codes: list[int]


class CallLoop:
    """Takes chunks of calls from the daemon and runs them."""

    def __init__(self, ends: ChildEnds, settings: ChildSettings) -> None:
        self._ends = ends
        self._settings = settings
        self._interrupts = Interrupts(ends.cancels)
        self._capture = Capture(self._interrupts)
        self._reporter = Reporter(ends)
        self._targets = Targets()
        self._coroutines = Coroutines()
        self._values = StoredValues(Path(settings.cache_dir))
        self._spool = Spool(Path(settings.spool_dir))
        self._directory = os.getcwd()  # noqa: PTH109  # compared as text for every chunk
        self._token: bytes | None = None
        self._head: list[Any] = []
        self._task: Task | None = None
        self._target: Callable[..., Any] | None = None
        self._counter = 0
        self._context: CallContext | None = None
        self._progress: Progress | None = None
        self._items = 0
        self._item_at = 0.0
        self._forked = False

    def run(self, chunks: Iterator[Any]) -> None:
        """Run what comes until the daemon closes the pipe."""
        self._interrupts.install()
        context.provide(self._current_call)
        os.register_at_fork(after_in_child=self._after_fork)
        self._reporter.notify(READY, os.getpid())
        for chunk in chunks:
            self._run_chunk(chunk)

    def _run_chunk(self, chunk: Chunk) -> None:
        token, serial, head, calls = chunk
        self._begin_chunk(head)
        before = perf_counter()
        for self._counter, payload, refs in calls:
            if not self._claim(token):
                break
            outcome = self._run_call(serial, payload, refs)
            if self._forked:  # a copy that the call made of us; the call itself goes on elsewhere
                self._capture.end_call()
                os._exit(0)
            before = self._report(serial, outcome, before)
            serial += 1
        self._reporter.ring()

    def _begin_chunk(self, head: list[Any]) -> None:
        """Undo what earlier calls did to the process; see what these calls run."""
        self._interrupts.install()
        self._capture.restore()
        self._return_home()
        if head != self._head:
            self._head, self._task = head, Task(*head)
            self._target = self._targets.known(_target_name(self._task))

    def _return_home(self) -> None:
        try:
            here = os.getcwd()  # noqa: PTH109  # a Path costs more than the system call
        except OSError:
            here = ""
        if here != self._directory:
            os.chdir(self._directory)

    def _claim(self, token: bytes) -> bool:
        """Take a token; False if the rest of the chunk was revoked."""
        found = self._token
        if found is None:
            try:
                found = os.read(self._ends.claims, TOKEN.size)
            except BlockingIOError:
                return False
        if found == token:
            self._token = None
            return True
        self._token = found  # of a chunk still to come
        return False

    def _run_call(self, serial: int, payload: bytes, refs: list[Any]) -> Outcome:
        interrupts = self._interrupts
        task = self._task
        assert task is not None
        interrupts.serial = serial
        try:
            target = self._target or self._load(task)
            try:
                interrupts.begin(serial, task.timeout_s)
                args, kwargs = decode_arguments(
                    payload or self._stored(refs), load_ref=self._values.load
                )
                value = target(*args, **kwargs)
                if type(value) in STREAMED:
                    value = self._follow(serial, value)
            finally:
                interrupts.leave()
            return (_OK, _NONE, None) if value is None else self._encode(_OK, value)
        # The border to user code: whatever it raises, even SystemExit, is the call's result.
        except BaseException as exc:  # noqa: BLE001
            return self._describe(exc)
        finally:
            interrupts.end()

    def _stored(self, refs: list[Any]) -> memoryview:
        """Arguments too large for the frame: the first reference holds them."""
        return self._values.map(ObjectRef.from_wire(refs[0]))

    def _load(self, task: Task) -> Callable[..., Any]:
        target: Callable[..., Any]
        try:
            target = self._target = self._targets.load(_target_name(task))
        except StoreError as exc:
            target = _Broken(exc)  # for this once: it may be there the next time
        except FlameError as exc:
            target = self._target = _Broken(exc)
        self._reporter.notify(LOADED)
        return target

    def _follow(self, serial: int, value: Any) -> Any:
        """Await a coroutine; send the items of a generator as they come."""
        if hasattr(value, "cr_await"):
            return self._coroutines.run(value)
        items = self._coroutines.items(value) if hasattr(value, "asend") else value
        for item in items:
            self._interrupts.leave()
            self._send_item(serial, item)
            self._interrupts.enter()
        return None if self._items else []  # a stream without items is an empty list

    def _send_item(self, serial: int, item: Any) -> None:
        status, payload, spooled = self._encode(_ITEM, item)
        printed = self._capture.end_call()
        record = (serial, status, payload, 0.0, self._items, printed, spooled)
        self._reporter.send(record, perf_counter())
        self._items += 1

    def _encode(self, status: int, value: Any) -> Outcome:
        try:
            encoded = encode_value(value, pickler=ResultPickler)
        except PackagingError as exc:
            what = "an item of the stream" if status == _ITEM else "the result"
            raise _NotSent(PackagingError, f"{what} cannot be sent: {exc}") from exc
        if encoded.nbytes <= INLINE_BYTES:
            return status, encoded.join(), None
        try:
            return status, b"", self._spool.write(encoded)
        except OSError as exc:
            message = f"the worker has no room for a result of {encoded.nbytes} bytes: {exc}"
            raise _NotSent(StoreError, message) from exc

    def _describe(self, exc: BaseException) -> Outcome:
        if isinstance(exc, _NotSent):
            return _FAILED, encode_failure(exc.kind, str(exc)), None
        if exc is self._interrupts.raised and isinstance(exc, FlameError):
            return _FAILED, encode_failure(type(exc), str(exc)), None
        if isinstance(exc, MemoryError) and self._settings.memory_bytes:
            return _FAILED, encode_failure(OutOfMemory, self._memory_message()), None
        trace = exc.__traceback__
        exc = exc.with_traceback(trace and trace.tb_next)  # without our own frame
        status = _AGAIN if self._task is not None and _may_come_again(exc, self._task) else _ERROR
        try:
            return status, encode_error(exc), None
        except (RecursionError, MemoryError):
            return _FAILED, encode_failure(RemoteError, f"{type(exc)} without a description"), None

    def _memory_message(self) -> str:
        limit = self._settings.memory_bytes
        return f"the call asked for more memory than its limit of {limit} bytes"

    def _report(self, serial: int, outcome: Outcome, before: float) -> float:
        status, payload, spooled = outcome
        printed = self._capture.end_call()
        if self._context is not None:
            self._end_context()
        now = perf_counter()
        if printed or spooled or self._items:
            record: tuple[Any, ...] = (
                serial, status, payload, now - before, self._items, printed, spooled
            )  # fmt: skip
            self._items = 0
        else:
            record = (serial, status, payload, now - before)
        self._reporter.send(record, now)
        return now

    def _current_call(self) -> CallContext | None:
        if self._context is None and self._task is not None:
            serial = self._interrupts.serial
            self._progress = Progress(self._reporter, serial)
            self._context = CallContext(
                call_id(self._task.client, self._counter),
                self._task.attempt,
                self._settings.worker,
                self._settings.gpus,
                self._progress.report,
            )
        return self._context

    def _end_context(self) -> None:
        if self._progress is not None:
            self._progress.flush()
        self._context = self._progress = None

    def _after_fork(self) -> None:
        """In a copy made by the call: never answer in the child's name, nor keep its pipes open."""
        self._forked = True
        self._interrupts.uninstall()
        for descriptor in self._ends:
            try:
                os.close(descriptor)
            except OSError:
                continue  # the call had closed it already


class _NotSent(Exception):
    """A result cannot leave, or an item: then the call ends, lest its stream has a gap."""

    def __init__(self, kind: type[FlameError], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Broken:
    """Stands for a target that cannot be loaded: every call of it fails with the reason."""

    def __init__(self, reason: FlameError) -> None:
        self._reason = reason

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise self._reason.with_traceback(None)


def _may_come_again(exc: BaseException, task: Task) -> bool:
    """Whether the retry policy names it, or what it is one of."""
    if isinstance(exc, SystemExit) and exc.code in task.exit_codes:
        return True
    if not task.retry_on:
        return False
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__}
    return not names.isdisjoint(task.retry_on)


def _target_name(task: Task) -> TargetName:
    return TargetName(task.name, task.sha256, task.python, task.path)


def _messages(commands: int) -> Iterator[Any]:
    unpacker = msgpack.Unpacker(max_buffer_size=0, strict_map_key=False)
    while data := os.read(commands, _READ_BYTES):
        unpacker.feed(data)
        yield from unpacker


def main() -> None:
    """Serve the daemon that started this process: ``PARENT COMMANDS CLAIMS CANCELS …``."""
    parent, *descriptors = map(int, sys.argv[1:])
    die_with_parent(parent)
    die_first()
    sys.argv = [""]
    ends = ChildEnds(*map(move_high, descriptors))
    messages = _messages(ends.commands)
    settings = ChildSettings(*next(messages))
    if settings.memory_bytes:
        limit_memory(settings.memory_bytes)
    loop = CallLoop(ends, settings._replace(gpus=tuple(settings.gpus)))
    gc.collect()
    gc.freeze()  # what is loaded now stays; no collection looks at it again
    try:
        loop.run(messages)
    except OSError as exc:  # a pipe is gone: closed by a call, or the daemon is dead
        os._exit(DESCRIPTORS_CLOSED if exc.errno == errno.EBADF else 1)
