"""Notebooks: real cells in a real kernel, as Jupyter runs them, on the embedded cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

_PATIENCE_S = 60.0


class CellFailed(Exception):
    """A cell raised something: its traceback, as the notebook shows it."""


class Notebook:
    """A kernel whose cells are run one after another.

    Attributes:
        printed: What all cells have printed so far, on both streams.
    """

    def __init__(self, client: BlockingKernelClient) -> None:
        self.printed = ""
        self._client = client

    def run(self, cell: str) -> str:
        """Run a cell to its end; the value of its last line, as the notebook shows it.

        Raises:
            CellFailed: It raised something.
        """
        request, value = self._client.execute(cell, stop_on_error=False), ""
        while True:
            message = self._next()
            content = message["content"]
            mine = message["parent_header"].get("msg_id") == request
            if mine and message["msg_type"] == "execute_result":
                value = content["data"]["text/plain"]
            if mine and message["msg_type"] == "error":
                raise CellFailed("\n".join(content["traceback"]))
            if mine and content.get("execution_state") == "idle":
                return value

    def wait_for_output(self, text: str) -> None:
        """Wait until this has been printed."""
        deadline = time.monotonic() + _PATIENCE_S
        while text not in self.printed and time.monotonic() < deadline:
            self._next()
        assert text in self.printed

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = self._client.get_iopub_msg(timeout=_PATIENCE_S)
        if message["msg_type"] == "stream":
            self.printed += message["content"]["text"]
        return message


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """A fresh kernel with nothing of the user's settings."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=_PATIENCE_S)
        yield Notebook(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def test_functions_of_cells_are_services(notebook: Notebook) -> None:
    notebook.run("""
        import flame
        factor = 2

        def scale(number):
            print("scaling", number)
            return factor * number

        runner = flame.Runner()
        service = runner.service(scale)
    """)
    assert notebook.run("service(21).get(30)") == "42"
    notebook.wait_for_output("[scale] scaling 21\n")
    assert notebook.run("list(service.map(range(3)))") == "[0, 2, 4]"

    # A service keeps what its function was; a new one has what it is now.
    notebook.run("""
        def scale(number):
            return -number
    """)
    assert notebook.run("service(21).get(30), runner.service(scale)(21).get(30)") == "(42, -21)"


def test_a_cell_may_await_futures(notebook: Notebook) -> None:
    # The kernel runs an event loop of its own, and cells are coroutines in it.
    notebook.run("""
        import asyncio, flame
        service = flame.Runner().service(lambda number: number + 1)
    """)
    assert notebook.run("await service(1)") == "2"
    assert notebook.run("await asyncio.gather(*(service(n) for n in range(3)))") == "[1, 2, 3]"


def test_classes_of_cells_come_back_as_themselves(notebook: Notebook) -> None:
    notebook.run("""
        import flame

        class Point:
            def __init__(self, x):
                self.x = x

        def move(point):
            return Point(point.x + 1)
    """)
    assert notebook.run("type(flame.Runner().service(move)(Point(1)).get(30)) is Point") == "True"


def test_an_interrupted_cell_leaves_the_client_usable(notebook: Notebook) -> None:
    notebook.run("""
        import flame, os, signal, threading, time
        service = flame.Runner().service(time.sleep)
        service(0).get(30)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    """)
    with pytest.raises(CellFailed, match="KeyboardInterrupt"):
        notebook.run("endless = service(600); timer.start(); endless.get()")
    assert notebook.run("endless.cancel(), service(0).get(30)") == "(True, None)"
