"""A RabbitMQ node of one's own, to stop, kill and reconfigure."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pika
import pika.exceptions

from lab.debian import DebianFolder, newer_rabbit
from lab.ports import answers, free_port
from lab.processes import Process
from lab.services import program
from lab.wait import wait_until

__all__ = ["RabbitNode"]

_START_TIMEOUT_S = 90.0
_DISK_LIMIT = "50MB"
# Schedulers of an idle Erlang node spin for work; on two cores that starves the code under test.
_ERLANG_FLAGS = "+sbwt none +sbwtdcpu none +sbwtdio none"


class RabbitNode:
    """One broker on this machine: own name, ports, folders, cookie and epmd.

    Args:
        config: Extra lines for ``rabbitmq.conf``, such as ``{"consumer_timeout": "5000"}``.
        management: Run the management plugin. It makes virtual hosts in milliseconds; without it
            each costs a second or more, but the node is leaner (benchmarks).
        joins: A running node whose cluster this one becomes a part of when it first starts.

    With ``LAB_RABBIT=4`` in the environment it is a RabbitMQ 4 out of a folder (``lab.debian``),
    else the one that this machine has.

    Example:
        >>> with RabbitNode() as node:
        ...     url = node.vhost("mine")
        ...     node.kill()
        ...     node.start()
    """

    def __init__(
        self,
        *,
        config: Mapping[str, str] | None = None,
        management: bool = True,
        joins: RabbitNode | None = None,
    ) -> None:
        self.port = free_port()
        self.management_port = free_port()
        self._dist_port = free_port()
        self.name = f"flame-{secrets.token_hex(4)}@localhost"
        self._management = management
        self._config = dict(config or {})
        self._programs = _newer_programs() if os.environ.get("LAB_RABBIT") == "4" else _programs()
        self._joins = joins
        self.cookie: str = joins.cookie if joins else secrets.token_hex(16)
        self.epmd_port: int = joins.epmd_port if joins else free_port()
        self._epmd: Process | None = None
        self._server: Process | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="flame-rabbit-"))
        self._write_folder()

    @property
    def url(self) -> str:
        """Address of the default virtual host, with user and password."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def running(self) -> bool:
        """Whether the node's process runs."""
        return self._server is not None and self._server.running

    @property
    def pid(self) -> int:
        """Process id of the node."""
        assert self._server is not None, "the node was never started"
        return self._server.pid

    @property
    def log(self) -> str:
        """What the node has logged so far."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    def start(self) -> Self:
        """Start the node on its old data, and wait until it serves."""
        if not self.running:
            if self._joins is None and (self._epmd is None or not self._epmd.running):
                self._epmd = self._start_epmd()
            self._server = Process(
                self._programs.command(self._programs.server),
                env=self._environment(),
                cwd=self.folder,
                log=self.folder / "console.log",
            )
            self._await_startup(self._server)
        return self

    def stop(self) -> None:
        """Shut the node down in order; its data stays for the next ``start``."""
        if self._server is not None:
            self._server.terminate(timeout_s=60)

    def kill(self) -> None:
        """End the node as a power cut would (SIGKILL); see ``settle``."""
        if self._server is not None:
            self._server.kill()

    def settle(self) -> None:
        """Write the node's registries of queues to disk.

        Seen on 3.10.8, confirmed messages or not: a quorum queue declared less than half a second
        before a SIGKILL comes back empty, and a classic one declared less than two seconds before
        may not come back at all, because the node writes both registries with a delay. Call this
        before ``kill`` when a test has just declared its queues.
        """
        self.ctl("eval", "mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()].")

    def restart(self) -> None:
        """Stop in order and start again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the node: connections stay open and nothing answers (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen node go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the node and its epmd, and remove every folder."""
        for process in (self._server, self._epmd):
            if process is not None:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ctl(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run ``rabbitmqctl`` against this node and return its standard output.

        Raises:
            AssertionError: It failed; the message carries its output.
        """
        done = self._try_ctl(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"rabbitmqctl {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def _try_ctl(
        self, *arguments: str, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._programs.command(self._programs.ctl), "--quiet", *arguments],
            env=self._environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def set_alarm(self) -> None:
        """Raise the memory alarm: the broker stops reading from every publisher."""
        self.ctl("set_vm_memory_high_watermark", "0.00001")

    def clear_alarm(self) -> None:
        """Take the memory alarm back."""
        self.ctl("set_vm_memory_high_watermark", "0.8")

    def fill_disk(self) -> None:
        """Raise the disk alarm, as a full disk would."""
        self.ctl("set_disk_free_limit", "1000000GB")

    def free_disk(self) -> None:
        """Take the disk alarm back."""
        self.ctl("set_disk_free_limit", _DISK_LIMIT)

    def vhost(self, name: str | None = None) -> str:
        """Make a fresh virtual host and return its URL."""
        name = name or f"test-{secrets.token_hex(6)}"
        if self._management:
            self._api("PUT", f"vhosts/{name}", b"{}")
            permissions = b'{"configure": ".*", "write": ".*", "read": ".*"}'
            self._api("PUT", f"permissions/{name}/guest", permissions)
        else:
            self.ctl("add_vhost", name)
            self.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        return self.url + name

    def delete_vhost(self, url: str) -> None:
        """Delete the virtual host behind this URL with all its queues and connections."""
        name = url.rpartition("/")[2]
        if self._management:
            self._api("DELETE", f"vhosts/{name}")
        else:
            self.ctl("delete_vhost", name)

    def queue_depth(self, queue: str, url: str | None = None) -> int:
        """Count the messages that wait in a queue; those delivered and not acked are not in it.

        Args:
            queue: Its name.
            url: Its virtual host, as ``vhost`` returned it; the default one when None.

        Returns:
            The number of ready messages, or -1 when there is no such queue.
        """
        with self._channel(url) as channel:
            try:
                answer = channel.queue_declare(queue, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                return -1
            return int(answer.method.message_count)

    def queues(self, url: str | None = None) -> dict[str, tuple[int, int]]:
        """Return ready and unacked messages of every queue of a virtual host, by name.

        The broker counts a quorum queue anew four times a second, so wait for a number rather
        than asserting it at once.
        """
        name = url.rpartition("/")[2] if url else "/"
        listing = self.ctl(
            "list_queues", "-p", name or "/", "--no-table-headers",
            "name", "messages_ready", "messages_unacknowledged",
        )  # fmt: skip
        rows = (line.split("\t") for line in listing.splitlines() if line.count("\t") == 2)
        return {name: (int(ready), int(unacked)) for name, ready, unacked in rows}

    def drop_connections(self, reason: str = "dropped by a test") -> None:
        """Close every client connection from the broker's side."""
        self.ctl("close_all_connections", reason)

    @contextlib.contextmanager
    def _channel(
        self, url: str | None
    ) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
        connection = pika.BlockingConnection(pika.URLParameters(url or self.url + "%2F"))
        try:
            yield connection.channel()
        finally:
            connection.close()

    def _api(self, method: str, path: str, body: bytes | None = None) -> None:
        login = base64.b64encode(b"guest:guest").decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.management_port}/api/{path}",
            data=body,
            method=method,
            headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            return

    def _write_folder(self) -> None:
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(self.cookie)
        cookie.chmod(0o400)
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "loopback_users.guest": "true",
            "vm_memory_high_watermark.relative": "0.8",
            "disk_free_limit.absolute": _DISK_LIMIT,
            "log.file.level": "info",
        }
        if self._management:
            settings["management.tcp.ip"] = "127.0.0.1"
            settings["management.tcp.port"] = str(self.management_port)
        if self._joins is not None:
            settings["cluster_formation.peer_discovery_backend"] = "classic_config"
            for number, name in enumerate((self._joins.name, self.name), 1):
                settings[f"cluster_formation.classic_config.nodes.{number}"] = name
        settings |= self._config
        text = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self.folder / "rabbitmq.conf").write_text(text)
        plugins = "rabbitmq_management" if self._management else ""
        (self.folder / "enabled_plugins").write_text(f"[{plugins}].\n")
        (self.folder / "rabbitmq-env.conf").touch()
        # Counts of quorum queues are five seconds old by default; tests want them fresh.
        tick_ms = 250 if self._management else 5000
        (self.folder / "advanced.config").write_text(
            f"[{{rabbit, [{{quorum_tick_interval, {tick_ms}}}]}}].\n"
        )

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")
        }
        folder = str(self.folder)
        return inherited | {
            "HOME": folder,
            "LC_ALL": "C.UTF-8",  # the locale of this machine may be unknown in another system
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": folder + "/mnesia",
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_PID_FILE": folder + "/node.pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": folder + "/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": folder + "/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": folder + "/advanced.config",
            "RABBITMQ_CONF_ENV_FILE": folder + "/rabbitmq-env.conf",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG_FLAGS,
            # Makes the start script become the node instead of watching it, so that our process
            # id is the node's and a kill reaches it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _start_epmd(self) -> Process:
        options = ["-port", str(self.epmd_port), "-address", "127.0.0.1"]
        epmd = Process(
            [*self._programs.command(self._programs.epmd), *options],
            log=self.folder / "epmd.out",
        )
        wait_until(lambda: answers(self.epmd_port), describe="epmd answers")
        return epmd

    def _await_startup(self, server: Process) -> None:
        def serving() -> bool:
            assert server.running, f"RabbitMQ ended: {server.output()[-4000:]}"
            return answers(self.port)

        def started() -> bool:
            assert server.running, f"RabbitMQ ended: {server.output()[-4000:]}"
            # Somebody answers: us, or a stranger on our port, because of whom we are about to end.
            return self._try_ctl("await_startup").returncode == 0

        for answered in (serving, started):
            wait_until(answered, _START_TIMEOUT_S, lambda: f"RabbitMQ: {server.output()[-4000:]}")

    def __enter__(self) -> Self:
        """Start the node."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the node."""
        self.close()


@dataclass(frozen=True)
class _Programs:
    """What a node is made of, and the system that they are found in; None for this one."""

    server: str
    ctl: str
    epmd: str
    system: DebianFolder | None = None

    def command(self, program: str) -> list[str]:
        """How to run one of them; it sees the node's folder, and certificates beside it."""
        if self.system is None:
            return [program]
        return self.system.command([program], sees=Path(tempfile.gettempdir()))


def _programs() -> _Programs:
    # Debian's wrapper on PATH switches to the user `rabbitmq`; the script below it does not.
    server = program(
        ["/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"], package="rabbitmq-server"
    )
    beside = str(Path(server).with_name("rabbitmqctl"))
    ctl = program([beside, "rabbitmqctl"], package="rabbitmq-server")
    return _Programs(server, ctl, program(["epmd"], package="erlang-base"))


def _newer_programs() -> _Programs:
    scripts = "/usr/lib/rabbitmq/bin"
    return _Programs(
        f"{scripts}/rabbitmq-server",
        f"{scripts}/rabbitmqctl",
        "/usr/bin/epmd",
        newer_rabbit().make(),
    )
