"""Messages change hands in Redis in steps that are whole."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from uuid import uuid4

import pytest
import redis

from flame_broker.portable.mailbox import Mailbox
from flame_broker.portable.redis_lists import RedisLists, Taken

LANDING = "flame.landing"


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def queue(redis_url: str) -> str:
    """A queue with four messages."""
    name = f"test.{uuid4().hex}"
    mailbox = Mailbox(redis_url, {"priority_steps": [0]})
    for body in (b"0", b"1", b"2", b"3"):
        mailbox.send(name, body, {})
    mailbox.close()
    return name


def body_of(message: Taken) -> bytes:
    return base64.b64decode(message.envelope["body"])


def test_what_comes_back_is_next_in_its_old_order_and_marked(
    client: redis.Redis, queue: str
) -> None:
    lists = RedisLists(client)
    for _ in range(2):
        lists.give_back([message.tag for message in lists.receive(queue, 3)])
    found = [(body_of(message), message.redelivered) for message in lists.receive(queue, 10)]
    assert found == [(b"0", True), (b"1", True), (b"2", True), (b"3", False)]


def test_what_was_not_held_for_its_time_comes_back_once(client: redis.Redis, queue: str) -> None:
    taker, others = RedisLists(client), [RedisLists(client), RedisLists(client)]
    tags = [message.tag for message in taker.receive(queue, 4)]
    taker.ack(tags[0])
    for other in others:
        other.restore(visibility_s=60)
    assert client.llen(queue) == 0
    for other in others:
        other.restore(visibility_s=0)
    assert [body_of(message) for message in taker.receive(queue, 10)] == [b"1", b"2", b"3"]


def test_a_message_whose_taker_died_with_it_in_the_landing_comes_back_unmarked(
    client: redis.Redis, queue: str
) -> None:
    client.lmove(queue, LANDING, "RIGHT", "LEFT")
    other = RedisLists(client)
    other.restore(visibility_s=60)
    assert client.llen(queue) == 3, "its taker may be about to take it"
    other.restore(visibility_s=60)
    found = [(body_of(message), message.redelivered) for message in other.receive(queue, 10)]
    assert found == [(b"0", False), (b"1", False), (b"2", False), (b"3", False)]


def test_a_taker_that_was_too_slow_takes_another_message(client: redis.Redis, queue: str) -> None:
    slow, quick = RedisLists(client), RedisLists(client)
    landed = client.lmove(queue, LANDING, "RIGHT", "LEFT")
    assert landed is not None
    for _ in range(2):
        quick.restore(visibility_s=60)
    assert [body_of(message) for message in quick.receive(queue, 1)] == [b"0"]
    assert [body_of(message) for message in slow._take(queue, 1, landed)] == [b"1"]


def test_who_ceases_to_wait_puts_down_what_landed_meanwhile(
    client: redis.Redis, queue: str
) -> None:
    lists = RedisLists(client)
    lists.receive(queue, 10)
    assert lists.receive(queue, 1) == []
    late = {"properties": {"delivery_info": {"routing_key": queue}}}
    client.lpush(queue, json.dumps(late))
    assert client.llen(queue) == 0
    lists.close()
    assert client.llen(queue) == 1
    assert client.lrange(LANDING, 0, -1) == []


def test_many_small_messages_are_taken_at_once_and_large_ones_are_not(
    client: redis.Redis, queue: str
) -> None:
    for _ in range(100):
        client.rpush(queue, "{}")
    lists = RedisLists(client)
    assert len(lists.receive(queue, 10**6)) == 64
    for _ in range(3):
        client.rpush(queue, json.dumps({"body": "x" * 1024 * 1024}))
    assert len(lists.receive(queue, 10)) == 1
