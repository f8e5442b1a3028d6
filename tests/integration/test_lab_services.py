"""The lab's services do what other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pika
import pytest
from redis import Redis

from lab import RabbitNode, RedisServer, S3Server, wait_until

QUORUM = {"x-queue-type": "quorum"}


def publish(url: str, queue: str, body: bytes = b"x") -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, arguments=QUORUM)
    channel.confirm_delivery()
    channel.basic_publish("", queue, body, mandatory=True)
    connection.close()


def test_a_virtual_host_is_fresh_and_counts_its_messages(
    rabbit: RabbitNode, rabbit_vhost: str
) -> None:
    assert rabbit.queue_depth("work", rabbit_vhost) == -1
    publish(rabbit_vhost, "work")
    assert rabbit.queue_depth("work", rabbit_vhost) == 1
    wait_until(lambda: rabbit.queues(rabbit_vhost) == {"work": (1, 0)})


def test_a_killed_node_comes_back_with_its_messages_and_leaves_nothing_when_closed(
    own_rabbit: RabbitNode,
) -> None:
    url = own_rabbit.vhost("mine")
    publish(url, "work")
    own_rabbit.settle()
    own_rabbit.kill()
    assert not own_rabbit.running
    own_rabbit.start()
    wait_until(lambda: own_rabbit.queue_depth("work", url) == 1)  # once it has elected a leader
    own_rabbit.close()
    assert not own_rabbit.folder.exists()


def test_an_alarm_blocks_publishers_until_it_is_cleared(own_rabbit: RabbitNode) -> None:
    url = own_rabbit.vhost()
    own_rabbit.set_alarm()
    parameters = pika.URLParameters(url)
    parameters.blocked_connection_timeout = 1
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    channel.queue_declare("work", durable=True, arguments=QUORUM)
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.ConnectionBlockedTimeout):
        channel.basic_publish("", "work", b"x")
    own_rabbit.clear_alarm()
    publish(url, "work")


def test_the_s3_server_keeps_an_object(s3: S3Server) -> None:
    bucket = s3.make_bucket("lab")
    s3.client().put_object(Bucket=bucket, Key="greeting", Body=b"hello")
    answer = s3.client().get_object(Bucket=bucket, Key="greeting")
    assert answer["Body"].read() == b"hello"
    assert s3.store_url(bucket, "a/b").startswith(f"s3://lab/a/b?endpoint={s3.endpoint}")


def test_redis_keeps_its_data_over_a_kill() -> None:
    with RedisServer() as server:
        Redis.from_url(server.url).rpush("work", b"x")
        wait_until(lambda: any(file.stat().st_size for file in aof_files(server)))
        server.kill()
        server.start()
        assert Redis.from_url(server.url).llen("work") == 1


def aof_files(server: RedisServer) -> list[Path]:
    return list(server.folder.glob("appendonlydir/*.aof")) + list(server.folder.glob("*.aof"))
