"""The system of ``docker-compose.yml``: started by Docker, or by Podman on stand-in images."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path

from lab.compose_file import ROOT, ComposeFile, Service, read_env_file
from lab.container_engine import ContainerEngine, docker, podman
from lab.ports import free_port
from lab.services import MissingService
from lab.stand_ins import make_stand_ins, python_version
from lab.wait import wait_until

__all__ = ["ComposedSystem", "composed_system"]

_START_TIMEOUT_S = 300.0


class ComposedSystem(ABC):
    """The whole system of one project, with secrets of its own."""

    def __init__(self, engine: ContainerEngine) -> None:
        self.engine = engine
        self.project = f"flame-proof-{secrets.token_hex(3)}"
        self.folder = Path(tempfile.mkdtemp(prefix="flame-compose-"))
        self.env_file = self.folder / "env"
        subprocess.run([ROOT / "tools" / "secrets", self.env_file], check=True, capture_output=True)
        self._set(PYTHON_VERSION=python_version(), BROKER_FILES="1024")

    def _set(self, **variables: str) -> None:
        with self.env_file.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in variables.items())

    @property
    def variables(self) -> dict[str, str]:
        """Its ``.env`` file."""
        return read_env_file(self.env_file)

    @property
    def broker_url(self) -> str:
        """The broker, as a program outside reaches it."""
        host, port = self.address("rabbitmq", 5672)
        return f"amqp://flame:{self.variables['FLAME_BROKER_PASSWORD']}@{host}:{port}/flame"

    @property
    def store_url(self) -> str:
        """The object store, as a program outside reaches it."""
        host, port = self.address("s3", 7070)
        login = f"flame:{self.variables['FLAME_STORE_SECRET']}"
        return f"s3://{login}@flame/?endpoint=http://{host}:{port}&region=us-east-1"

    @abstractmethod
    def start(self) -> None:
        """Build the images, start everything, and wait until each service says that it is well."""

    @abstractmethod
    def address(self, service: str, port: int) -> tuple[str, int]:
        """Where a port of a service is from outside."""

    @abstractmethod
    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers."""

    @abstractmethod
    def close(self) -> None:
        """Remove the containers, volumes and networks that it made."""

    def kill(self, container: str) -> None:
        """End a container at once."""
        self.engine.run("kill", "--signal=KILL", container)

    def logs(self) -> str:
        """The last lines of every service, for a failure's message."""
        texts = []
        for service in ("rabbitmq", "s3", "postgres", "orchestrator", "worker"):
            for container in self.containers(service):
                done = self.engine.attempt("logs", "--tail=20", container)
                texts.append(f"--- {service} {container[:12]}\n{done.stdout}{done.stderr}")
        return "\n".join(texts)


class _DockerSystem(ComposedSystem):
    def __init__(self, engine: ContainerEngine) -> None:
        super().__init__(engine)
        self._ports = {("rabbitmq", 5672): free_port(), ("s3", 7070): free_port()}
        self._set(
            BROKER_PORT=str(self._ports["rabbitmq", 5672]),
            BROKER_PAGE_PORT=str(free_port()),
            STORE_PORT=str(self._ports["s3", 7070]),
        )

    def start(self) -> None:
        if os.environ.get("LAB_STAND_INS"):
            make_stand_ins(self.engine, ComposeFile(self.variables))
        self._compose("up", "--build", "--detach", "--wait", timeout_s=1200)

    def address(self, service: str, port: int) -> tuple[str, int]:
        return "127.0.0.1", self._ports[service, port]

    def containers(self, service: str) -> list[str]:
        return self._compose("ps", "--quiet", service).split()

    def close(self) -> None:
        self._compose("down", "--volumes")
        shutil.rmtree(self.folder)

    def _compose(self, *words: str, timeout_s: float = 120.0) -> str:
        options = [f"--project-name={self.project}", f"--env-file={self.env_file}"]
        place = [f"--project-directory={ROOT}", f"--file={ROOT / 'docker-compose.yml'}"]
        return self.engine.run("compose", *options, *place, *words, timeout_s=timeout_s)


class _PodmanSystem(ComposedSystem):
    """All containers in one network namespace: their ports are the file's, and nobody else's."""

    def __init__(self, engine: ContainerEngine) -> None:
        super().__init__(engine)
        self._file = ComposeFile(self.variables)
        self._net = _Net(self.project)
        self._containers: dict[str, list[str]] = {}
        self._volumes: set[str] = set()

    def start(self) -> None:
        make_stand_ins(self.engine, self._file)
        for image, service in {each.image: each for each in self._file.services.values()}.items():
            if service.dockerfile is not None:
                self.engine.build(image, service.dockerfile, ROOT, service.build_arguments)
        self._net.make()
        for service in self._file.services.values():
            self._start(service)
        for service in self._file.services.values():
            self._await_well(service)

    def address(self, service: str, port: int) -> tuple[str, int]:
        assert service in self._file.services
        return self._net.address, port

    def containers(self, service: str) -> list[str]:
        return self._containers.get(service, [])

    def close(self) -> None:
        for container in (each for made in self._containers.values() for each in made):
            self.engine.run("rm", "--force", "--time=0", container)
        for volume in self._volumes:
            self.engine.run("volume", "rm", volume)
        self._net.remove()
        shutil.rmtree(self.folder)

    def _start(self, service: Service) -> None:
        for other, condition in service.needs.items():
            if condition == "service_completed_successfully":
                (container,) = self._containers[other]
                assert self.engine.run("wait", container).strip() == "0", self.logs()
            else:
                self._await_well(self._file.services[other])
        options = self._options(service)
        for _ in range(service.replicas):
            made = self.engine.run("run", "--detach", *options, service.image, *service.command)
            self._containers.setdefault(service.name, []).append(made.strip())

    def _options(self, service: Service) -> list[str]:
        options = [f"--network=ns:{self._net.path}", *self.engine.ulimits]
        options += [f"--add-host={name}:127.0.0.1" for name in self._file.services]
        options += [f"--cap-drop={name}" for name in service.settings.get("cap_drop", [])]
        options += [f"--security-opt={each}" for each in service.settings.get("security_opt", [])]
        options += [f"--tmpfs={place}" for place in service.settings.get("tmpfs", [])]
        options += [f"--{name}={value}" for name, value in service.limits.items()]
        for name, value in service.settings.get("environment", {}).items():
            options.append(f"--env={name}={value}")
        for mount in service.settings.get("volumes", []):
            volume, _, place = mount.partition(":")
            self._volumes.add(f"{self.project}-{volume}")
            options.append(f"--volume={self.project}-{volume}:{place}")
        for name in ("user", "shm_size"):
            if name in service.settings:
                options.append(f"--{name.replace('_', '-')}={service.settings[name]}")
        return [*options, "--read-only"] if service.settings.get("read_only") else options

    def _await_well(self, service: Service) -> None:
        # Podman leaves the timing of health checks to systemd, which a test's machine may not run.
        if (check := service.health_check) is None:
            return
        for container in self._containers[service.name]:
            wait_until(
                partial(self._well, container, check),
                _START_TIMEOUT_S,
                lambda: f"{service.name} is well: {self.logs()}",
                poll_s=0.2,
            )

    def _well(self, container: str, check: list[str]) -> bool:
        state = self.engine.run("inspect", "--format={{.State.Running}}", container).strip()
        assert state == "true", f"a container ended: {self.logs()}"
        return self.engine.attempt("exec", container, *check).returncode == 0


class _Net:
    """A network namespace with one wire to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        network = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
        self.address = f"{network}.2"
        self._here = f"{network}.1"
        self._wire = "fl" + name[-6:]

    def make(self) -> None:
        """Make the namespace and the wire."""
        for words in (
            f"netns add {self.name}",
            f"link add {self._wire} type veth peer name eth0 netns {self.name}",
            f"addr add {self._here}/30 dev {self._wire}",
            f"link set {self._wire} up",
            f"-netns {self.name} addr add {self.address}/30 dev eth0",
            f"-netns {self.name} link set lo up",
            f"-netns {self.name} link set eth0 up",
        ):
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if done.returncode:
                raise MissingService(f"no network of one's own: ip {words}: {done.stderr}")

    def remove(self) -> None:
        """Remove both, as far as they were made."""
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


def composed_system() -> ComposedSystem:
    """The system, on the engine that this machine has; not started yet.

    Raises:
        MissingService: There is neither a Docker engine nor Podman.
    """
    with contextlib.suppress(MissingService):
        return _DockerSystem(docker())
    return _PodmanSystem(podman())
