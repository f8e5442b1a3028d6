"""Calls that run for long are in the orchestrator's custody, whoever is lost meanwhile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.errors import WorkerLost
from flame_broker.topology import calls_queue
from lab import RabbitNode
from lab.cluster import LabCluster
from lab.rabbit_client import drop_connection
from lab.wait import wait_until

LEASE = ("--lease", "5")

pytestmark = pytest.mark.timeout(120)


def hold(folder: str, name: str) -> str:
    """Say that it runs, and on until told to end; then say that it has ended."""
    call = flame.current_call()
    assert call is not None
    with Path(folder, f"{name}.starts").open("a") as file:
        file.write(f"{call.worker}\n")
    wait_until(Path(folder, "release").exists, 100)
    with Path(folder, f"{name}.ends").open("a") as file:
        file.write(f"{call.worker}\n")
    return name


def last(folder: str, name: str, seconds: float) -> str:
    """Run for so long."""
    with Path(folder, f"{name}.starts").open("a") as file:
        file.write("x\n")
    time.sleep(seconds)  # the call's work
    return name


class Marks:
    """What the calls have left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def starts(self, name: str) -> list[str]:
        return self._lines(f"{name}.starts")

    def ends(self, name: str) -> list[str]:
        return self._lines(f"{name}.ends")

    def release(self) -> None:
        (self.folder / "release").touch()

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    (tmp_path / "marks").mkdir()
    return Marks(tmp_path / "marks")


def story(client: flame.Client, future: flame.ObjectFuture[Any]) -> dict[str, Any]:
    return client.story(future.id) or {}


def is_leased(client: flame.Client, *futures: flame.ObjectFuture[Any]) -> bool:
    return all(story(client, future).get("state") == "running" for future in futures)


def test_leases_outlive_orchestrators_and_connections_but_not_their_workers(
    cluster: LabCluster, rabbit: RabbitNode, marks: Marks
) -> None:
    orchestrator = cluster.orchestrator(*LEASE)
    cluster.worker("--slots", "2")
    stopped = cluster.worker("--slots", "2", "--pool", "other")
    folder = str(marks.folder)
    with cluster.client() as client, flame.Runner("t", client=client) as runner:

        def held(name: str, **options: Any) -> flame.ObjectFuture[str]:
            return runner.service(hold, **options)(folder, name)

        kept = held("kept"), held("kept once", delivery="at_most_once")
        lost = held("lost", pool="other")
        lost_once = held("lost once", pool="other", delivery="at_most_once")
        wait_until(lambda: is_leased(client, *kept, lost, lost_once), 30)
        assert cluster.depth(lambda key, pool: calls_queue(key, pool, "c1")) == 0
        listed = cluster.command("ps", "--state", "running", "--json")
        running = {facts["id"] for facts in json.loads(listed.stdout)}
        assert running == {future.id for future in (*kept, lost, lost_once)}

        stopped.pause()
        orchestrator.kill()
        for purpose in ("consumer", "publisher"):
            drop_connection(rabbit, purpose, of='flame-worker [^"]+', url=cluster.broker_url)
        cluster.orchestrator(*LEASE)
        cluster.worker("--slots", "2", "--pool", "other")
        with pytest.raises(WorkerLost, match="was lost"):
            lost_once.get(timeout=60)
        wait_until(lambda: len(marks.starts("lost")) == 2, 30)
        # A whole lease has passed at the new orchestrator.
        assert is_leased(client, *kept)
        wait_until(lambda: is_leased(client, lost), 30)

        stopped.resume()
        wait_until(lambda: stopped.health["busy"] == 0, 30, stopped.output)
        marks.release()
        assert [future.get(timeout=30) for future in (*kept, lost)] == ["kept", "kept once", "lost"]
        assert story(client, lost_once)["state"] == "failed"
        wait_until(lambda: story(client, lost)["state"] == "succeeded", 15)
    assert [len(marks.starts(name)) for name in ("kept", "kept once", "lost once")] == [1, 1, 1]
    assert marks.ends("lost") == marks.starts("lost")[1:]
    assert marks.ends("lost once") == []


def run_beside(ack_s: int, call_s: int, folder: Path, marks: Marks) -> list[str]:
    """Run a call at a broker that wants its acks soon; where it has started."""
    with RabbitNode(config={"consumer_timeout": str(ack_s * 1000)}) as node:
        # It looks once a minute, unless it is told to.
        node.ctl("eval", "application:set_env(rabbit, channel_tick_interval, 1000).")
        cluster = LabCluster(node.url, folder)
        try:
            cluster.orchestrator()
            for _ in range(2):  # whoever has it already takes it for a copy
                cluster.worker("--slots", "1")
            with cluster.client() as client, flame.Runner("t", client=client) as runner:
                future = runner.service(last)(str(marks.folder), "long", call_s)
                assert future.get(timeout=call_s + 60) == "long"
        finally:
            cluster.close()
    return marks.starts("long")


@pytest.mark.parametrize(
    ("ack_s", "call_s"), [(8, 14), pytest.param(20, 90, marks=pytest.mark.soak)]
)
def test_a_call_runs_once_however_soon_the_broker_wants_its_acks(
    ack_s: int, call_s: int, tmp_path: Path, marks: Marks
) -> None:
    assert len(run_beside(ack_s, call_s, tmp_path, marks)) == 1
