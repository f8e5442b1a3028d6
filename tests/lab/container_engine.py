"""A container engine by its command line: Docker's, or Podman in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.services import MissingService, program

__all__ = ["CACHE", "ContainerEngine", "docker", "podman"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flame-lab"
"""What is worth keeping from one run to the next: images, systems, wheels."""

# Some machines let root have no more, and an engine asks for a million.
_ULIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


class ContainerEngine:
    """Runs the engine's command.

    Args:
        argv: The command and its own options.
        ulimits: What containers and builds must be given here.
    """

    def __init__(self, argv: Sequence[str], *, ulimits: Sequence[str] = ()) -> None:
        self.argv = list(argv)
        self.ulimits = list(ulimits)

    def run(self, *words: str, timeout_s: float = 120.0, stdin: int | None = None) -> str:
        """Run a command of the engine and return its standard output.

        Raises:
            AssertionError: It failed; the message carries its output.
        """
        done = self.attempt(*words, timeout_s=timeout_s, stdin=stdin)
        said = f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
        assert done.returncode == 0, f"{self.argv[0]} {' '.join(words)}: {said}"
        return done.stdout

    def attempt(
        self, *words: str, timeout_s: float = 120.0, stdin: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine that may fail."""
        return subprocess.run(
            [*self.argv, *words],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def build(
        self, tag: str, dockerfile: Path, context: Path, arguments: Mapping[str, str]
    ) -> None:
        """Build an image out of what this machine has: nothing is fetched."""
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        place = [f"--file={dockerfile}", f"--tag={tag}", str(context)]
        self.run("build", "--network=none", *self.ulimits, *options, *place, timeout_s=600)

    def import_folder(self, folder: Path, tag: str) -> None:
        """Make an image of the system in a folder, unless it is there."""
        if self.attempt("image", "inspect", tag).returncode == 0:
            return
        left_out = ["./proc/*", "./dev/*", "./var/cache/apt/archives/*.deb"]
        tar = subprocess.Popen(
            [
                "tar",
                f"--directory={folder}",
                *(f"--exclude={name}" for name in left_out),
                "-c",
                ".",
            ],
            stdout=subprocess.PIPE,
        )
        assert tar.stdout is not None
        with tar.stdout as packed:
            self.run("import", "-", tag, timeout_s=600, stdin=packed.fileno())
        assert tar.wait() == 0, f"tar could not read {folder}"


def docker() -> ContainerEngine:
    """The Docker engine that this machine runs, with its compose.

    Raises:
        MissingService: There is none.
    """
    engine = ContainerEngine([program(["docker"], package="docker")])
    for words in (["info"], ["compose", "version"]):
        if engine.attempt(*words).returncode:
            raise MissingService(f"'docker {' '.join(words)}' fails: no Docker engine runs here")
    return engine


def podman() -> ContainerEngine:
    """Podman, which needs no engine that runs; its images are kept in the cache.

    Raises:
        MissingService: It is not here, or not for this user.
    """
    if os.geteuid() != 0:
        raise MissingService("podman, as the lab uses it, takes root")
    command = program(["podman"], package="podman")
    program(["runc"], package="runc")
    if not shutil.which("ip"):
        raise MissingService("there is no 'ip' for networks of one's own: install iproute2")
    folders = [f"--root={CACHE / 'podman'}", f"--runroot={CACHE / 'podman-run'}"]
    # crun fails where version 1 of cgroups is laid out in an unusual way.
    options = ["--runtime=runc", "--cgroup-manager=cgroupfs"]
    return ContainerEngine([command, *folders, *options], ulimits=_ULIMITS)
