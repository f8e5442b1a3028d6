"""``flame dead`` on RabbitMQ: what workers set aside is listed, shown, sent again and dropped."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.errors import BrokerUnavailable, Quarantined
from flame_broker.codec import encode_arguments
from flame_broker.connect import open_transport
from flame_broker.frames import decode, encode
from flame_broker.keys import Key, Keyring, generate_key
from flame_broker.messages import Call, CallFrame, CallSpec, ResultFrame, Status, Target
from flame_broker.topology import (
    REASON_HEADER,
    calls_queue,
    dead_queue,
    ledger_queue,
    parked_queue,
)
from flame_broker.transport import QueueSpec
from flame_cli.aside import Fate, Shelf
from flame_cli.hands import Hands, Pile
from lab import Process, RabbitNode
from lab.cluster import LabCluster, LabWorker
from lab.hostile import collect, publish
from lab.rabbit_client import drop_connection
from lab.wait import wait_until

FLAME = Path(sys.executable).with_name("flame")

Run = Callable[..., subprocess.CompletedProcess[str]]


HOLDER = """
import asyncio, sys
from flame_cli.aside import Fate, Shelf
from flame_cli.hands import Hands

async def hold(url, key_id, count):
    async with Hands(url) as hands:
        pile = await hands.reach(Shelf(key_id, "default", Fate.DEAD), count)
        for _ in range(count):
            assert await pile.next() is not None
        print("in hand", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.fixture
def run(cluster: LabCluster) -> Run:
    """Runs ``flame dead`` with the cluster's settings, or with others."""
    return partial(dead, cluster)


def dead(cluster: LabCluster, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``flame dead`` with the cluster's settings, or with others."""
    return subprocess.run(
        [FLAME, "dead", *words],
        env={**cluster.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def answer(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """What a command printed as JSON."""
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def listed(run: Run, **environ: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer(run("list", "--pool", "default", "--json", **environ))
    return found


def lying(cluster: LabCluster) -> tuple[int, int]:
    """How many messages are dead, and how many parked."""
    return cluster.depth(dead_queue) or 0, cluster.depth(parked_queue) or 0


def frame_of(
    cluster: LabCluster, number: int, *, queue: str = "", key: str = "", target: str = "abs"
) -> bytes:
    """A signed frame of one call, from a client that is gone."""
    queue = queue or calls_queue(cluster.key_id, "default", "c1").name
    call = Call(number, encode_arguments((-number,), {}).join())
    spec = CallSpec(Target(f"builtins:{target}"), label=target)
    frame = CallFrame(queue, "nobody", "gone", spec, (call,), expires_at=time.time() + 3600)
    return encode(frame, Key.parse(key or cluster.key))


def put(cluster: LabCluster, spec: QueueSpec, bodies: Sequence[bytes]) -> None:
    """Set messages aside as a worker does."""
    asyncio.run(_put(cluster.broker_url, spec, bodies))


async def _put(url: str, spec: QueueSpec, bodies: Sequence[bytes]) -> None:
    transport = open_transport(url, name="flame-lab")
    await transport.open()
    try:
        await transport.declare(spec)
        for body in bodies:
            await transport.publish(spec.name, body, headers={REASON_HEADER: "Test: a reason"})
    finally:
        await transport.close()


def put_quarantined(cluster: LabCluster, *numbers: int) -> None:
    """Quarantine calls as a worker does, without losing any."""
    spec = dead_queue(cluster.key_id, "default")
    put(cluster, spec, [frame_of(cluster, number, queue=spec.name) for number in numbers])


def taken(cluster: LabCluster, spec: QueueSpec, count: int) -> list[bytes]:
    return [delivery.body for delivery in collect(cluster.broker_url, spec.name, count)]


# --- calls that killed their workers -----------------------------------------------------------


def deadly_until(gate: str, trace: str, number: int) -> int:
    """Kill the worker unless the gate is open."""
    if not Path(gate).exists():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    Path(trace).touch()
    return number + 1


def quarantine(cluster: LabCluster, future: flame.ObjectFuture[int]) -> None:
    """Let a call kill workers until it is set aside; leaves a worker that lives."""
    worker = cluster.start_worker("--slots", "1")
    deaths = 0
    while not future.done() and deaths < 8:
        wait_until(partial(_gone_or_done, worker, future), 60)
        if not worker.running:
            deaths += 1
            worker = cluster.start_worker("--slots", "1")
    with pytest.raises(Quarantined):
        future.get(timeout=30)


def _gone_or_done(worker: LabWorker, future: flame.ObjectFuture[int]) -> bool:
    return not worker.running or future.done()


def outcomes_written(cluster: LabCluster) -> int:
    """How many frames of results the history has written down."""
    with closing(sqlite3.connect(cluster.folder / "home" / "ledger.sqlite")) as ledger:
        return int(ledger.execute("SELECT count(*) FROM outcomes").fetchone()[0])


def state_of(cluster: LabCluster, call: str) -> str:
    """What the history says."""
    words = [FLAME, "show", call, "--json"]
    done = subprocess.run(words, env=cluster.environ, capture_output=True, text=True, timeout=60)
    return str(answer(done)["state"])


def test_a_quarantined_call_is_listed_and_shown_and_runs_when_it_is_replayed(
    cluster: LabCluster, run: Run, tmp_path: Path
) -> None:
    cluster.orchestrator()
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(deadly_until)(str(gate), str(trace), 6)
        quarantine(cluster, future)
        wait_until(lambda: lying(cluster) == (1, 0), 20)
        (row,) = listed(run)
        assert (row["queue"], row["pool"], row["calls"]) == ("dead", "default", [future.id])
        assert row["label"] == "deadly_until"
        assert row["reason"].startswith("Quarantined: the call was running alone")
        assert row["replayable"]
        assert abs(time.time() - datetime.fromisoformat(row["since"]).timestamp()) < 120
        shown = answer(run("show", row["id"], "--json"))
        assert (shown["strikes"], shown["suspicion"], shown["client"]) == (3, "alone", client.id)
        assert shown["arguments"][0]["payload_bytes"] > 0

        gate.touch()
        (sent,) = answer(run("replay", row["id"], "--timeout", "50", "--json"))
        assert (sent["outcome"], sent["calls"]) == ("replayed", [future.id])
        assert sent["to"] == calls_queue(cluster.key_id, "default", "c1").name
        assert lying(cluster) == (0, 0)
        wait_until(trace.exists, 30)
        wait_until(lambda: outcomes_written(cluster) == 2, 30)
        assert state_of(cluster, future.id) == "quarantined"  # the first outcome counts


def test_the_result_of_a_replayed_call_goes_to_the_ledger_when_its_client_is_gone(
    cluster: LabCluster, run: Run
) -> None:
    put_quarantined(cluster, 7)
    (row,) = listed(run)
    answer(run("replay", row["id"], "--json"))
    cluster.worker("--slots", "1")
    wait_until(lambda: cluster.depth(lambda key, _: ledger_queue(key)), 30)
    (body,) = taken(cluster, ledger_queue(cluster.key_id), 1)
    frame = decode(body, Keyring.parse(cluster.key))
    assert isinstance(frame, ResultFrame)
    assert [(r.counter, r.status) for r in frame.results] == [(7, Status.OK)]


def test_replay_sends_calls_of_another_class_where_workers_find_them(
    cluster: LabCluster, run: Run
) -> None:
    worker = cluster.worker("--slots", "1", "--mem", "4g")
    put_quarantined(cluster, 1)
    (sent,) = answer(run("replay", "--all", "--mem", "2g", "--json"))
    assert sent["to"] == calls_queue(cluster.key_id, "default", "c1-m2").name
    wait_until(lambda: worker.health.get("count_calls"), 30, worker.output)


# --- messages that nobody, or somebody else, can read ------------------------------------------


def test_what_cannot_be_read_here_is_listed_and_refused_and_stays(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1")
    queue = calls_queue(cluster.key_id, "default", "c1").name
    honest = frame_of(cluster, 1)
    flipped = honest[:-1] + bytes([honest[-1] ^ 1])
    elsewhere = frame_of(cluster, 2, queue=f"{queue}x")
    publish(cluster.broker_url, queue, [b"noise", flipped, elsewhere])
    wait_until(lambda: lying(cluster) == (3, 0), 20)
    rows = listed(run)
    assert [row["kind"] for row in rows] == ["unreadable", "unreadable", "calls"]
    assert [row["reason"].partition(":")[0] for row in rows] == [
        "MalformedMessage", "SignatureError", "SignatureError",
    ]  # fmt: skip
    assert not any(row["replayable"] for row in rows)
    outcome = answer(run("replay", "--all", "--json"), 1)
    assert [row["outcome"] for row in outcome] == ["refused"] * 3
    said = run("replay", rows[1]["id"])
    assert said.returncode == 1
    assert "it cannot be read under the keys here (SignatureError" in said.stderr
    assert lying(cluster) == (3, 0)


def test_a_parked_call_is_replayed_once_its_key_is_known(cluster: LabCluster, run: Run) -> None:
    worker = cluster.worker("--slots", "1")
    other = generate_key()
    body = frame_of(cluster, 3, key=other)
    publish(cluster.broker_url, calls_queue(cluster.key_id, "default", "c1").name, [body])
    wait_until(lambda: lying(cluster) == (0, 1), 20)
    worker.kill()
    (row,) = listed(run)
    assert (row["queue"], row["kind"]) == ("parked", "unreadable")
    assert "UnknownKey" in answer(run("replay", "--all", "--json"), 1)[0]["problem"]

    both = f"{cluster.key},{other}"
    (row,) = listed(run, FLAME_KEY=both)
    assert (row["holds"], row["replayable"]) == ("1 call of abs", True)
    answer(run("replay", row["id"], "--json", FLAME_KEY=both))
    assert lying(cluster) == (0, 0)
    worker = cluster.worker("--slots", "1", FLAME_KEY=both)
    wait_until(lambda: worker.health.get("count_calls") == 1, 30, worker.output)


# --- looking changes nothing -------------------------------------------------------------------


def test_looking_leaves_every_message_in_its_place(cluster: LabCluster, run: Run) -> None:
    spec = dead_queue(cluster.key_id, "default")
    bodies = [frame_of(cluster, number, queue=spec.name) for number in range(300)]
    put(cluster, spec, bodies)
    first = run("list", "--limit", "20", "--pool", "default")
    assert len(first.stdout.splitlines()) == 21
    assert "280 more lie there: --limit 300 shows all" in first.stderr
    ids = [row["id"] for row in answer(run("list", "--limit", "300", "--json"))]
    assert len(ids) == 300
    assert answer(run("show", ids[200][:9], "--json"))["calls"] == ["gone-200"]
    assert taken(cluster, spec, 300) == bodies


def test_a_command_that_is_killed_with_everything_in_hand_loses_nothing(
    cluster: LabCluster, run: Run
) -> None:
    spec = dead_queue(cluster.key_id, "default")
    bodies = [frame_of(cluster, number, queue=spec.name) for number in range(100)]
    put(cluster, spec, bodies)
    words = [sys.executable, "-c", HOLDER, cluster.broker_url, cluster.key_id, "100"]
    with Process(words, env=cluster.environ) as holder:
        wait_until(lambda: "in hand" in holder.output(), 30, holder.output)
        assert lying(cluster) == (0, 0)
        holder.kill()
    wait_until(lambda: lying(cluster) == (100, 0), 20)
    assert taken(cluster, spec, 100) == bodies


async def all_of(pile: Pile) -> None:
    while await pile.next() is not None:
        pass


async def test_when_the_connection_is_lost_nothing_in_hand_counts_any_more(
    cluster: LabCluster, rabbit: RabbitNode
) -> None:
    spec = dead_queue(cluster.key_id, "default")
    bodies = [frame_of(cluster, number, queue=spec.name) for number in range(3)]
    await _put(cluster.broker_url, spec, bodies)
    async with Hands(cluster.broker_url) as hands:
        pile = await hands.reach(Shelf(cluster.key_id, "default", Fate.DEAD), 2)
        held = await pile.next()
        assert held is not None
        drop = partial(drop_connection, rabbit, "consumer", of="flame-dead in hand")
        assert await asyncio.to_thread(drop, url=cluster.broker_url) == 1
        with pytest.raises(BrokerUnavailable, match="the connection to the broker was lost"):
            await all_of(pile)
        with pytest.raises(BrokerUnavailable, match="still set aside"):
            pile.take_off(held)


# --- dropping ----------------------------------------------------------------------------------


def test_drop_deletes_what_was_named_and_nothing_else(cluster: LabCluster, run: Run) -> None:
    put_quarantined(cluster, *range(5))
    ids = {row["calls"][0]: row["id"] for row in listed(run)}
    gone = run("drop", ids["gone-1"], ids["gone-3"][:6], "beef00", "--yes")
    assert gone.returncode == 1
    assert [line.split()[1] for line in gone.stdout.splitlines()[1:]] == ["dropped", "dropped"]
    assert "no message that is set aside has the id beef00" in gone.stderr
    assert [row["calls"] for row in listed(run)] == [["gone-0"], ["gone-2"], ["gone-4"]]
    assert len(answer(run("drop", "--all", "--yes", "--json"))) == 3
    assert lying(cluster) == (0, 0)
    empty = run("drop", "--all", "--yes")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "nothing is set aside in pool default" in empty.stderr


@pytest.mark.parametrize(("typed", "code", "left"), [("n", 1, 2), ("y", 0, 0)])
def test_drop_asks_on_a_terminal(cluster: LabCluster, typed: str, code: int, left: int) -> None:
    put_quarantined(cluster, 1, 2)
    main, terminal = pty.openpty()
    words = [FLAME, "dead", "drop", "--all", "--pool", "default"]
    asked = subprocess.Popen(words, env=cluster.environ, stdin=terminal, stderr=subprocess.PIPE)
    os.write(main, f"{typed}\n".encode())
    said = asked.communicate(timeout=60)[1].decode()
    os.close(main)
    os.close(terminal)
    assert "Delete 2 messages for good?" in said
    assert asked.returncode == code, said
    assert lying(cluster) == (left, 0)


def test_drop_without_a_terminal_wants_a_yes(cluster: LabCluster) -> None:
    put_quarantined(cluster, 1)
    words = [FLAME, "dead", "drop", "--all"]
    done = subprocess.run(
        words, env=cluster.environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == 2
    assert b"--yes" in done.stderr
    assert lying(cluster) == (1, 0)


# --- where there is nothing to see -------------------------------------------------------------


def test_an_unknown_message_or_pool_says_where_else_to_look(cluster: LabCluster, run: Run) -> None:
    done = run("show", "0123456789")
    assert done.returncode == 1
    assert "`flame dead list` shows those in pool default, --pool looks elsewhere" in done.stderr
    assert run("list", "--pool", "no.such").returncode == 2
    assert run("list", FLAME_BROKER_URL="amqp://127.0.0.1:1/").returncode == 69


def test_messages_on_redis_are_looked_at_and_sent_again(redis_url: str, tmp_path: Path) -> None:
    cluster = LabCluster(redis_url, tmp_path)
    run = partial(dead, cluster)
    put_quarantined(cluster, 1, 2, 3)
    rows = listed(run)
    assert [row["calls"] for row in rows] == [["gone-1"], ["gone-2"], ["gone-3"]]
    answer(run("replay", rows[1]["id"], "--pool", "default", "--json"))
    assert lying(cluster) == (2, 0)
    assert cluster.depth(lambda key, pool: calls_queue(key, pool, "c1")) == 1


def test_a_broker_that_cannot_be_looked_at_without_harm_is_left_alone(
    sqs_url: str, tmp_path: Path
) -> None:
    done = dead(LabCluster(sqs_url, tmp_path), "list", "--pool", "default")
    assert done.returncode == 22
    assert "this broker (SQS) does not give messages back to where they were" in done.stderr
