"""Another Debian in a folder, for services that are newer than this machine's.

``python -m lab.debian`` makes it, which downloads about 100 MB and takes a minute or two. It is
kept in the user's cache folder; remove it there to have it made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.services import MissingService, program

__all__ = ["DebianFolder", "newer_rabbit"]

_MAKE_TIMEOUT_S = 900
# In a mount namespace of its own, which ends with its last process: nothing is left mounted.
_INSIDE = """
root=$1 sees=$2; shift 2
mkdir -p "$root$sees"
mount --bind /proc "$root/proc" && mount --rbind /dev "$root/dev" &&
mount --bind "$sees" "$root$sees" || exit 1
exec chroot "$root" "$@"
"""


class DebianFolder:
    """A release of Debian with a few packages.

    Args:
        release: Its code name.
        packages: What is in it beyond the least.
    """

    def __init__(self, release: str, packages: Sequence[str]) -> None:
        self._release = release
        self._packages = packages
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = cache / "flame-lab" / "-".join([release, *packages])

    def make(self) -> DebianFolder:
        """Make the folder if it is not there.

        Raises:
            MissingService: This machine or user cannot.
        """
        wanted = f"{' '.join(self._packages)} of Debian {self._release}"
        if os.geteuid() != 0:
            raise MissingService(f"{wanted} runs under chroot, which takes root")
        unshare = program(["unshare"], package="util-linux")
        if not self.path.exists():
            debootstrap = program(["debootstrap"], package="debootstrap")
            self._make([unshare, "--mount", debootstrap], wanted)
        return self

    def _make(self, debootstrap: list[str], wanted: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            root = Path(folder) / "root"
            options = ["--variant=minbase", f"--include={','.join(self._packages)}"]
            done = subprocess.run(
                [*debootstrap, *options, self._release, root],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_MAKE_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise MissingService(f"{wanted} cannot be installed: {done.stdout[-1000:]}")
            root.chmod(0o755)
            (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
            if not self.path.exists():  # somebody else may have been faster
                root.rename(self.path)

    def command(self, argv: Sequence[str], *, sees: Path) -> list[str]:
        """The command that runs another one in here.

        Args:
            argv: What to run, by its path in here.
            sees: A folder of this machine that it finds at the same place.
        """
        unshare = shutil.which("unshare") or "unshare"
        return [unshare, "--mount", "sh", "-c", _INSIDE, "sh", str(self.path), str(sees), *argv]


def newer_rabbit() -> DebianFolder:
    """A system with RabbitMQ 4."""
    return DebianFolder("trixie", ["rabbitmq-server"])


if __name__ == "__main__":
    try:
        print(newer_rabbit().make().path)
    except MissingService as exc:
        sys.exit(str(exc))
