"""Programs that end without closing anything, or in the middle of a map: they leave quietly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from flame_broker.topology import calls_queue
from lab.cluster import LabCluster
from lab.wait import wait_until

_PROGRAM = """
import time
import flame

def work(number):
    time.sleep(0.2)
    return number

with flame.Runner() as runner:
    for number in runner.service(work).map(range(1000)):
        print(number, flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(_PROGRAM)
    return file


def _interrupted(program: Path, environ: Mapping[str, str]) -> str:
    """Run it, press Ctrl-C after the first results; what it wrote on standard error."""
    process = subprocess.Popen(
        [sys.executable, program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    return complaints


def test_ctrl_c_in_a_map_leaves_nothing_but_its_own_traceback(program: Path) -> None:
    complaints = _interrupted(program, os.environ)
    assert complaints.count("Traceback") == 1
    assert complaints.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_in_a_map_frees_the_cluster(program: Path, cluster: LabCluster) -> None:
    worker = cluster.worker("--slots", "2")
    complaints = _interrupted(program, cluster.environ)
    assert complaints.count("Traceback") == 1

    # The rest of the map would take more than a minute and a half.
    waiting = partial(calls_queue, resource_class="c1")
    wait_until(lambda: not (cluster.depth(waiting) or worker.health["held"]), 15, worker.output)
    assert worker.running


def test_a_program_on_redis_ends_without_a_word(redis_url: str, tmp_path: Path) -> None:
    cluster = LabCluster(redis_url, tmp_path)
    try:
        cluster.worker("--slots", "1")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import flame; print(flame.Executor().submit(abs, -3).result())",
            ],
            env=cluster.environ,
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        cluster.close()
    assert (done.stdout, done.stderr, done.returncode) == ("3\n", "", 0)


def test_a_call_of_a_services_last_line_is_left_to_the_cluster(
    cluster: LabCluster, tmp_path: Path
) -> None:
    # The function is new to the cluster: it must be stored before the call can leave.
    cluster.worker("--slots", "1")
    ran = tmp_path / "ran"
    program = (
        "import flame, pathlib\n"
        f"def touch(): pathlib.Path({str(ran)!r}).touch()\n"
        "flame.Runner().service(touch)()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    wait_until(ran.exists)
