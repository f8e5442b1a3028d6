"""The names and declare arguments of every queue and exchange.

What correctness needs stands here, in declare arguments under versioned names; a broker policy
only tunes (PROTOCOL.md, rule 15). Names carry the format version and the key id, so that a worker
without the key never consumes what it cannot verify (rule 1).

Shipped arguments are accepted alike by RabbitMQ 3.10 and 4.x: a delivery limit of -1 is refused
by 3.x and a missing one means 20 on 4.x, so a number that is never reached stands for "none".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from flame_broker.messages import Priority
from flame_broker.transport import QueueKind, QueueSpec

__all__ = [
    "DEFAULT_POOL",
    "REASON_HEADER",
    "SET_ASIDE_HEADER",
    "beats_exchange",
    "beats_queue",
    "bound_ledger_queue",
    "calls_exchange",
    "calls_queue",
    "check_pool",
    "classes_queue",
    "control_exchange",
    "control_queue",
    "custody_queue",
    "dead_beside",
    "dead_queue",
    "kept_logs_queue",
    "kept_output",
    "ledger_queue",
    "logs_exchange",
    "logs_queue",
    "parked_queue",
    "questions_queue",
    "reply_queue",
    "suspects_beside",
    "suspects_queue",
    "tracked",
    "work_queue",
]

DEFAULT_POOL = "default"

REASON_HEADER: Final = "x-flame-reason"
"""Why a message was set aside: the name of the error, and what it said."""

SET_ASIDE_HEADER: Final = "x-flame-set-aside"
"""When that was, in whole seconds since 1970 by the worker's clock."""

_PREFIX: Final = "flame.v1"
_POOL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_DELIVERY_LIMIT: Final = 1_000_000
_REPLY_EXPIRES_MS: Final = 24 * 3600 * 1000
_LEDGER_TTL_MS: Final = 7 * 24 * 3600 * 1000
_QUESTION_TTL_MS: Final = 60 * 1000
_TELEMETRY_MESSAGES: Final = 10_000
_CLASSES_BYTES: Final = 16 * 1024 * 1024
_KEPT_LOGS_BYTES: Final = 64 * 1024 * 1024


def check_pool(name: object) -> str:
    """The name itself, if a pool can have it: it becomes a part of queue names.

    Raises:
        ValueError: It cannot; the message says what was expected.
    """
    if not isinstance(name, str) or _POOL.fullmatch(name) is None:
        raise ValueError(
            "expected letters, digits, '-' and '_', up to 64 of them, since it becomes a part of "
            "queue names"
        )
    return name


def work_queue(name: str) -> QueueSpec:
    """A queue that never drops: full means refused, set aside means stored elsewhere."""
    return QueueSpec(
        name,
        QueueKind.QUORUM,
        arguments={
            "x-overflow": "reject-publish",
            "x-dead-letter-strategy": "at-least-once",
            "x-delivery-limit": _NO_DELIVERY_LIMIT,
        },
    )


def calls_queue(
    key_id: str, pool: str, resource_class: str, priority: Priority = Priority.NORMAL
) -> QueueSpec:
    """Where calls of one pool, resource class and priority wait."""
    return work_queue(f"{_PREFIX}.{key_id}.{pool}.{resource_class}.{priority.value}")


def suspects_queue(key_id: str, pool: str) -> QueueSpec:
    """Where redelivered calls wait, one a frame, to be run alone (rule 4)."""
    return work_queue(f"{_PREFIX}.{key_id}.{pool}.suspects")


def suspects_beside(queue: str) -> str:
    """The name of the suspects queue in the pool of another of its queues, or of itself.

    >>> suspects_beside("flame.v1.0a1b2c3d.default.c1.normal")
    'flame.v1.0a1b2c3d.default.suspects'
    """
    return ".".join([*queue.split(".")[:4], "suspects"])


def dead_beside(queue: str) -> str:
    """The same for the messages that nobody can run."""
    return ".".join([*queue.split(".")[:4], "dead"])


def dead_queue(key_id: str, pool: str) -> QueueSpec:
    """Messages that nobody can run: wrongly signed, malformed, quarantined; with a reason."""
    return work_queue(f"{_PREFIX}.{key_id}.{pool}.dead")


def parked_queue(key_id: str, pool: str) -> QueueSpec:
    """Messages of an unknown key or a newer version: another worker may be able to read them."""
    return work_queue(f"{_PREFIX}.{key_id}.{pool}.parked")


def calls_exchange(key_id: str) -> str:
    """The topic exchange that tracked calls and their results go through; keys are queue names.

    The broker itself copies each frame to the ledger, once an orchestrator has bound it (rule 8).
    """
    return f"{_PREFIX}.{key_id}.calls"


def tracked(queue: QueueSpec, key_id: str, *, also: Iterable[str] = ()) -> QueueSpec:
    """The same queue, reached through the calls exchange as well.

    Args:
        queue: The queue.
        key_id: Whose exchange.
        also: Names of queues that are gone: what is sent to them comes here.
    """
    exchange = calls_exchange(key_id)
    return replace(queue, bindings=tuple((exchange, name) for name in (queue.name, *also)))


def ledger_queue(key_id: str) -> QueueSpec:
    """Results whose reply queue is gone (rule 9), kept a week for the orchestrator."""
    spec = work_queue(f"{_PREFIX}.{key_id}.ledger")
    return QueueSpec(
        spec.name, spec.kind, arguments={**spec.arguments, "x-message-ttl": _LEDGER_TTL_MS}
    )


def bound_ledger_queue(key_id: str) -> QueueSpec:
    """The same queue, which the broker copies each tracked frame to."""
    return replace(ledger_queue(key_id), bindings=((calls_exchange(key_id), "#"),))


def questions_queue(key_id: str) -> QueueSpec:
    """Where the orchestrator takes questions; the one that leads answers (rule 11)."""
    return QueueSpec(
        f"{_PREFIX}.{key_id}.questions",
        # Replicated, or nobody could ask while one node of the broker is away.
        QueueKind.QUORUM,
        arguments={"x-single-active-consumer": True, "x-message-ttl": _QUESTION_TTL_MS},
    )


def custody_queue(key_id: str) -> QueueSpec:
    """Where calls that need time go, and their results; the one that leads takes them (rule 11)."""
    spec = work_queue(f"{_PREFIX}.{key_id}.custody")
    return replace(spec, arguments={**spec.arguments, "x-single-active-consumer": True})


def reply_queue(key_id: str, client: str, epoch: int) -> QueueSpec:
    """Where a client's results arrive; it outlives a broken connection by a day."""
    return QueueSpec(
        f"{_PREFIX}.{key_id}.reply.{client}.{epoch}",
        QueueKind.CLASSIC,
        arguments={"x-expires": _REPLY_EXPIRES_MS},
    )


def _ear(name: str, *bindings: tuple[str, str]) -> QueueSpec:
    """A listener's own queue: it goes with the connection, and the oldest drop first."""
    return QueueSpec(
        name,
        QueueKind.CLASSIC,
        exclusive=True,
        arguments={"x-max-length": _TELEMETRY_MESSAGES, "x-overflow": "drop-head"},
        bindings=bindings,
    )


def control_exchange(key_id: str) -> str:
    """The fanout on which all workers of a key listen."""
    return f"{_PREFIX}.{key_id}.control"


def control_queue(key_id: str, worker: str) -> QueueSpec:
    """A worker's own ear on the control exchange."""
    return _ear(f"{_PREFIX}.{key_id}.control.{worker}", (control_exchange(key_id), ""))


def beats_exchange(key_id: str) -> str:
    """The fanout that workers' heartbeats go to, by which leases are renewed (rule 6)."""
    return f"{_PREFIX}.{key_id}.beats"


def beats_queue(key_id: str, orchestrator: str) -> QueueSpec:
    """An orchestrator's own ear on the heartbeats: bounded, and the newest ones count."""
    return _ear(f"{_PREFIX}.{key_id}.beats.{orchestrator}", (beats_exchange(key_id), ""))


def logs_exchange(key_id: str) -> str:
    """The topic exchange for output and progress.

    The routing key is the client, or what ``kept_output`` makes of it.
    """
    return f"{_PREFIX}.{key_id}.logs"


def kept_output(client: str) -> str:
    """The routing key for output of tracked calls, which an orchestrator keeps."""
    return f"{client}.kept"


def kept_logs_queue(key_id: str) -> QueueSpec:
    """The orchestrators' ear on the logs exchange: bounded, the oldest frames drop first.

    It stays while an orchestrator is away for a moment, and goes a week after the last one.
    """
    return QueueSpec(
        f"{_PREFIX}.{key_id}.kept-logs",
        QueueKind.CLASSIC,
        arguments={
            "x-max-length": _TELEMETRY_MESSAGES,
            "x-max-length-bytes": _KEPT_LOGS_BYTES,
            "x-overflow": "drop-head",
            "x-expires": _LEDGER_TTL_MS,
            # Lines of a call are written in their order, so by one orchestrator.
            "x-single-active-consumer": True,
        },
        bindings=((logs_exchange(key_id), kept_output("*")),),
    )


def logs_queue(key_id: str, client: str) -> QueueSpec:
    """A client's own ear on the logs exchange; bounded, the oldest lines drop first."""
    bindings = [(logs_exchange(key_id), key) for key in (client, kept_output(client))]
    return _ear(f"{_PREFIX}.{key_id}.logs.{client}", *bindings)


def classes_queue(key_id: str, pool: str) -> QueueSpec:
    """A stream of announcements: which resource classes have queues in this pool.

    AMQP cannot list queues. A stream is read from its start by every worker that joins, without
    consuming it, so a class stays known when the client that used it and all workers are gone.
    """
    return QueueSpec(
        f"{_PREFIX}.{key_id}.{pool}.classes",
        QueueKind.STREAM,
        arguments={"x-max-length-bytes": _CLASSES_BYTES},
    )
