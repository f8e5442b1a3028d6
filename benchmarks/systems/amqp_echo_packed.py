"""The bare AMQP echo with 64 calls in a message: what packing alone gives."""

from __future__ import annotations

from systems.amqp_echo import AmqpEcho


class PackedAmqpEcho(AmqpEcho):
    """Up to 64 calls in one message."""

    calls_per_message = 64


SYSTEM = PackedAmqpEcho
