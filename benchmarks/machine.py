"""Facts about the machine that a reader of the numbers needs; neither its name nor its paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lab.rabbit import RabbitNode
from services import PEERS_REQUIREMENTS

PEERS = ("celery", "ray", "parsl", "distributed", "pika", "numpy")


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peer_versions() -> dict[str, str]:
    """Pinned versions of the measured peers."""
    lines = PEERS_REQUIREMENTS.read_text().splitlines()
    pins = dict(line.partition(";")[0].split("==") for line in lines if "==" in line)
    return {name: pins[name] for name in PEERS}


def machine_facts(rabbit: RabbitNode) -> dict[str, Any]:
    """Cores, processor, memory, kernel, and versions."""
    return {
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3),
        "kernel": platform.release().partition("-")[0],
        "versions": {
            "Python": platform.python_version(),
            "RabbitMQ": rabbit.ctl("version").strip(),
            "flame": version("flame"),
            **peer_versions(),
        },
    }
