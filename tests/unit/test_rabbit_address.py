"""Broker URLs of RabbitMQ, and the pauses between attempts."""

from __future__ import annotations

import pytest

from flame_broker.backoff import Backoff
from flame_broker.errors import ConfigError
from flame_broker.rabbit import RabbitAddress


def test_a_full_url_is_understood() -> None:
    address = RabbitAddress.parse(
        "amqps://ada:s%3Acret@one:5000;two;[::1]:5002/my%2Fhost?heartbeat=20&ca=/etc/ca.pem"
    )
    assert address.hosts == (("one", 5000), ("two", 5671), ("::1", 5002))
    assert (address.user, address.password, address.vhost) == ("ada", "s:cret", "my/host")
    assert address.tls
    assert address.heartbeat_s == 20
    assert address.ca == "/etc/ca.pem"


def test_what_is_left_out_has_rabbitmqs_defaults() -> None:
    for url in ("amqp://localhost", "amqp://localhost/"):
        address = RabbitAddress.parse(url)
        assert address.hosts == (("localhost", 5672),)
        assert (address.user, address.password, address.vhost) == ("guest", "guest", "/")
        assert not address.tls


def test_the_password_is_never_shown() -> None:
    address = RabbitAddress.parse("amqp://ada:hunter2@broker/")
    assert "hunter2" not in repr(address)
    assert "hunter2" not in str(address)
    assert "broker:5672" in str(address)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://localhost", "amqp"),
        ("ada:hunter2@host", "no '://'"),
        ("amqp://", "host"),
        ("amqp://one;;two", "host"),
        ("amqp://one:port", "one:port"),
        ("amqp://one?heartbeets=3", "heartbeets"),
        ("amqp://one?heartbeat=0", "heartbeat"),
        ("amqp://[::1", "URL"),
    ],
)
def test_a_wrong_url_is_refused_by_what_is_wrong(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RabbitAddress.parse(url)


def test_pauses_grow_to_a_ceiling_and_start_over() -> None:
    backoff = Backoff(base_s=0.1, cap_s=1.0)
    for ceiling_s in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert 0 <= backoff.next_s() <= ceiling_s
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_pauses_are_spread() -> None:
    pauses_s = [Backoff(base_s=1.0).next_s() for _ in range(100)]
    assert min(pauses_s) < 0.3
    assert max(pauses_s) > 0.7
