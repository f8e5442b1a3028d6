"""Brokers other than RabbitMQ: the same calls, and what is missing is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from flame.errors import ConfigError, WorkerLost
from flame_broker.topology import calls_queue, dead_queue, suspects_queue
from lab.cluster import LabCluster
from lab.wait import wait_until

_FLAME = Path(sys.executable).parent / "flame"
_TEN_KIB = 10 * 1024


def square(number: int) -> int:
    return number * number


def divide(number: int) -> float:
    return number / 0


def repeat(letter: str, times: int) -> str:
    return letter * times


def leave() -> None:
    os._exit(3)


@pytest.fixture(params=["redis", "sqs"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LabCluster]:
    """A cluster on Redis or SQS, with one worker."""
    url = request.getfixturevalue(f"{request.param}_url")
    made = LabCluster(f"{url}&wait_s=1" if request.param == "sqs" else url, tmp_path)
    try:
        made.worker("--slots", "2")
        yield made
    finally:
        made.close()


@pytest.fixture
def sqs(sqs_url: str, tmp_path: Path) -> LabCluster:
    """A cluster on SQS without workers."""
    return LabCluster(f"{sqs_url}&wait_s=1", tmp_path)


def depth_of_calls(cluster: LabCluster) -> int | None:
    return cluster.depth(lambda key, pool: calls_queue(key, pool, "c1"))


def test_calls_run_and_fail_as_on_any_broker(other: LabCluster) -> None:
    with other.client() as client, flame.Runner("other", client=client) as runner:
        squares = [runner.service(square)(n) for n in range(50)]
        assert [f.result(30) for f in squares] == [n * n for n in range(50)]
        with pytest.raises(ZeroDivisionError):
            runner.service(divide)(1).result(30)
        with pytest.raises(WorkerLost):
            runner.service(leave)().result(30)
    wait_until(lambda: depth_of_calls(other) == 0, 10)
    assert not other.depth(suspects_queue)
    assert not other.depth(dead_queue)


def test_results_that_fit_no_message_together_come_in_several(other: LabCluster) -> None:
    with other.client() as client, flame.Runner("other", client=client) as runner:
        long = runner.service(repeat)
        futures = [long("x", 6 * _TEN_KIB) for _ in range(30)]
        assert [len(f.result(30)) for f in futures] == [6 * _TEN_KIB] * 30


def test_a_worker_without_fan_out_says_what_is_missing(sqs: LabCluster) -> None:
    try:
        worker = sqs.worker("--slots", "1")
        assert worker.output().count("broker.no_fanout") == 1
        worker.terminate()
        assert worker.wait() == 0
    finally:
        sqs.close()


def test_other_resources_are_refused_where_no_worker_could_learn_of_them(
    sqs: LabCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with sqs.client() as client, flame.Runner("other", client=client) as runner:
        assert sum("broker.no_fanout" in r.getMessage() for r in caplog.records) == 1
        with pytest.raises(ConfigError, match="SQS"):
            runner.service(square, resreq="cpu=2")(1).result(30)
        with pytest.raises(ConfigError, match="fan-out"):
            client.workers()


def test_a_cancel_without_fan_out_is_local(sqs: LabCluster) -> None:
    with sqs.client() as client, flame.Runner("other", client=client) as runner:
        future = runner.service(square)(1)
        wait_until(lambda: depth_of_calls(sqs), 10)
        assert future.cancel()
        assert future.cancelled()


def test_commands_give_no_misleading_advice_without_fan_out(sqs: LabCluster) -> None:
    try:
        sqs.worker("--slots", "1")
        done = command(sqs, "doctor", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        (workers,) = [f for f in json.loads(done.stdout) if f["check"] == "workers"]
        assert "no fan-out" in workers["text"]
        assert "a call took" in workers["text"]
        assert command(sqs, "queues").returncode == 0
        listed = command(sqs, "workers")
        assert listed.returncode == 22
        assert "start one" not in listed.stdout + listed.stderr
    finally:
        sqs.close()


def command(cluster: LabCluster, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_FLAME, *words],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
