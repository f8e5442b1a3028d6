"""The transport for RabbitMQ 3.10 and later, on pika's asyncio connection."""

from flame_broker.rabbit.address import RabbitAddress
from flame_broker.rabbit.transport import RabbitTransport

__all__ = ["RabbitAddress", "RabbitTransport"]
