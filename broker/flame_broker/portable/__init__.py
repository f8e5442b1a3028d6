"""Brokers other than RabbitMQ, through kombu: ``redis://``, ``rediss://`` and ``sqs://``."""

from flame_broker.portable.transport import PortableTransport

__all__ = ["PortableTransport"]
