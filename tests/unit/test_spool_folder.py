"""A worker's spool goes with it, also when it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flame_worker.spool_folder import SpoolFolder

_MAKE = """
import sys
from pathlib import Path
from flame_worker.spool_folder import SpoolFolder
folder = SpoolFolder(Path(sys.argv[1]), "killed")
folder.make()
(folder.path / "result").write_bytes(b"x")
print("made", flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_worker_is_removed_by_the_next_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MAKE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"made\n"
        first = SpoolFolder(tmp_path, "first")
        first.make()
        assert (tmp_path / "killed" / "result").exists()
        other.kill()
        other.wait()
    second = SpoolFolder(tmp_path, "second")
    second.make()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []
