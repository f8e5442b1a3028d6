"""``flame run`` as a user runs it: embedded, and on RabbitMQ with a real worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import boto3
import pytest

from lab import S3Server, free_port
from lab.cluster import LabCluster
from lab.processes import Process
from lab.s3 import CREDENTIALS
from lab.wait import wait_until

FLAME = Path(sys.executable).with_name("flame")
EXAMPLES = Path(__file__).parents[2] / "examples"

JOBS = """
    import os
    import sys
    import time
    from concurrent.futures import as_completed

    import flame
    from flame.runnable import Runnable


    class Hello(Runnable):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def run(self, **kwargs):
            print(f"Hello, {self.name}", os.getpid())
            print("to stderr", file=sys.stderr)


    class Fails(Runnable):
        def run(self, **kwargs):
            inner()


    def inner():
        raise flame.errors.ConfigError("the work's own")


    class Sleeps(Runnable):
        def run(self, **kwargs):
            print("asleep in", os.getpid(), flush=True)
            time.sleep(600)


    class Exits(Runnable):
        def run(self, **kwargs):
            os._exit(3)


    class Tells(Runnable):
        def run(self, **kwargs):
            print("token", self.config["A"]["token"][::-1], kwargs)
            print("key", os.environ.get("FLAME_KEY", "")[:9])


    def twice(value):
        return 2 * value


    def inside(depth):
        with flame.Runner() as runner:
            deeper = runner.service(inside)(depth - 1) if depth else runner.service(twice)(21)
            return deeper.get()


    class FansOut(Runnable):
        def run(self, **kwargs):
            with flame.Runner() as runner:
                service = runner.service(twice)
                futures = [service(n) for n in range(20)]
                print("sum", sum(f.result() for f in as_completed(futures)))
                print("deep", runner.service(inside)(3).get())
"""

Start = Callable[..., Process]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    (made / "jobs.py").write_text(dedent(JOBS))
    return made


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts ``flame`` on a Runnable of ``jobs.py``, in its folder; embedded by default."""
    started: list[Process] = []

    def start(job: str, *options: str, environ: dict[str, str] | None = None) -> Process:
        (folder / "job.yaml").write_text(f"jobs: jobs.py\n---\n!jobs.{job}\n")
        settings = environ or {**os.environ, "FLAME_HOME": str(tmp_path / "home")}
        started.append(Process([FLAME, "job.yaml", *options], env=settings, cwd=folder))
        return started[-1]

    yield start
    for process in started:
        process.close()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# --- embedded ------------------------------------------------------------------------------------


def test_a_runnable_runs_in_a_process_of_a_worker_with_its_output_here(start: Start) -> None:
    done = start("Hello {name: World}")
    assert done.wait(30) == 0, done.output()
    lines = done.output().splitlines()
    assert lines[0].startswith("flame ")
    [greeting] = [line for line in lines if line.startswith("Hello, World ")]
    assert int(greeting.rpartition(" ")[2]) != done.pid
    assert "to stderr" in lines
    assert lines[-1].startswith("Done in ")


def test_debug_runs_in_the_process_itself(start: Start) -> None:
    done = start("Hello {name: World}", "--debug")
    assert done.wait(30) == 0, done.output()
    assert f"Hello, World {done.pid}" in done.output()


@pytest.mark.parametrize("debug", [False, True])
def test_a_runnable_that_raises_ends_with_1_and_its_own_traceback(
    start: Start, folder: Path, debug: bool
) -> None:
    done = start("Fails {}", *["--debug"] * debug)
    assert done.wait(30) == 1
    output = done.output()
    assert "ConfigError: the work's own" in output
    assert f'File "{folder}/jobs.py", line ' in output
    assert "    inner()" in output
    assert "flame/runnable" not in output
    assert "flame_cli" not in output
    assert "Done" not in output


def test_a_runnable_whose_process_dies_ends_with_1_and_says_so(start: Start) -> None:
    done = start("Exits {}")
    assert done.wait(30) == 1
    assert "exited by itself with code 3" in done.output()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("Hello {nmae: World}", "job.yaml:3:14: !jobs.Hello(name) takes no 'nmae'"),
        ("Helo {}", "job.yaml:3:1: unknown tag !jobs.Helo"),
        ("Hello {name: World", "job.yaml:4:1: not YAML"),
    ],
)
def test_a_wrong_configuration_ends_with_22_and_its_place(
    start: Start, job: str, message: str, debug: bool
) -> None:
    done = start(job, *["--debug"] * debug)
    assert done.wait(30) == 22
    assert message in done.output()
    assert "Traceback" not in done.output()


def test_an_absent_broker_ends_with_69(start: Start, tmp_path: Path) -> None:
    url = f"amqp://127.0.0.1:{free_port()}/"
    environ = {**os.environ, "FLAME_HOME": str(tmp_path), "FLAME_BROKER_URL": url}
    done = start("Hello {name: World}", environ=environ)
    assert done.wait(30) == 69
    assert "Traceback" not in done.output()


@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c_ends_with_130_and_leaves_nothing_running(start: Start, debug: bool) -> None:
    running = start("Sleeps {}", *["--debug"] * debug)
    wait_until(lambda: "asleep in" in running.output(), 30, running.output)
    worker = int(running.output().partition("asleep in ")[2].split()[0])
    running.signal(signal.SIGINT)
    assert running.wait(15) == 130, running.output()
    assert "Traceback" not in running.output()
    wait_until(lambda: gone(worker), 10)


@pytest.mark.parametrize("debug", [False, True])
def test_secrets_reach_the_runnable_and_nothing_else(
    start: Start, folder: Path, tmp_path: Path, debug: bool
) -> None:
    (folder / "secrets.ini").write_text("[A]\ntoken = hunter2\n")
    options = ["--debug"] if debug else []
    done = start("Tells {}", "-s", "secrets.ini", "--force", "--verbose", *options)
    assert done.wait(30) == 0, done.output()
    assert "token 2retnuh {'force': True, 'verbose': True" in done.output()
    assert "hunter2" not in done.output()
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept or debug
    assert not [path for path in kept if b"hunter2" in path.read_bytes()]


def test_a_named_secrets_file_that_is_missing_ends_with_22(start: Start) -> None:
    done = start("Tells {}", "-s", "none.ini")
    assert done.wait(30) == 22
    assert "none.ini" in done.output()


def test_a_runnable_may_make_calls_of_its_own(start: Start) -> None:
    done = start("FansOut {}")
    assert done.wait(60) == 0, done.output()
    assert "sum 380" in done.output()
    assert "deep 42" in done.output()


@pytest.mark.parametrize("option", ["--cluster=c.yaml", "--detach"])
def test_what_is_not_there_yet_is_a_usage_error(start: Start, option: str) -> None:
    done = start("Hello {name: World}", option)
    assert done.wait(30) == 2
    assert "not there yet" in done.output()


# --- on RabbitMQ ---------------------------------------------------------------------------------


def test_the_same_file_runs_on_a_cluster(start: Start, cluster: LabCluster) -> None:
    worker = cluster.worker("--slots", "1")
    done = start("Hello {name: World}", environ=cluster.environ)
    assert done.wait(30) == 0, done.output() + worker.output()
    pid = int(done.output().partition("Hello, World ")[2].split()[0])
    assert Path(f"/proc/{pid}/stat").read_text().split()[3] == str(worker.pid)
    failed = start("Fails {}", environ=cluster.environ)
    assert failed.wait(30) == 1
    assert "ConfigError: the work's own" in failed.output()


def test_secrets_open_on_a_worker_whose_children_have_no_key(
    start: Start, folder: Path, cluster: LabCluster
) -> None:
    cluster.worker("--slots", "1")
    (folder / "secrets.ini").write_text("[A]\ntoken = hunter2\n")
    done = start("Tells {}", "-s", "secrets.ini", environ=cluster.environ)
    assert done.wait(30) == 0, done.output()
    assert "token 2retnuh" in done.output()
    assert "key stand-in:" in done.output()
    assert cluster.key not in done.output()


def test_calls_that_wait_for_calls_do_not_stop_a_worker_of_one_slot(
    start: Start, cluster: LabCluster
) -> None:
    worker = cluster.worker("--slots", "1", "--cpu", "1")
    done = start("FansOut {}", environ=cluster.environ)
    assert done.wait(60) == 0, done.output() + worker.output()
    assert "sum 380" in done.output()
    assert "deep 42" in done.output()


def test_ctrl_c_stops_the_runnable_on_the_worker(start: Start, cluster: LabCluster) -> None:
    worker = cluster.worker("--slots", "1")
    running = start("Sleeps {}", environ=cluster.environ)
    wait_until(lambda: "asleep in" in running.output(), 30, running.output)
    running.signal(signal.SIGINT)
    assert running.wait(15) == 130, running.output()
    wait_until(lambda: not worker.health["busy"], 20, worker.output)


def test_waiting_for_a_worker_is_said_and_ended_by_ctrl_c(
    start: Start, cluster: LabCluster
) -> None:
    running = start("Hello {name: World}", environ=cluster.environ)
    wait_until(lambda: "start one with flame-worker" in running.output(), 30, running.output)
    cluster.worker("--slots", "1")
    assert running.wait(30) == 0, running.output()
    assert "Hello, World" in running.output()


# --- the examples --------------------------------------------------------------------------------


def test_the_main_job_sweeps_prints_a_table_and_draws_a_plot(tmp_path: Path) -> None:
    environ = {**os.environ, "FLAME_HOME": str(tmp_path / "home")}
    command = [FLAME, "run", EXAMPLES / "digits" / "digits.yaml"]
    started = time.monotonic()
    with Process(command, env=environ, cwd=tmp_path) as demo:
        assert demo.wait(110) == 0, demo.output()
        assert time.monotonic() - started < 60 or os.environ.get("CI")
        for model in ("support vectors", "nearest neighbours", "random forest"):
            assert model in demo.output()
        assert f"Plot: {tmp_path / 'digits.png'}" in demo.output()
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_s3_example_pushes_a_folder_with_a_secret(s3: S3Server, tmp_path: Path) -> None:
    bucket = "pushed"
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    client.create_bucket(Bucket=bucket)
    (tmp_path / "output" / "deep").mkdir(parents=True)
    (tmp_path / "output" / "a.txt").write_text("A")
    (tmp_path / "output" / "deep" / "b.txt").write_text("B")
    (tmp_path / "secrets.ini").write_text(
        "[AWS]\nAWS_ACCESS_KEY_ID = testing\nAWS_SECRET_ACCESS_KEY = testing\n"
    )
    job = tmp_path / "push.yaml"
    job.write_text(
        f"s3_pusher: {EXAMPLES / 's3pusher'}\n---\n!s3_pusher.S3Pusher\n"
        f"experiment_path: ./output\nbucket_name: {bucket}\nendpoint_url: {s3.endpoint}\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    environ |= {"FLAME_HOME": str(tmp_path / "home"), "AWS_EC2_METADATA_DISABLED": "true"}
    command = [FLAME, "run", job, "-s", "secrets.ini"]
    with Process(command, env=environ, cwd=tmp_path) as push:
        assert push.wait(60) == 0, push.output()
    found = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert [entry["Key"] for entry in found] == ["a.txt", "deep/b.txt"]


# --- installing extensions -----------------------------------------------------------------------

PROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "jobs"
    version = "1.5"
    {more}

    [tool.hatch.build.targets.wheel]
    include = ["jobs.py"]
"""


@pytest.fixture
def pip_environ(tmp_path: Path) -> dict[str, str]:
    """Has pip install into a folder of the test, without an index."""
    return {
        **os.environ,
        "FLAME_HOME": str(tmp_path / "home"),
        "PIP_TARGET": str(tmp_path / "installed"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of --build-isolation
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(tmp_path / "installed"),
    }


def test_an_extension_is_installed_on_demand_and_what_changed_is_printed(
    start: Start, folder: Path, pip_environ: dict[str, str]
) -> None:
    (folder / "pyproject.toml").write_text(dedent(PROJECT).format(more=""))
    done = start("Hello {name: World}", "--install-extensions", environ=pip_environ)
    assert done.wait(60) == 0, done.output()
    assert "installed jobs-1.5" in done.output()
    assert "Hello, World" in done.output()


def test_what_pip_says_is_shown_when_it_fails(
    start: Start, folder: Path, pip_environ: dict[str, str]
) -> None:
    needs = 'dependencies = ["no-such-package-anywhere"]'
    (folder / "pyproject.toml").write_text(dedent(PROJECT).format(more=needs))
    done = start("Hello {name: World}", "-i", environ=pip_environ)
    assert done.wait(60) == 22, done.output()
    assert "No matching distribution found for no-such-package-anywhere" in done.output()
