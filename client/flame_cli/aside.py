"""A message that was set aside: where it lies, what it holds, and whether it can be sent again.

Nothing is unpickled and no payload is kept: calls are described by their target and their sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from flame_broker.errors import FlameError
from flame_broker.frames import open_frame
from flame_broker.keys import Keyring
from flame_broker.messages import Call, CallFrame, Frame, Priority, ResultFrame, call_id
from flame_broker.topology import (
    REASON_HEADER,
    SET_ASIDE_HEADER,
    calls_queue,
    dead_queue,
    parked_queue,
    suspects_queue,
)

__all__ = ["Aside", "Fate", "Shelf", "digest_of", "read", "shelves"]

_ID_DIGITS: Final = 10
_LATEST_S: Final = 2**35


class Fate(StrEnum):
    """Which of a pool's two queues: nobody can run it, or another worker might."""

    DEAD = "dead"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Shelf:
    """One queue of messages that were set aside.

    Args:
        key_id: The key whose queues it belongs to.
        pool: Whose workers put them there.
        fate: Which of the two.
    """

    key_id: str
    pool: str
    fate: Fate

    @property
    def queue(self) -> str:
        """The queue's name."""
        spec = dead_queue if self.fate is Fate.DEAD else parked_queue
        return spec(self.key_id, self.pool).name

    def priority_of(self, frame: CallFrame) -> Priority | None:
        """The priority that calls on this shelf had; None if they do not come from this pool.

        A worker signs what it quarantines for the dead queue itself, and moves what it parks as it
        came. The suspects queue, which both pass through, keeps no priority.
        """
        if self.fate is Fate.DEAD:
            return Priority.NORMAL if frame.queue == self.queue else None
        if frame.queue == suspects_queue(self.key_id, self.pool).name:
            return Priority.NORMAL
        wanted = frame.spec.resources
        names = {calls_queue(self.key_id, self.pool, wanted, p).name: p for p in Priority}
        return names.get(frame.queue)


@dataclass(frozen=True, slots=True)
class Aside:
    """One message that was set aside.

    Attributes:
        digest: SHA-256 of the message, in hex; copies of a message share it.
        shelf: Where it lies.
        size_bytes: Of the message.
        reason: What the worker said that put it there; ``""`` if somebody else did.
        since: When that was; None if unknown.
        kind: ``calls``, ``unreadable``, or another kind of frame.
        problem: Why it cannot be sent again; ``""`` if it can.
        key_id: The key that signed it.
        frame: The calls, with empty payloads and printable names.
        payload_bytes: How long the payload of each call was.
    """

    digest: str
    shelf: Shelf
    size_bytes: int
    reason: str
    since: datetime | None
    kind: str
    problem: str
    key_id: str = ""
    frame: CallFrame | None = None
    payload_bytes: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """What people call it: the first digits of the digest."""
        return self.digest[:_ID_DIGITS]

    @property
    def calls(self) -> list[str]:
        """The ids of its calls."""
        frame = self.frame
        return [] if frame is None else [call_id(frame.client, call[0]) for call in frame.calls]

    @property
    def summary(self) -> str:
        """What it holds, in a few words."""
        if self.frame is None:
            return self.kind
        count, spec = len(self.frame.calls), self.frame.spec
        return f"{count} call{'s' * (count > 1)} of {spec.label or spec.target.name}"

    def row(self) -> dict[str, Any]:
        """What a list says of it."""
        spec = None if self.frame is None else self.frame.spec
        return {
            "id": self.id,
            "pool": self.shelf.pool,
            "queue": self.shelf.fate.value,
            "since": self.since,
            "holds": self.summary,
            "kind": self.kind,
            "label": spec and spec.label,
            "target": spec and spec.target.name,
            "calls": self.calls,
            "reason": self.reason,
            "replayable": not self.problem,
            "size_bytes": self.size_bytes,
        }

    def record(self) -> dict[str, Any]:
        """All that is known of it."""
        return {
            **self.row(),
            "problem": self.problem,
            "digest": self.digest,
            "lies_in": self.shelf.queue,
            "signed_with": self.key_id,
            **({} if self.frame is None else self._circumstances(self.frame)),
        }

    def _circumstances(self, frame: CallFrame) -> dict[str, Any]:
        spec, target = frame.spec, frame.spec.target
        return {
            "signed_for": frame.queue,
            "reply": frame.reply,
            "client": frame.client,
            "target_sha256": target.sha256,
            "target_bytes": target.size,
            "target_python": target.python,
            "resources": spec.resources,
            "timeout_s": spec.timeout_s or None,
            "grace_s": spec.grace_s,
            "echo": spec.echo,
            "tracked": spec.track,
            "attempt": frame.attempt,
            "strikes": frame.strikes,
            "suspicion": frame.suspicion.name.lower(),
            "handed": frame.handed,
            "expires": _moment(frame.expires_at),
            "arguments": [*map(_arguments, self.calls, self.payload_bytes, frame.calls)],
        }


def shelves(key_ids: Iterable[str], pools: Sequence[str]) -> list[Shelf]:
    """Every queue of messages set aside, of these keys and pools."""
    ids = [*key_ids]
    return [Shelf(key_id, pool, fate) for pool in pools for key_id in ids for fate in Fate]


def digest_of(body: bytes) -> str:
    """The SHA-256 of a message, in hex."""
    return hashlib.sha256(body).hexdigest()


def read(body: bytes, headers: Mapping[str, object], shelf: Shelf, keyring: Keyring) -> Aside:
    """Describe a message, whatever it is.

    Args:
        body: The message.
        headers: What the worker attached.
        shelf: Where it lies.
        keyring: The keys whose signatures count.
    """
    found = Aside(
        digest=digest_of(body),
        shelf=shelf,
        size_bytes=len(body),
        reason=_text(str(headers.get(REASON_HEADER, ""))),
        since=_moment(headers.get(SET_ASIDE_HEADER)),
        kind="unreadable",
        problem="",
    )
    try:
        frame, key = open_frame(body, keyring)
    except FlameError as error:
        kind = type(error).__name__
        return replace(found, problem=f"it cannot be read under the keys here ({kind}: {error})")
    found = replace(found, key_id=key.hex_id, kind=_kind(frame))
    if not isinstance(frame, CallFrame):
        return replace(found, problem="it holds no calls")
    return replace(
        found,
        problem=_problem(frame, shelf),
        frame=_without_payloads(frame),
        payload_bytes=tuple(len(call.payload) for call in frame.calls),
    )


def _without_payloads(frame: CallFrame) -> CallFrame:
    """The same calls to be shown: short, and fit for a terminal."""
    spec, target = frame.spec, frame.spec.target
    return replace(
        frame,
        queue=_text(frame.queue),
        reply=_text(frame.reply),
        client=_text(frame.client),
        spec=replace(
            spec,
            label=_text(spec.label),
            resources=_text(spec.resources),
            target=replace(target, name=_text(target.name), python=_text(target.python)),
        ),
        calls=tuple(Call(call.counter, b"", call.refs) for call in frame.calls),
    )


def _text(text: str) -> str:
    """Text without control characters and halves of characters, whoever sent it."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _problem(frame: CallFrame, shelf: Shelf) -> str:
    if shelf.priority_of(frame) is not None:
        return ""
    if shelf.fate is Fate.DEAD:
        return (
            "a worker refused it, see its reason; of what is dead only quarantined calls can be "
            "sent again"
        )
    return f"it was signed for {frame.queue!r}, which is no queue of this pool: it was moved"


def _kind(frame: Frame) -> str:
    if isinstance(frame, CallFrame):
        return "calls"
    return "results" if isinstance(frame, ResultFrame) else "no calls"


def _moment(seconds: object) -> datetime | None:
    """A time that came from outside; None for none and for nonsense."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds < _LATEST_S:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def _arguments(call: str, payload_bytes: int, kept: Call) -> dict[str, Any]:
    return {
        "call": call,
        "payload_bytes": payload_bytes,
        "objects": len(kept.refs),
        "object_bytes": sum(ref.size for ref in kept.refs),
    }
