"""What the daemon hands to a slot, and what it hears from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flame_broker.errors import CallError
from flame_broker.messages import Call, CallSpec, EventKind, Result, Status

if TYPE_CHECKING:
    from flame_worker.slots import Slot

__all__ = ["Batch", "Lost", "SlotOwner", "SlotSettings", "SpooledResult"]


@dataclass(slots=True, eq=False)
class Batch:
    """Calls of one frame, handed to one slot.

    Every batch given ends in exactly one ``on_done`` or one ``on_lost``.

    Args:
        spec: What to run.
        client: Whose calls they are.
        calls: In the order in which they run.
        target_path: The code of a target by value, in the node's cache; None by reference.
        context: The daemon's own handle.
        attempt: As ``current_call().attempt`` shows it.

    Attributes:
        seconds: What the child has spent on its calls so far.
        given_at: When the slot got it, in loop time.
        printed: By the counter of a call that has printed, the number of its run and of its lines.
    """

    spec: CallSpec
    client: str
    calls: Sequence[Call]
    target_path: Path | None = None
    context: object = None
    attempt: int = 1
    seconds: float = field(default=0.0, init=False)
    given_at: float = field(default=0.0, init=False)
    printed: dict[int, tuple[int, int]] | None = field(default=None, init=False)


class SpooledResult(NamedTuple):
    """A result too large for a frame, as a file that the daemon moves or uploads.

    Attributes:
        counter: The call's number at its client.
        status: ``OK`` or ``ITEM``.
        path: The file, in the spool directory; whoever uses it removes it.
        size: In bytes.
        sha256: Of its bytes, in hex.
        index: As in ``Result``.
    """

    counter: int
    status: Status
    path: Path
    size: int
    sha256: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, as in Result


class Lost(NamedTuple):
    """A child died.

    Attributes:
        reason: ``WorkerLost`` if the child was killed, crashed or left: the call may run again.
            ``CallTimeout``, ``CallCancelled``, ``OutOfMemory`` if the slot killed it for that:
            the outcome of ``running`` is this.
        message: What happened, for people.
        running: The call that had started, if one had.
        unsent: Calls that had ended without their results getting out. Results leave the child
            at once, so there are none; the field says so.
        unstarted: Calls that had not started. They may run elsewhere, without a mark.
    """

    reason: type[CallError]
    message: str
    running: tuple[Batch, int] | None
    unsent: list[tuple[Batch, int]]
    unstarted: list[tuple[Batch, int]]


class SlotOwner(Protocol):
    """Who hears from slots: the daemon. Called in the loop; may call the slot back."""

    def on_results(self, slot: Slot, batch: Batch, results: list[Result | SpooledResult]) -> None:
        """Calls of a batch ended, or streams went on."""

    def on_done(self, slot: Slot, batch: Batch, seconds: float) -> None:
        """A batch ended: all its calls that were not revoked have results.

        ``seconds`` is the time that the child spent on them.
        """

    def on_output(
        self, slot: Slot, batch: Batch, counter: int, kind: EventKind, lines: list[str]
    ) -> None:
        """A call wrote lines."""

    def on_progress(
        self, slot: Slot, batch: Batch, counter: int, fraction: float, text: str
    ) -> None:
        """A call reported progress."""

    def on_ready(self, slot: Slot) -> None:
        """A child has started, the first or a successor."""

    def on_lost(self, slot: Slot, lost: Lost) -> None:
        """The child died; every batch that the slot had has ended. A new child is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """How a slot's children are started and when they are replaced.

    Args:
        cache_dir: The node's cache of objects, read by children.
        spool_dir: Where children write large results.
        worker: The worker's name.
        memory_bytes: Limit of a child and its sub-processes together; 0 for none.
        gpus: What children see as ``CUDA_VISIBLE_DEVICES``; none hides all GPUs.
        recycle_after_calls: Replace a child after so many calls; 0 for never.
        recycle_over_bytes: Replace a child that holds more when a batch is done; 0 for never.
        grace_s: From SIGTERM to SIGKILL, and from a cancel to SIGTERM.
        python: The interpreter of the environment; empty for the worker's own.
        environ: Added to the worker's environment variables.
        user: Run children as this user id.
        directory: Working directory; None for the worker's own.
        max_output_bytes: Of one call; more is dropped.
        max_output_lines: Of one call; more is dropped.
    """

    cache_dir: Path
    spool_dir: Path
    worker: str = ""
    memory_bytes: int = 0
    gpus: tuple[str, ...] = ()
    recycle_after_calls: int = 0
    recycle_over_bytes: int = 0
    grace_s: float = 5.0
    python: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    user: int | None = None
    directory: Path | None = None
    max_output_bytes: int = 10 * 1024 * 1024
    max_output_lines: int = 100_000
