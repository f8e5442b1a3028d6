"""Proves that the built wheel works by itself: run with the Python it is installed in.

It lies outside the test suite, and runs from another folder, so that nothing of the checkout is
importable.
"""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("flame", "flame_broker", "flame_cli", "flame_infra", "flame_worker")


def double(number: int) -> int:
    return 2 * number


def check_packages() -> None:
    for name in PACKAGES:
        assert (importlib.resources.files(name) / "py.typed").is_file(), f"{name} lacks py.typed"
        home = Path(str(importlib.resources.files(name)))
        assert "site-packages" in home.parts, f"{name} comes from {home}, not from the wheel"


def check_commands() -> None:
    for name in ("flame", "flame-worker"):
        command = Path(sys.executable).with_name(name)
        done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
        assert "Usage" in done.stdout or "usage" in done.stdout, done.stdout


def check_a_call() -> None:
    import flame

    with flame.connect() as client, flame.Runner("smoke", client=client) as runner:
        service = runner.service(double)
        futures = [service(number) for number in range(10)]
        assert runner.get(futures, timeout=60) == [2 * number for number in range(10)]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flame-smoke-") as home:
        os.environ["FLAME_HOME"] = home
        check_packages()
        check_commands()
        check_a_call()
    print("The wheel works: packages, commands, and calls on the embedded cluster.")


if __name__ == "__main__":
    main()
