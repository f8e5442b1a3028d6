"""Ten thousand hostile messages of each kind: set aside with a reason, nothing unpickled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

import flame
from flame_broker.codec import encode_value
from flame_broker.frames import MAX_FRAME_BYTES, encode
from flame_broker.keys import Key
from flame_broker.messages import (
    Call,
    CallFrame,
    CallSpec,
    ControlFrame,
    Plain,
    Result,
    ResultFrame,
    Status,
    Target,
)
from flame_broker.topology import (
    calls_queue,
    control_exchange,
    dead_queue,
    logs_exchange,
    parked_queue,
    reply_queue,
)
from lab import RabbitNode
from lab.cluster import LabCluster, LabWorker
from lab.hostile import Forger, Mark, collect, draw, huge_bodies, publish, publish_raw
from lab.wait import wait_until

MANY = 10_000
SEED = 20_261_121


class Siege:
    """One worker for all attacks, so that each meets what the others left behind."""

    def __init__(self, cluster: LabCluster) -> None:
        self.cluster = cluster
        self.worker: LabWorker = cluster.worker("--slots", "4")
        self.pid = self.worker.health["pid"]
        self.queue = calls_queue(cluster.key_id, "default", "c1").name
        self.seen = 0
        self.mark = cluster.folder / "somebody-unpickled-it"
        self.forger = Forger(Key.parse(cluster.key), self.queue, self.mark)

    def set_aside(self, fate: str) -> int:
        """How many messages the worker says it has put there."""
        assert self.worker.running, self.worker.output()[-4000:]
        return int(self.worker.health.get(f"count_{fate}", 0))

    def send(self, bodies: list[bytes], fate: str) -> list[str]:
        """Attack, and return the reasons for which the messages were set aside."""
        before = self.set_aside(fate)
        publish(self.cluster.broker_url, self.queue, bodies)
        kept, reasons = self.taken(fate, len(bodies))
        assert kept == sorted(bodies)
        wait_until(lambda: self.set_aside(fate) == before + len(bodies), 10)
        return reasons

    def taken(self, fate: str, count: int) -> tuple[list[bytes], list[str]]:
        """Empty the queue of messages set aside: sorted bodies, and the reasons."""
        aside = dead_queue if fate == "dead" else parked_queue
        queue = aside(self.cluster.key_id, "default").name
        found = collect(self.cluster.broker_url, queue, count)
        reasons = [str(delivery.headers.get("x-flame-reason", "")) for delivery in found]
        return sorted(delivery.body for delivery in found), reasons

    def check_unharmed(self) -> None:
        """The same process serves, and has unpickled nothing."""
        assert not self.mark.exists()
        with self.cluster.client() as client, flame.Runner("t", client=client) as runner:
            assert runner.service(abs)(-7).get(timeout=30) == 7
        assert self.worker.running
        assert self.worker.health["pid"] == self.pid
        said = self.worker.output()[self.seen :]
        self.seen += len(said)
        assert "Traceback" not in said
        assert self.cluster.depth(lambda key, pool: calls_queue(key, pool, "c1")) == 0


@pytest.fixture(scope="module")
def siege(rabbit: RabbitNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    url = rabbit.vhost()
    cluster = LabCluster(url, tmp_path_factory.mktemp("siege"))
    try:
        yield Siege(cluster)
    finally:
        cluster.close()
        rabbit.delete_vhost(url)


def test_the_mark_shows_when_an_honest_frame_is_unpickled(siege: Siege) -> None:
    publish(siege.cluster.broker_url, siege.queue, [siege.forger.body])
    wait_until(siege.mark.exists, 20, siege.worker.output)
    siege.mark.rmdir()


Kind = Callable[[Forger, Random], bytes]
KINDS: list[tuple[str, Kind, str, str]] = [
    ("unsigned", Forger.unsigned, "dead", "MalformedMessage SignatureError"),
    ("wrongly signed", Forger.wrongly_signed, "dead", "SignatureError"),
    ("truncated", Forger.truncated, "dead", "MalformedMessage SignatureError"),
    ("oversized", Forger.oversized, "dead", "MalformedMessage"),
    ("random", Forger.noise, "dead", "MalformedMessage SignatureError"),
    ("newer version", Forger.newer, "parked", "VersionMismatch"),
    ("unknown key", Forger.unknown_key, "parked", "UnknownKey"),
]


@pytest.mark.parametrize(("kind", "make", "fate", "reasons"), KINDS, ids=[k[0] for k in KINDS])
def test_hostile_messages_are_set_aside_with_a_reason(
    siege: Siege, kind: str, make: Kind, fate: str, reasons: str
) -> None:
    print(f"{kind}: seed {SEED}")
    bodies = draw(partial(make, siege.forger), MANY, SEED)
    given = siege.send(bodies, fate)
    assert {reason.partition(":")[0] for reason in given} == set(reasons.split())
    siege.check_unharmed()


def test_bodies_over_the_limit_are_refused_unread(siege: Siege) -> None:
    bodies = huge_bodies()
    publish_raw(siege.cluster.broker_url, siege.queue, bodies)
    kept, given = siege.taken("dead", len(bodies))
    assert kept == sorted(body[:MAX_FRAME_BYTES] for body in bodies)
    assert all("the limit is" in reason for reason in given)
    siege.check_unharmed()


def test_hostile_orders_are_refused_and_the_worker_goes_on(siege: Siege) -> None:
    forger = Forger(siege.forger.key, control_exchange(siege.cluster.key_id), siege.mark)
    kinds = [Forger.unsigned, Forger.wrongly_signed, Forger.truncated, Forger.newer, Forger.noise]
    before = siege.worker.output().count("control.refused")
    for number, make in enumerate(kinds):
        bodies = draw(partial(make, forger), 1000, SEED + number)
        publish(siege.cluster.broker_url, "", bodies, exchange=forger.queue)
    sent = 1000 * len(kinds)
    wait_until(lambda: siege.worker.output().count("control.refused") == before + sent, 20)
    siege.check_unharmed()


ORDERS: list[tuple[str, dict[str, Plain]]] = [
    ("no such verb", {}),
    ("class", {"name": "c-1", "pool": "default"}),
    ("class", {"name": b"\xff", "pool": ("default",)}),
    ("cancel", {"client": 7, "counters": "all"}),
    ("cancel", {"counters": (None, "x", -1, 2**63)}),
    ("hello", {"reply": "nobody"}),
    ("hello", {"reply": ("x",) * 300}),
    ("drain", {"worker": ("x",)}),
]


def test_signed_orders_that_make_no_sense_do_no_harm(siege: Siege) -> None:
    exchange = control_exchange(siege.cluster.key_id)
    orders = [encode(ControlFrame(exchange, *order), siege.forger.key) for order in ORDERS]
    publish(siege.cluster.broker_url, "", orders, exchange=exchange)
    siege.check_unharmed()


NONSENSE: list[dict[str, Any]] = [
    {"resources": "bananas"},
    {"resources": "c64-m1024"},
    {"timeout_s": float("nan")},
    {"timeout_s": -1.0, "grace_s": -1.0},
    {"target": Target("nowhere:nothing")},
    {"target": Target("")},
    {"target": Target("x:y", "../../etc/passwd", 1, "3.11")},
    {"label": "\udc80\x1b[2J"},
]


def test_signed_calls_that_make_no_sense_block_nobody(siege: Siege) -> None:
    calls = tuple(Call(counter, b"\x00\x92\x90\x80") for counter in range(3))
    frames = [
        CallFrame(siege.queue, reply, "c" * 300, changed, calls, expires_at=late)
        for changed in (replace(CallSpec(Target("builtins:repr")), **c) for c in NONSENSE)
        for reply in ("nobody", "n" * 300, "")
        for late in (0.0, 1.0, float("nan"), -1e300)
    ]
    publish(siege.cluster.broker_url, siege.queue, [encode(f, siege.forger.key) for f in frames])
    siege.check_unharmed()
    wait_until(lambda: siege.worker.health["held"] == 0, 15, siege.worker.output)


def test_hostile_results_and_output_do_not_reach_a_future(siege: Siege) -> None:
    cluster = siege.cluster
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(answer_when)
        gate = cluster.folder / "gate"
        futures = [service(str(gate), number) for number in range(4)]
        answers = client.session.courier.answers
        reply = reply_queue(cluster.key_id, client.id, 0).name
        attack_results(siege, client.id, reply, [future.counter for future in futures])
        wait_until(lambda: sum(answers.refused.values()) >= 5 * 2000, 20)
        assert not any(future.done() for future in futures)
        gate.touch()
        assert runner.get(futures, timeout=30) == [0, 1, 2, 3]
        assert service(str(gate), 9).get(timeout=30) == 9
    assert not siege.mark.exists()


def answer_when(gate: str, number: int) -> int:
    while not Path(gate).exists():
        time.sleep(0.01)
    return number


def attack_results(siege: Siege, client: str, reply: str, counters: list[int]) -> None:
    """Send a client what it must not believe, to its reply queue and to its console."""
    forger = Forger(siege.forger.key, reply, siege.mark)
    stranger = Key(b"somebody else's key, just as long as ours")
    lie = Result(counters[0], Status.OK, encode_value(Mark(siege.mark)).join())
    stranger_says = encode(ResultFrame(reply, client, "worker", (lie,)), stranger)
    renamed = stranger_says[:4] + siege.forger.key.id + stranger_says[8:]
    elsewhere = ResultFrame(f"{reply}0", client, "worker", (lie,))
    lies = [stranger_says, renamed, encode(elsewhere, siege.forger.key)]
    for number, make in enumerate((Forger.unsigned, Forger.truncated, Forger.newer, Forger.noise)):
        lies += draw(partial(make, forger), 2000, SEED + number)
    url = siege.cluster.broker_url
    publish(url, reply, lies)
    logs = logs_exchange(siege.cluster.key_id)
    publish(url, client, draw(forger.noise, 2000, SEED), exchange=logs)
