"""The lab's own parts that need no service: processes, proxy, waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lab import MissingService, Process, TcpProxy, eventually, free_port, wait_until
from lab.debian import newer_rabbit
from lab.ports import answers


@pytest.fixture
def echo_port() -> Iterator[int]:
    """Port of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionResetError):
            while data := client.recv(1024):
                client.sendall(data)

    def listen() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def connect(port: int, timeout_s: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout_s)


def assert_reset(port: int) -> None:
    # The reset may come while connecting already.
    with pytest.raises(ConnectionResetError), connect(port) as client:
        client.recv(16)


def test_a_process_reports_its_output_and_exit_status() -> None:
    with Process([sys.executable, "-c", "print('hello'); raise SystemExit(3)"]) as process:
        assert process.wait() == 3
        assert process.output() == "hello\n"


def test_killing_a_process_ends_its_whole_group() -> None:
    with Process(["/bin/sh", "-c", "sleep 60 & echo $!; wait"]) as process:
        wait_until(lambda: process.output().strip(), describe="the child's pid")
        grandchild = psutil.Process(int(process.output()))
        assert process.kill() == -signal.SIGKILL
        wait_until(lambda: not _lives(grandchild), describe="the grandchild is gone")


def test_a_process_dies_with_the_program_that_started_it(tmp_path: Path) -> None:
    code = (
        "import pathlib, time\nfrom lab import Process\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "print(Process(['sleep', '60'], log=log).pid, flush=True)\ntime.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert starter.stdout is not None
    orphan = psutil.Process(int(starter.stdout.readline()))
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_until(lambda: not _lives(orphan), describe="the orphan is gone")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_proxy_carries_both_ways(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy, connect(proxy.port) as client:
        client.sendall(b"ping")
        assert client.recv(16) == b"ping"
        assert (proxy.connections, proxy.accepted) == (1, 1)


def test_cut_resets_connections_and_new_ones_work(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy:
        with connect(proxy.port) as client:
            client.sendall(b"ping")
            client.recv(16)
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                client.recv(16)
        with connect(proxy.port) as client:
            client.sendall(b"pong")
            assert client.recv(16) == b"pong"


def test_refuse_turns_new_connections_away_until_accept(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy:
        proxy.refuse()
        assert_reset(proxy.port)
        proxy.accept()
        with connect(proxy.port) as client:
            client.sendall(b"ping")
            assert client.recv(16) == b"ping"


def test_stall_holds_bytes_back_until_resume(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy, connect(proxy.port, timeout_s=0.2) as client:
        proxy.stall()
        client.sendall(b"ping")
        with pytest.raises(TimeoutError):
            client.recv(16)
        proxy.resume()
        client.settimeout(5)
        assert client.recv(16) == b"ping"


def test_the_proxy_notes_each_end_of_a_connection_once(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy:
        for leave in (proxy.cut, lambda: None):
            known = len(proxy.ended)
            with connect(proxy.port) as client:
                client.sendall(b"ping")
                client.recv(16)
                leave()
            wait_until(lambda: len(proxy.ended) > known)  # noqa: B023
        wait_until(lambda: proxy.connections == 0)
        assert len(proxy.ended) == 2


def test_a_proxy_before_a_dead_server_resets() -> None:
    with TcpProxy(free_port()) as proxy:
        assert_reset(proxy.port)


def test_a_free_port_has_no_listener() -> None:
    assert not answers(free_port())


def test_wait_until_returns_the_value_and_names_what_is_missing() -> None:
    values = iter([0, 0, 7])
    assert wait_until(lambda: next(values)) == 7
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: seven dwarfs"):
        wait_until(lambda: False, 0.05, "seven dwarfs")


async def test_eventually_takes_plain_and_async_conditions() -> None:
    values = iter([0, 5])

    async def condition() -> int:
        return next(values)

    assert await eventually(condition) == 5
    assert await eventually(lambda: "now") == "now"
    with pytest.raises(AssertionError, match="a miracle"):
        await eventually(lambda: None, 0.05, "a miracle")


class TestDebianFolder:
    def test_only_root_gets_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        with pytest.raises(MissingService, match=r"rabbitmq-server of Debian trixie .* takes root"):
            newer_rabbit().make()

    def test_without_debootstrap_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("os.geteuid", lambda: 0)
        monkeypatch.setattr(
            "lab.services.shutil.which",
            lambda name, path=None: None if name == "debootstrap" else f"/usr/bin/{name}",
        )
        with pytest.raises(MissingService, match="install debootstrap"):
            newer_rabbit().make()
