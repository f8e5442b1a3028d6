"""Every transport with a real broker behind it, against the one contract."""

from __future__ import annotations

import pytest

from contract.transport import MakeTransport, TransportContract
from flame_broker.connect import open_transport
from flame_broker.transport import Transport
from lab import free_port


class TestRabbitContract(TransportContract):
    @pytest.fixture
    def shared_url(self, rabbit_vhost: str) -> str:
        return rabbit_vhost

    @pytest.fixture
    def make_transport(self, shared_url: str) -> MakeTransport:
        return lambda: open_transport(shared_url, name="contract")

    @pytest.fixture
    def absent_transport(self) -> Transport:
        return open_transport(f"amqp://127.0.0.1:{free_port()}/", name="contract")


class TestRedisContract(TransportContract):
    @pytest.fixture
    def shared_url(self, redis_url: str) -> str:
        return f"{redis_url}?visibility_s=3"

    @pytest.fixture
    def make_transport(self, shared_url: str) -> MakeTransport:
        return lambda: open_transport(shared_url, name="contract")

    @pytest.fixture
    def absent_transport(self) -> Transport:
        return open_transport(f"redis://127.0.0.1:{free_port()}/0", name="contract")


class TestSqsContract(TransportContract):
    in_flight = 300  # moto answers some 200 requests a second

    @pytest.fixture
    def shared_url(self, sqs_url: str) -> str:
        return f"{sqs_url}&visibility_s=3&wait_s=1"

    @pytest.fixture
    def make_transport(self, shared_url: str) -> MakeTransport:
        return lambda: open_transport(shared_url, name="contract")

    @pytest.fixture
    def absent_transport(self) -> Transport:
        url = f"sqs://key:secret@127.0.0.1:{free_port()}/?is_secure=0"
        return open_transport(url, name="contract")
