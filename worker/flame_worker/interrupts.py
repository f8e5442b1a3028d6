"""How a running call is interrupted: by its timeout or by a cancel.

Signals arrive at any instruction, also in our own code between two calls. So the handlers raise
only while user code runs, at most once a call, and only for the call they are meant for. What
comes before the user code of its call is kept until that begins: a target may take long to load.

SIGTERM keeps its default action. A handler would be inherited by processes that a call forks, and
one of those that loses the signal while it starts would make ``multiprocessing`` wait for ever.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

from flame_broker.errors import CallCancelled, CallTimeout
from flame_worker.pipes import SERIAL, read_available

__all__ = ["NO_CALL", "Interrupts"]

NO_CALL: Final = -1

_Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class Interrupts:
    """Which call runs, and what must stop it.

    Attributes:
        serial: The call that runs or ran last; set as soon as the child turns to a call.
        raised: What was raised in its user code; None for a call left alone.
    """

    def __init__(self, cancels: int) -> None:
        self.serial = NO_CALL
        self.raised: BaseException | None = None
        self._cancels = cancels
        self._inside = False
        # Each is replaced in one step: a handler may run between any two.
        self._due: tuple[int, BaseException] | None = None
        self._ahead: frozenset[int] = frozenset()
        self._timeout_s = 0.0
        self._handlers: dict[signal.Signals, _Handler] = {
            signal.SIGINT: self._on_cancel,
            signal.SIGALRM: self._on_alarm,
            signal.SIGTERM: signal.SIG_DFL,
        }

    def install(self) -> None:
        """Take the signals, again if a call took them from us."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)

    @staticmethod
    def uninstall() -> None:
        """Give the signals back to Python, in a copy of this process."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def begin(self, serial: int, timeout_s: float) -> None:
        """A call begins; user code starts to run.

        Raises:
            CallCancelled: It was cancelled before.
        """
        self.raised = None
        self.serial = serial
        if timeout_s:
            self._timeout_s = timeout_s
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
        if serial in self._ahead:
            self._due = serial, _cancelled()
        self.enter()

    def leave(self) -> None:
        """User code has returned to us: from here on nothing is raised."""
        self._inside = False

    def enter(self) -> None:
        """Go to user code, at its start or for the next item of a stream.

        Raises:
            CallTimeout, CallCancelled: What came meanwhile.
        """
        self._inside = True
        due, self._due = self._due, None
        if due is not None and due[0] == self.serial:
            self._raise(due[1])

    def end(self) -> None:
        """The call is over."""
        if self._timeout_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._timeout_s = 0.0

    def _on_alarm(self, _signum: int, _frame: FrameType | None) -> None:
        if self._timeout_s:
            message = f"the call ran longer than its timeout of {self._timeout_s:g} s"
            self._raise(CallTimeout(message))

    def _on_cancel(self, _signum: int, _frame: FrameType | None) -> None:
        data = read_available(self._cancels) or b""
        asked = {serial for (serial,) in SERIAL.iter_unpack(data)}
        self._ahead = frozenset(serial for serial in self._ahead | asked if serial > self.serial)
        if self.serial in asked:
            self._raise(_cancelled())

    def _raise(self, exc: BaseException) -> None:
        if not self._inside:
            self._due = self.serial, exc
            return
        self._inside = False
        self.raised = exc
        raise exc


def _cancelled() -> CallCancelled:
    return CallCancelled("the call was cancelled while it ran")
