"""Every error that Flame raises, one tree.

::

    FlameError
    ├── ConfigError                 a setting is missing or wrong
    ├── BrokerUnavailable           no broker took it within the deadline
    ├── NoOrchestrator              what was asked needs one, and none answered
    ├── SignatureError              a known key, a wrong signature
    ├── MalformedMessage            bytes that are not one of our frames
    ├── VersionMismatch             a frame of a newer format, or another Python
    ├── UnknownKey                  signed with a key that this process does not hold
    ├── PayloadTooLarge             a value over a stated limit
    ├── PackagingError              code or a value that cannot be shipped
    ├── EnvironmentBuildError       carries the build log
    ├── ResourceError               a resource request that makes no sense
    ├── StoreError
    │   ├── ObjectNotFound
    │   └── PreconditionFailed      a conditional write came too late
    └── CallError                   a call that ended badly; carries its id
        ├── RemoteError             an exception that could not be rebuilt here
        ├── CallTimeout
        ├── CallExpired
        ├── CallCancelled
        ├── WorkerLost
        ├── OutOfMemory
        └── Quarantined

Vendor errors (pika, kombu, botocore) never pass the first floor: they are translated where they
are caught, with the original as the cause.
"""

from __future__ import annotations

__all__ = [
    "BrokerUnavailable",
    "CallCancelled",
    "CallError",
    "CallExpired",
    "CallTimeout",
    "ConfigError",
    "EnvironmentBuildError",
    "FlameError",
    "MalformedMessage",
    "NoOrchestrator",
    "ObjectNotFound",
    "OutOfMemory",
    "PackagingError",
    "PayloadTooLarge",
    "PreconditionFailed",
    "Quarantined",
    "RemoteError",
    "ResourceError",
    "SignatureError",
    "StoreError",
    "UnknownKey",
    "VersionMismatch",
    "WorkerLost",
]


class FlameError(Exception):
    """Root of everything Flame raises on purpose."""


class ConfigError(FlameError):
    """A setting is missing or wrong; the message names the file, the key and what was expected."""


class BrokerUnavailable(FlameError):
    """No broker accepted the message within its deadline."""


class NoOrchestrator(FlameError):
    """What was asked needs an orchestrator, and none answered; start ``flame-orchestrator``."""


class SignatureError(FlameError):
    """The signature of a message does not hold under the key that it names."""


class MalformedMessage(FlameError):
    """These bytes are not a message of ours: truncated, oversized, or not what the header says."""


class VersionMismatch(FlameError):
    """The message was written by a newer format, or by a Python whose pickles we cannot read."""


class UnknownKey(FlameError):
    """The message names a key that this process does not hold; another process may hold it."""


class PayloadTooLarge(FlameError):
    """A value is larger than the limit the message states."""


class PackagingError(FlameError):
    """Code or a value could not be packed for the journey; the message says which and why."""


class EnvironmentBuildError(FlameError):
    """An environment could not be built.

    Attributes:
        log: What the installer printed.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> tuple[type[EnvironmentBuildError], tuple[str, str]]:
        return type(self), (str(self.args[0]), self.log)


class ResourceError(FlameError, ValueError):
    """A resource request is unknown, empty, negative, or more than any worker could have."""


class StoreError(FlameError):
    """The object store failed after its retries."""


class ObjectNotFound(StoreError):
    """The object store has no object under this key."""


class PreconditionFailed(StoreError):
    """A conditional write found the object there already, changed, or gone; nothing was written."""


class CallError(FlameError):
    """A call ended badly.

    Attributes:
        call_id: ``<client>-<counter>``, or ``""`` where no call was made yet.
    """

    def __init__(self, message: str, call_id: str = "") -> None:
        super().__init__(message)
        self.call_id = call_id

    def __reduce__(self) -> tuple[type[CallError], tuple[str, ...]]:
        return type(self), (str(self.args[0]), self.call_id)


class RemoteError(CallError):
    """The call raised an exception that could not be rebuilt in this process.

    Also the cause (``__cause__``) of every exception that *could* be rebuilt: then it carries the
    remote traceback.

    Attributes:
        type_name: ``module.QualName`` of the remote exception.
        traceback: The remote traceback as text.
    """

    def __init__(
        self, message: str, call_id: str = "", type_name: str = "", traceback: str = ""
    ) -> None:
        super().__init__(message, call_id)
        self.type_name = type_name
        self.traceback = traceback

    def __str__(self) -> str:
        head = f"{self.type_name}: {self.args[0]}" if self.type_name else str(self.args[0])
        return f"{head}\n\n{self.traceback}" if self.traceback else head

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, ...]]:
        return type(self), (str(self.args[0]), self.call_id, self.type_name, self.traceback)


class CallTimeout(CallError):
    """The call ran longer than its timeout."""


class CallExpired(CallError):
    """The call waited in a queue longer than its queue timeout and was never started."""


class CallCancelled(CallError):
    """The call was cancelled before or while it ran."""


class WorkerLost(CallError):
    """The process that ran the call died: killed, crashed, or it exited by itself."""


class OutOfMemory(CallError):
    """The call needed more memory than its limit."""


class Quarantined(CallError):
    """The call lost its worker three times and was set aside; see ``flame dead``."""
