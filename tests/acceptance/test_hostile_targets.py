"""Targets that do their worst to the process they run in: a clear error; the next call works."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

import flame
from flame.errors import CallTimeout, OutOfMemory, PackagingError, RemoteError, WorkerLost
from lab import RabbitNode
from lab.cluster import LabCluster, LabWorker
from lab.wait import wait_until

GIGABYTE = 2**30
DAEMON_BYTES = 200 * 2**20


class Bench:
    """One worker with one slot, and a client of it."""

    def __init__(self, worker: LabWorker, client: flame.Client) -> None:
        self.worker = worker
        self.quiet = flame.Runner("quiet", client=client, echo=False)
        self.loud = flame.Runner("loud", client=client)

    def call(self, target: Callable[..., Any], *args: object, **options: Any) -> Any:
        """Run it as a call and return what comes of it."""
        return self.quiet.service(target, **options)(*args).get(timeout=60)

    def check_unharmed(self) -> None:
        """The next call works, in the same worker."""
        assert self.call(abs, -5) == 5
        assert self.worker.running
        assert "Traceback" not in self.worker.output()


@pytest.fixture(scope="module")
def bench(rabbit: RabbitNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    url = rabbit.vhost()
    cluster = LabCluster(url, tmp_path_factory.mktemp("bench"))
    try:
        worker = cluster.worker("--slots", "1", "--cpu", "2", "--mem", "4g")
        with cluster.client() as client:
            yield Bench(worker, client)
    finally:
        cluster.close()
        rabbit.delete_vhost(url)


@pytest.fixture(autouse=True)
def _next_call_works(bench: Bench) -> Iterator[None]:
    yield
    bench.check_unharmed()


# ── it ends its process ──────────────────────────────────────────────────────


def leave() -> NoReturn:
    os._exit(3)


def crash() -> None:
    ctypes.string_at(0)


def kill_group() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


def close_everything() -> None:
    os.closerange(0, 4096)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (leave, "exited by itself with code 3"),
        (crash, "killed by SIGSEGV"),
        (kill_group, "killed by SIGKILL"),
        (close_everything, "closed the file descriptors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_that_ends_its_process_is_lost_with_the_reason(
    bench: Bench, target: Callable[[], None], said: str
) -> None:
    with pytest.raises(WorkerLost, match=said):
        bench.call(target)


def exit_politely() -> NoReturn:
    sys.exit(7)


def test_sys_exit_is_raised_where_the_result_is_read(bench: Bench) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.call(exit_politely)
    assert caught.value.code == 7


def fork_and_return() -> int:
    pid = os.fork()
    if pid == 0:
        return -1  # the copy goes on in our code, and must not answer in our name
    os.waitpid(pid, 0)
    return 1


def fork_and_stay() -> int:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    return 2


def test_a_forked_copy_does_not_answer_for_its_parent(bench: Bench) -> None:
    assert bench.call(fork_and_return) == 1
    assert bench.call(fork_and_stay) == 2


def close_stdout() -> str:
    sys.stdout.close()
    os.close(1)
    os.close(2)
    return "closed"


def print_and_return(text: str) -> str:
    print(text, flush=True)
    return text


def test_a_call_may_close_its_stdout(bench: Bench) -> None:
    assert bench.call(close_stdout) == "closed"
    assert bench.call(print_and_return, "here") == "here"


# ── it takes too much ────────────────────────────────────────────────────────


def print_much(nbytes: int) -> int:
    line = "x" * 1023 + "\n"
    for _ in range(nbytes // len(line)):
        sys.stdout.write(line)
    return nbytes


def test_a_gigabyte_of_output_costs_the_daemon_little_memory(bench: Bench) -> None:
    peak = PeakMemory(bench.worker.pid)
    assert bench.loud.service(print_much)(GIGABYTE).get(timeout=100) == GIGABYTE
    assert peak.stop() < DAEMON_BYTES


class PeakMemory:
    """Follows the resident memory of a process."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(0.05):
            text = self._status.read_text()
            self._peak = max(self._peak, int(text.partition("VmRSS:")[2].split()[0]) * 1024)

    def stop(self) -> int:
        """The most that was seen, in bytes."""
        self._over.set()
        self._thread.join()
        assert self._peak
        return self._peak


def take_memory(nbytes: int) -> int:
    return len(bytearray(b"x") * nbytes)


def take_memory_in_steps() -> int:
    held = []
    while True:
        held.append(bytearray(b"x") * (32 * 2**20))


def test_a_call_over_its_memory_limit_is_out_of_memory(bench: Bench) -> None:
    with pytest.raises(OutOfMemory):
        bench.call(take_memory, 2 * GIGABYTE, resreq="mem=1g")
    with pytest.raises(OutOfMemory):
        bench.call(take_memory_in_steps, resreq="mem=1g")
    assert bench.call(take_memory, 2**20, resreq="mem=1g") == 2**20


def take_memory_in_crumbs() -> int:
    """Leave not even enough for the traceback."""
    held: list[object] = []
    while True:
        held.append([None] * 16)


def child_pid() -> int:
    return os.getpid()


@contextmanager
def machine_of(nbytes: int, pid: int) -> Iterator[None]:
    """Let one process reach the end of memory: a test must not take what its neighbours need."""
    _, hard = before = resource.prlimit(pid, resource.RLIMIT_DATA)
    resource.prlimit(pid, resource.RLIMIT_DATA, (nbytes, hard))
    yield
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("target", [take_memory_in_steps, take_memory_in_crumbs])
def test_a_call_of_the_default_class_that_takes_all_memory_fails_alone(
    bench: Bench, target: Callable[[], int]
) -> None:
    with machine_of(GIGABYTE // 2, bench.call(child_pid)):
        with pytest.raises((MemoryError, OutOfMemory, WorkerLost)):
            bench.call(target)
        assert bench.call(take_memory, 2**20) == 2**20


def recurse(depth: int) -> int:
    return 1 + recurse(depth + 1)


def test_recursion_without_end_is_an_error_of_the_call(bench: Bench) -> None:
    with pytest.raises(RecursionError):
        bench.call(recurse, 0)


def test_a_stack_that_overflows_is_a_lost_call(bench: Bench) -> None:
    with pytest.raises((WorkerLost, RecursionError, OutOfMemory)):
        bench.call(overflow_stack)


def overflow_stack() -> None:
    sys.setrecursionlimit(10**9)
    value: list[object] = []
    for _ in range(10**6):
        value = [value]
    repr(value)


# ── it does not stop ─────────────────────────────────────────────────────────


def ignore_everything() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001  # it is meant to be rude
            continue


def spin_in_c() -> None:
    libc = ctypes.PyDLL(None)  # keeps the interpreter's lock: no exception gets in
    libc.sleep(60)


@pytest.mark.parametrize("target", [ignore_everything, spin_in_c])
def test_a_call_that_cannot_be_stopped_is_killed_after_its_timeout(
    bench: Bench, target: Callable[[], None]
) -> None:
    began = time.monotonic()
    with pytest.raises(CallTimeout):
        bench.call(target, timeout=1.0)
    assert time.monotonic() - began < 20


# ── its values do not travel ─────────────────────────────────────────────────


def give_a_lock() -> object:
    return threading.Lock()


class BreaksWhenPickled:
    def __reduce__(self) -> NoReturn:
        raise ZeroDivisionError("not today")


def give_a_trap() -> object:
    return BreaksWhenPickled()


@pytest.mark.parametrize("target", [give_a_lock, give_a_trap])
def test_a_result_that_cannot_be_pickled_says_what_it_was(
    bench: Bench, target: Callable[[], object]
) -> None:
    says = rf"(?i)^{target.__name__}: the result cannot be sent: .*(lock|BreaksWhenPickled)"
    with pytest.raises(PackagingError, match=says) as caught:
        bench.call(target)
    assert caught.value.__cause__ is None  # no traceback of ours


class Unpicklable(Exception):
    """Needs more to be made than it passes on."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.lock = threading.Lock()


def raise_unpicklable() -> None:
    raise Unpicklable("no", "way")


class Poisonous(Exception):
    def __str__(self) -> str:
        raise ValueError("I will not be read")


def raise_poison() -> None:
    raise Poisonous


@pytest.mark.parametrize(
    ("target", "name"), [(raise_unpicklable, "Unpicklable"), (raise_poison, "Poisonous")]
)
def test_an_exception_that_cannot_be_rebuilt_is_described(
    bench: Bench, target: Callable[[], None], name: str
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # itself, or its description
        bench.call(target)
    remote = caught.value if isinstance(caught.value, RemoteError) else caught.value.__cause__
    assert isinstance(remote, RemoteError)
    assert remote.type_name.endswith(name)
    assert target.__name__ in remote.traceback


# ── it meddles with the process for good ─────────────────────────────────────


def meddle() -> None:
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    sys.stdout = sys.stderr = None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.modules.pop("msgpack", None)


def test_what_a_call_does_to_its_interpreter_does_not_end_the_service(bench: Bench) -> None:
    bench.call(meddle)
    wait_until(lambda: bench.call(abs, -1) == 1, 20)
