"""One child process, as the daemon sees it: its start, its pipes, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgpack

from flame_broker.messages import Call, EventKind
from flame_worker.batches import Batch, SlotSettings
from flame_worker.guard import guard
from flame_worker.pipes import (
    DESCRIPTORS_CLOSED,
    LOOK_AGAIN_S,
    SERIAL,
    ChildEnds,
    Claims,
    Outbox,
    open_pipes,
    read_available,
)
from flame_worker.results import take_records

__all__ = ["ChildListener", "ChildProcess"]

_START: Final = "from flame_worker.child import main; main()"
_READ_BYTES: Final = 256 * 1024
_OUTPUT_BYTES: Final = 64 * 1024
_LAST_OUTPUT_BYTES: Final = 1024 * 1024
_REAP_EVERY_S: Final = 0.02
_LOOK_AT_MOST_EVERY_S: Final = 0.25
_SECRET: Final = frozenset({"FLAME_KEY", "FLAME_KEY_FILE", "FLAME_DATABASE_URL"})
"""The cluster key never reaches a child (DESIGN.md, "Worker")."""
_CRASHES: Final = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
)


class ChildListener(Protocol):
    """Who hears from a child: its slot."""

    def on_records(self, child: ChildProcess, records: list[list[Any]]) -> None:
        """Results and notices came."""

    def on_output(self, child: ChildProcess, kind: EventKind, data: bytes) -> None:
        """The child wrote something."""

    def on_exit(self, child: ChildProcess) -> None:
        """The process is gone, and everything it left in its pipes was delivered."""


class ChildProcess:
    """A child process with its pipes, in a session and process group of its own.

    Attributes:
        pid: Of the process, and of its process group.
        ready: It has started and waits for calls.
        claims: What it may start.
        busy: It has calls that are not finished; the slot says so.
        gone: Done when the process has ended and its exit was delivered.
    """

    def __init__(self, settings: SlotSettings, listener: ChildListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._ends, theirs = open_pipes()
        outputs = os.pipe(), os.pipe()
        try:
            self._popen = _spawn(settings, theirs, (outputs[0][1], outputs[1][1]))
        except OSError:
            self._ends.close()
            os.close(outputs[0][0])
            os.close(outputs[1][0])
            raise
        finally:
            for descriptor in (*theirs, outputs[0][1], outputs[1][1]):
                os.close(descriptor)
        self.pid = self._popen.pid
        self.ready = False
        self.gone = self._loop.create_future()
        self.claims = Claims(self._ends)
        self._outbox = Outbox(self._loop, self._ends.commands)
        self._unpacker = msgpack.Unpacker(max_buffer_size=0, use_list=True)
        self._outputs = {
            EventKind.STDOUT: outputs[0][0],
            EventKind.STDERR: outputs[1][0],
        }
        self.busy = False
        self._look_again: asyncio.TimerHandle | None = None
        self._look_after_s = LOOK_AGAIN_S
        self._pidfd = _pidfd(self.pid)
        self._open = {*self._ends, *self._outputs.values()}
        if self._pidfd is not None:
            self._open.add(self._pidfd)
        self._ended = False
        self._watch()
        guard.watch(self.pid)
        self.send(_child_settings(settings))

    def _watch(self) -> None:
        self._loop.add_reader(self._ends.bells, self._on_bell)
        for kind, descriptor in self._outputs.items():
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, self._on_output, kind)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._on_end)

    def send(self, message: object) -> None:
        """Send a command; buffered while the child does not read."""
        self._outbox.send(msgpack.packb(message))

    def give(self, serial: int, batch: Batch, calls: Sequence[Call]) -> None:
        """Have calls of a batch run, after those given before; the serial is the first one's."""
        self.busy = True
        self.claims.allow(len(calls))
        self.send((self.claims.token, serial, _head(batch), _wire(calls)))

    def finish(self) -> None:
        """Let the child end when it has done what it was given."""
        self._outbox.finish(lambda: self._close(self._ends.commands))

    def interrupt(self, serial: int) -> None:
        """Raise ``CallCancelled`` in a call, if it is the one that runs."""
        # A child that is dead, or has thousands of cancels before it, needs no other one.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._ends.cancels, SERIAL.pack(serial))
        self._signal(os.kill, signal.SIGINT)

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Signal the whole process group: the child and its sub-processes."""
        self._signal(os.killpg, signum)

    def exit_message(self) -> str:
        """How the process ended, for people."""
        code = self._popen.returncode
        if code == DESCRIPTORS_CLOSED:
            return "the call closed the file descriptors of the process that ran it"
        if code is None or code >= 0:
            return f"the process that ran the call exited by itself with code {code}"
        return f"the process that ran the call was killed by {_signal_name(-code)}"

    @property
    def crashed(self) -> bool:
        """It died of a fault of its own, and its last words tell where."""
        return -(self._popen.returncode or 0) in _CRASHES

    def collect(self) -> None:
        """Deliver the records that are in the pipe."""
        while data := read_available(self._ends.records, _READ_BYTES):
            self._unpacker.feed(data)
            if len(data) < _READ_BYTES:
                break
        records, whole = take_records(self._unpacker)
        if any(len(record) == 7 and record[5] for record in records):
            self._collect_output()
        if records:
            self._listener.on_records(self, records)
        if not whole:
            self.kill()  # a call wrote to our pipe: nothing after it can be trusted

    def _on_bell(self) -> None:
        if read_available(self._ends.bells) == b"":
            self._on_silence()
            return
        self._look_after_s = LOOK_AGAIN_S
        self.collect()
        if self.busy and self._look_again is None and not self._ended:
            self._look_again = self._loop.call_later(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        """Find results that were not rung for, ever more rarely while there are none."""
        self._look_again = None
        if not self.busy or self._ended:
            return
        self.collect()
        self._look_again = self._loop.call_later(self._look_after_s, self._look)
        self._look_after_s = min(2 * self._look_after_s, _LOOK_AT_MOST_EVERY_S)

    def _on_output(self, kind: EventKind) -> None:
        data = read_available(self._outputs[kind], _OUTPUT_BYTES)
        if data:
            self._listener.on_output(self, kind, data)
        elif data == b"":
            self._loop.remove_reader(self._outputs[kind])

    def _collect_output(self) -> None:
        for kind, descriptor in self._outputs.items():
            left = _LAST_OUTPUT_BYTES
            while left > 0 and (data := read_available(descriptor, _OUTPUT_BYTES)):
                left -= len(data)
                self._listener.on_output(self, kind, data)

    def _on_silence(self) -> None:
        """The child closed its bell: it is dead or dying, or a call closed our descriptors."""
        self._loop.remove_reader(self._ends.bells)
        if self._pidfd is None:
            self._reap()
        else:
            self._loop.call_later(_REAP_EVERY_S, self.kill)

    def _reap(self) -> None:
        if self._popen.poll() is None:
            self.kill()
            self._loop.call_later(_REAP_EVERY_S, self._reap)
        else:
            self._on_end()

    def _on_end(self) -> None:
        """The process has ended. Until it is reaped nobody else can get its group's number."""
        self._unwatch()
        self.kill()
        self._popen.wait()
        guard.forget(self.pid)
        self.collect()
        self._collect_output()
        self._ended = True
        self._listener.on_exit(self)
        for descriptor in tuple(self._open):
            self._close(descriptor)
        self.gone.set_result(None)

    def _unwatch(self) -> None:
        self._outbox.stop()
        if self._look_again is not None:
            self._look_again.cancel()
        for descriptor in (self._ends.bells, *self._outputs.values(), self._pidfd):
            if descriptor is not None:
                self._loop.remove_reader(descriptor)

    def _signal(self, send: Callable[[int, int], None], signum: signal.Signals) -> None:
        if self._ended:
            return
        try:
            send(self.pid, signum)
        except (ProcessLookupError, PermissionError):  # macOS: a zombie cannot be signalled
            return

    def _close(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.discard(descriptor)
            os.close(descriptor)


def _spawn(
    settings: SlotSettings, ends: ChildEnds, outputs: tuple[int, int]
) -> subprocess.Popen[bytes]:
    descriptors = [str(descriptor) for descriptor in ends]
    # The command is our own; nothing of it comes from outside.
    return subprocess.Popen(
        [settings.python or sys.executable, "-P", "-c", _START, str(os.getpid()), *descriptors],
        stdin=subprocess.DEVNULL,
        stdout=outputs[0],
        stderr=outputs[1],
        pass_fds=ends,
        start_new_session=True,
        cwd=settings.directory,
        env=_environment(settings),
        **_identity(settings.user),
    )


def _head(batch: Batch) -> tuple[object, ...]:
    """What the calls of a chunk share, as ``child.Task`` takes it."""
    spec, target = batch.spec, batch.spec.target
    path = "" if batch.target_path is None else str(batch.target_path)
    return (
        target.name, target.sha256, target.python, path, float(spec.timeout_s),
        batch.client, batch.attempt, spec.retry_on, spec.exit_codes,
    )  # fmt: skip


def _wire(calls: Sequence[Call]) -> Sequence[object]:
    if not any(call.refs for call in calls):
        return calls
    return [(c.counter, c.payload, [ref.to_wire() for ref in c.refs]) for c in calls]


def _identity(user: int | None) -> dict[str, Any]:
    """Who the child is: another user brings its own group and none of the worker's."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwuid(user).pw_gid, "extra_groups": []}


def _child_settings(settings: SlotSettings) -> tuple[object, ...]:
    """As ``child.ChildSettings`` takes them."""
    directories = str(settings.cache_dir), str(settings.spool_dir)
    return (*directories, settings.memory_bytes, settings.worker, settings.gpus)


def _environment(settings: SlotSettings) -> dict[str, str]:
    """The worker's variables without its secrets; the GPUs of the slot and no others."""
    kept = {name: value for name, value in os.environ.items() if name not in _SECRET}
    return {**kept, "CUDA_VISIBLE_DEVICES": ",".join(settings.gpus), **settings.environ}


def _pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    return os.pidfd_open(pid)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
