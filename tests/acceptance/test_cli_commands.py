"""``flame ping``, ``workers``, ``queues`` and ``doctor`` as a user runs them, on RabbitMQ."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pika
import pytest

import flame
from flame_broker.facts import unfold
from flame_broker.keys import Key, generate_key
from flame_broker.topology import control_exchange
from lab.cluster import LabCluster
from lab.ports import free_port
from lab.processes import Process
from lab.rabbit import RabbitNode
from lab.wait import wait_until

FLAME = Path(sys.executable).with_name("flame")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(cluster: LabCluster) -> Run:
    """Runs ``flame`` with the cluster's settings, or with others."""

    def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [FLAME, *words],
            env={**cluster.environ, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def answer(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """What a command printed as JSON."""
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def verdicts(done: subprocess.CompletedProcess[str], code: int) -> dict[str, str]:
    return {finding["check"]: finding["verdict"] for finding in answer(done, code)}


def finding(done: subprocess.CompletedProcess[str], check: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return next(one for one in found if one["check"] == check)


def nap(seconds: float) -> None:
    time.sleep(seconds)  # the call's work


# --- ping --------------------------------------------------------------------------------------


def test_ping_measures_the_way_to_the_broker_and_through_a_worker(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1")
    measured = answer(run("ping", "-n", "20", "--json"))
    assert measured["broker"]["server"].startswith("RabbitMQ 3.")
    for hop in ("broker", "worker"):
        figures = measured[hop]
        assert figures["trips"] == 20
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"] < 10_000
    assert measured["worker"]["p50_ms"] > measured["broker"]["p50_ms"]


def test_ping_shows_a_table(cluster: LabCluster, run: Run) -> None:
    cluster.worker("--slots", "1", "--pool", "gpu")
    lines = run("ping", "-n", "3", "--pool", "gpu").stdout.splitlines()
    assert lines[0].split()[:4] == ["TO", "TRIPS", "FIRST", "MS"]
    assert lines[1].startswith("broker (RabbitMQ")
    assert lines[2].startswith("worker (pool gpu)")


def test_ping_without_a_worker_says_so_at_once_and_leaves_nothing_behind(
    cluster: LabCluster, run: Run
) -> None:
    done = run("ping")
    assert done.returncode == 1
    assert "no worker in pool default: start one with flame-worker" in done.stderr
    assert cluster.key_id in done.stderr
    assert [q for q in answer(run("queues", "--json")) if q["kind"] == "calls"] == []


def test_ping_of_an_empty_pool_names_the_pools_that_have_workers(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1")
    done = run("ping", "--pool", "gpu")
    assert done.returncode == 1
    assert "no worker in pool gpu (there are some in default)" in done.stderr
    assert "flame-worker --pool gpu" in done.stderr


def test_ping_with_another_key_finds_no_worker_and_shows_the_key(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1")
    other = generate_key()
    done = run("ping", FLAME_KEY=other)
    assert done.returncode == 1
    assert f"the key of id {Key.parse(other).hex_id}" in done.stderr


def test_ping_of_busy_slots_ends_after_its_timeout(cluster: LabCluster, run: Run) -> None:
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        busy = runner.service(nap)(60)
        wait_until(lambda: worker.health.get("busy"), 20, "the slot to be busy")
        done = run("ping", "--timeout", "0.5")
        busy.cancel()
    assert done.returncode == 1
    assert "no slot of pool default took the call within 0.5 s" in done.stderr


def test_without_a_broker_every_command_ends_with_69(run: Run) -> None:
    port = free_port()
    url = f"amqp://user:hidden@127.0.0.1:{port}/"
    with ThreadPoolExecutor() as pool:
        ends = pool.map(lambda word: run(word, FLAME_BROKER_URL=url), ["ping", "workers", "queues"])
    for done in ends:
        assert done.returncode == 69
        assert f"127.0.0.1:{port}: connection refused" in done.stderr
        assert done.stderr.count(str(port)) == 1
        assert "FLAME_BROKER_URL" in done.stderr
        assert "hidden" not in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["ping", "workers", "queues"])
def test_a_setting_that_is_wrong_ends_with_22(command: str, run: Run) -> None:
    assert run(command, FLAME_BROKER_URL="ampq://host/").returncode == 22


def test_a_broker_with_an_alarm_is_told_from_one_that_is_absent(
    own_cluster: LabCluster, own_rabbit: RabbitNode
) -> None:
    own_rabbit.set_alarm()
    done = subprocess.run(
        [FLAME, "doctor", "--json"],
        env=own_cluster.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = verdicts(done, 69)
    assert (found["broker"], found["access"]) == ("ok", "fail")
    assert "alarm" in finding(done, "access")["text"]


def test_ctrl_c_ends_a_connection_attempt_with_130_and_no_noise(cluster: LabCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}/"
        with Process([FLAME, "ping"], env={**cluster.environ, "FLAME_BROKER_URL": url}) as ping:
            silent.accept()
            ping.signal(signal.SIGINT)
            assert ping.wait(20) == 130
            assert ping.output() == ""


def test_ctrl_c_ends_a_wait_for_answers_with_130_and_no_noise(cluster: LabCluster) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(cluster.broker_url))
    channel, exchange = connection.channel(), control_exchange(cluster.key_id)
    channel.exchange_declare(exchange, "fanout", durable=True)
    channel.queue_declare("ear", exclusive=True)
    channel.queue_bind("ear", exchange)
    with Process([FLAME, "workers", "--timeout", "60"], env=cluster.environ) as asking:
        wait_until(lambda: channel.basic_get("ear", auto_ack=True)[0], 20, "the question")
        asking.signal(signal.SIGINT)
        assert asking.wait(20) == 130
        assert asking.output() == ""
    connection.close()


# --- workers -----------------------------------------------------------------------------------


def test_workers_lists_those_of_all_pools_with_what_they_do(cluster: LabCluster, run: Run) -> None:
    cluster.worker("--slots", "2", "--label", "rack=b12")
    cluster.worker("--slots", "1", "--pool", "gpu")
    rows = answer(run("workers", "--json"))
    assert sorted((row["pool"], row["slots"]) for row in rows) == [("default", 2), ("gpu", 1)]
    for row in rows:
        assert (row["busy"], row["connected"], row["draining"]) == (0, True, False)
        assert row["python"].startswith("3.")
        assert row["started"].endswith("Z")
        assert abs(row["clock_skew_s"]) < 1
    header, *lines = run("workers").stdout.splitlines()
    assert header.split()[:6] == ["WORKER", "POOL", "HOST", "SLOTS", "BUSY", "GPUS"]
    assert len(lines) == 2


def test_workers_without_any_says_how_to_start_one(cluster: LabCluster, run: Run) -> None:
    done = run("workers", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (0, "")
    assert "start one with flame-worker" in done.stderr
    assert cluster.key_id in done.stderr
    assert answer(run("workers", "--json", "--timeout", "0.2")) == []


def test_show_tells_all_about_one_worker(cluster: LabCluster, run: Run) -> None:
    name = cluster.worker("--slots", "1", "--label", "rack=b12").health["worker"]
    shown = answer(run("workers", "show", name, "--json"))
    assert (shown["worker"], shown["labels"]) == (name, "rack=b12")
    assert "rack=b12" in run("workers", "show", name).stdout


def test_show_of_an_unknown_worker_suggests_a_near_one(cluster: LabCluster, run: Run) -> None:
    name = cluster.worker("--slots", "1").health["worker"]
    done = run("workers", "show", name[:-1])
    assert done.returncode == 1
    assert f"did you mean {name}?" in done.stderr


def test_drain_sends_one_worker_home_and_the_other_stays(cluster: LabCluster, run: Run) -> None:
    leaves, stays = cluster.worker("--slots", "1"), cluster.worker("--slots", "1")
    name = leaves.health["worker"]
    done = run("workers", "drain", name, "--wait")
    assert (done.returncode, done.stdout) == (0, f"{name} has left\n")
    assert leaves.wait(20) == 0
    assert stays.running
    assert [row["worker"] for row in answer(run("workers", "--json"))] == [stays.health["worker"]]


def test_a_drained_worker_finishes_the_call_that_it_runs(cluster: LabCluster, run: Run) -> None:
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(nap)(3)
        wait_until(lambda: worker.health.get("busy"), 20, "the call to start")
        assert run("workers", "drain", worker.health["worker"]).returncode == 0
        assert future.get(timeout=20) is None
    assert worker.wait(20) == 0


def test_a_worker_that_was_killed_is_listed_with_what_it_ran_and_one_that_left_is_not(
    cluster: LabCluster, run: Run
) -> None:
    cluster.orchestrator()
    gone, left = cluster.worker("--slots", "1"), cluster.worker("--slots", "1", "--pool", "gpu")
    names = [worker.health["worker"] for worker in (gone, left)]
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(nap)(60)
        wait_until(
            lambda: _remembered(client, names[0]).get("running"), 30, "the call to be heard of"
        )
        wait_until(lambda: _remembered(client, names[1]), 20, "a heartbeat of the other worker")
        (row,) = [r for r in answer(run("workers", "--json")) if r["pool"] == "default"]
        assert [call["id"] for call in row["running"]] == [future.id]
        assert row["silent_since"] is None
        gone.kill()
        left.terminate()
        wait_until(lambda: not _remembered(client, names[1]), 20, "it to be forgotten")
        (silent,) = answer(run("workers", "--json"))
        future.cancel()
    assert (silent["worker"], silent["busy"]) == (row["worker"], 1)
    assert [call["label"] for call in silent["running"]] == ["nap"]
    assert silent["silent_since"] == silent["last_heartbeat"]
    assert future.id in run("workers", "show", row["worker"]).stdout
    refused = run("workers", "drain", row["worker"])
    assert refused.returncode == 1
    assert f"{row['worker']} does not answer" in refused.stderr


def _remembered(client: flame.Client, worker: str) -> dict[str, Any]:
    """What the orchestrator has heard of a worker."""
    rows: Any = client._ask(lambda inquiry: inquiry.ask("workers", worker=worker))["workers"]
    return {k: v for _, _, folded in rows for k, v in unfold(folded).items()}


# --- queues ------------------------------------------------------------------------------------


def test_queues_counts_what_waits_by_class_and_priority(cluster: LabCluster, run: Run) -> None:
    cluster.worker("--slots", "1").kill()  # its queues stay
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        low = runner.service(abs, priority="low")
        large = runner.service(abs, resreq="cpu=2,mem=4g")
        futures = [low(1), large(1)]
        wait_until(lambda: _waiting(client) == {("c1", "low"), ("c2-m4", "normal")}, 20)
        rows = answer(run("queues", "--json"))
        for future in futures:
            future.cancel()
    waiting = {(q["resources"], q["priority"]): q["messages"] for q in rows if q["messages"]}
    assert waiting == {("c1", "low"): 1, ("c2-m4", "normal"): 1}
    kinds = {q["kind"] for q in rows}
    assert kinds == {"calls", "suspects", "dead", "parked", "replies"}
    assert all(q["name"].startswith(f"flame.v1.{cluster.key_id}.") for q in rows)


def _waiting(client: flame.Client) -> set[tuple[str, str]]:
    return {(q.resources, q.priority) for q in client.queues() if q.messages}


def test_queues_shows_the_pools_that_have_workers_or_those_asked_for(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1", "--pool", "gpu")
    assert {q["pool"] for q in answer(run("queues", "--json"))} == {"gpu", ""}
    header, *lines = run("queues", "--pool", "gpu").stdout.splitlines()
    assert header.split() == ["POOL", "KIND", "CLASS", "PRIORITY", "MESSAGES", "QUEUE"]
    assert any(line.split()[:4] == ["gpu", "calls", "c1", "high"] for line in lines)


# --- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_a_whole_cluster_well(cluster: LabCluster, run: Run) -> None:
    cluster.worker("--slots", "1")
    done = run("doctor", "--json")
    checks = ["home", "key", "broker", "store", "access", "workers", "versions", "clocks", "queues"]
    assert verdicts(done, 0) == dict.fromkeys(checks, "ok")
    assert "RabbitMQ 3." in finding(done, "broker")["text"]
    assert cluster.key_id in finding(done, "key")["text"]
    lines = run("doctor").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", check] for check in checks]
    assert cluster.key not in done.stdout
    assert "guest:guest" not in done.stdout


def test_doctor_finds_a_worker_with_another_store_and_leaves_nothing_in_ours(
    cluster: LabCluster, run: Run, tmp_path: Path
) -> None:
    cluster.worker("--slots", "1", FLAME_STORE_URL=(tmp_path / "elsewhere").as_uri())
    done = run("doctor", "--json")
    workers = next(one for one in answer(done, 1) if one["check"] == "workers")
    assert workers["verdict"] == "fail"
    assert "a function sent by value fails on a worker" in workers["text"]
    assert "FLAME_STORE_URL" in workers["remedy"]
    assert list((cluster.folder / "store" / "targets").glob("*")) == []


def test_doctor_without_a_broker_ends_with_69_and_still_looks_at_the_rest(run: Run) -> None:
    done = run("doctor", "--json", FLAME_BROKER_URL=f"amqp://127.0.0.1:{free_port()}/")
    assert verdicts(done, 69) == {"home": "ok", "key": "ok", "broker": "fail", "store": "ok"}
    assert "connection refused" in finding(done, "broker")["text"]
    assert "FLAME_BROKER_URL" in finding(done, "broker")["remedy"]


def test_doctor_with_a_wrong_password_says_which_setting_to_correct(
    cluster: LabCluster, run: Run
) -> None:
    wrong = cluster.broker_url.replace("guest:guest", "guest:nonsense")
    done = run("doctor", "--json", FLAME_BROKER_URL=wrong)
    assert verdicts(done, 69)["broker"] == "fail"
    assert "user or password refused" in finding(done, "broker")["text"]
    assert "nonsense" not in done.stdout


def test_doctor_without_rights_in_the_vhost_says_which_are_missing(
    cluster: LabCluster, rabbit: RabbitNode, run: Run
) -> None:
    parts = urlsplit(cluster.broker_url)
    vhost = parts.path[1:].replace("%2F", "/")
    rabbit.ctl("add_user", "weak", "password")
    rabbit.ctl("set_permissions", "-p", vhost, "weak", "^$", "^$", "^$")
    try:
        url = f"amqp://weak:password@127.0.0.1:{rabbit.port}/{quote(vhost, safe='')}"
        done = run("doctor", "--json", FLAME_BROKER_URL=url)
    finally:
        rabbit.ctl("delete_user", "weak")
    found = verdicts(done, 22)
    assert (found["broker"], found["access"]) == ("ok", "fail")
    assert "permissions forbid" in finding(done, "access")["text"]
    assert "configure, write and read" in finding(done, "access")["remedy"]


def test_doctor_without_a_worker_fails_and_says_how_to_start_one(
    cluster: LabCluster, run: Run
) -> None:
    done = run("doctor", "--json")
    found = verdicts(done, 1)
    assert found.pop("workers") == "fail"
    assert set(found.values()) == {"ok"}
    assert "flame-worker" in finding(done, "workers")["remedy"]
    assert cluster.key_id in finding(done, "workers")["remedy"]


def test_doctor_with_another_key_than_the_workers_says_that_they_do_not_hear_it(
    cluster: LabCluster, run: Run
) -> None:
    cluster.worker("--slots", "1")
    other = generate_key()
    done = run("doctor", "--json", FLAME_KEY=other)
    assert verdicts(done, 1)["workers"] == "fail"
    remedy = finding(done, "workers")["remedy"]
    assert Key.parse(other).hex_id in remedy
    assert "another key" in remedy


def test_doctor_without_a_key_for_a_remote_broker_says_how_to_give_one(run: Run) -> None:
    done = run("doctor", "--json", FLAME_BROKER_URL="amqp://broker.invalid/", FLAME_KEY="")
    assert verdicts(done, 69)["key"] == "fail"
    assert "FLAME_KEY" in finding(done, "key")["text"]


def test_doctor_with_a_key_file_that_others_may_read_says_chmod(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "factory.key"
    file.write_text(generate_key())
    file.chmod(0o644)
    done = run("doctor", "--json", FLAME_KEY="", FLAME_KEY_FILE=str(file))
    assert verdicts(done, 22)["key"] == "fail"
    assert f"chmod 600 {file}" in finding(done, "key")["text"]


def test_doctor_with_a_store_that_is_no_folder_ends_with_69(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("doctor", "--json", FLAME_STORE_URL=(tmp_path / "file").as_uri())
    assert verdicts(done, 69)["store"] == "fail"
    assert "FLAME_STORE_URL" in finding(done, "store")["remedy"]


def test_doctor_with_a_home_that_is_a_file_fails(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home-file"
    home.write_text("in the way")
    done = run("doctor", "--json", FLAME_HOME=str(home))
    assert verdicts(done, 22)["home"] == "fail"
    assert "FLAME_HOME" in finding(done, "home")["remedy"]


def test_doctor_with_settings_that_are_wrong_says_where(run: Run) -> None:
    done = run("doctor", "--json", FLAME_BROKER_URL="ampq://host/")
    assert verdicts(done, 22) == {"settings": "fail"}
    assert "FLAME_BROKER_URL" in finding(done, "settings")["text"]


def test_doctor_tells_of_messages_that_were_set_aside(cluster: LabCluster, run: Run) -> None:
    cluster.worker("--slots", "1")
    # A frame that no key of ours signed goes where a person can look at it.
    queue = f"flame.v1.{cluster.key_id}.default.c1.normal"
    _publish(cluster.broker_url, queue, b"this is no frame")
    wait_until(lambda: verdicts(run("doctor", "--json"), 0)["queues"] == "warn", 30)
    assert "1 messages are dead" in finding(run("doctor", "--json"), "queues")["text"]


def _publish(url: str, queue: str, body: bytes) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    connection.channel().basic_publish("", queue, body)
    connection.close()
