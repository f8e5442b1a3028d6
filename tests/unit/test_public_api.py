"""What ``flame`` exports, what it costs to import, and that its types hold."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import flame
from flame_broker import errors

PUBLIC = {
    "CallContext",
    "Client",
    "Executor",
    "Limit",
    "MapResults",
    "ObjectFuture",
    "ObjectRef",
    "ResourceRequirement",
    "Retry",
    "Runnable",
    "Runner",
    "RunnerService",
    "SafeExecutionContext",
    "Schedule",
    "__version__",
    "attach",
    "connect",
    "current_call",
    "errors",
}

PROGRAM = """
    from collections.abc import Iterator
    from concurrent.futures import Future, as_completed
    from datetime import timedelta
    from typing import assert_type

    import flame
    from flame.testing import embedded


    def area(width: int, height: int) -> float:
        return width * height / 2


    def programs(client: flame.Client) -> None:
        with flame.Runner("typed", client=client) as runner:
            service = runner.service(area, resreq="cpu=2", timeout=timedelta(minutes=1))
            assert_type(service, flame.RunnerService[float])
            future = service(1, 2)
            assert_type(future, flame.ObjectFuture[float])
            assert_type(future.get(timeout=1), float)
            assert_type(future.ref(), flame.ObjectRef)
            assert_type(runner.get(future), float)
            nightly = service.schedule("0 3 * * *", 1, height=2, name="nightly", overlap=False)
            assert_type(nightly, flame.Schedule)
            plain: Future[float] = future
            as_completed([plain])
        with flame.Executor(2, client=client, priority="high") as executor:
            assert_type(executor.submit(area, 1, 2).result(), float)
            results: Iterator[float] = executor.map(area, [1], [2])
        call = flame.current_call()
        if call is not None:
            call.progress(0.5, "half")


    async def awaited(service: flame.RunnerService[float]) -> None:
        assert_type(await service(1, 2), float)


    with embedded() as made:
        programs(made)
"""


def test_the_public_names_are_these() -> None:
    assert set(flame.__all__) == PUBLIC
    assert all(getattr(flame, name) is not None for name in PUBLIC)
    assert set(dir(flame)) == PUBLIC


def test_every_error_can_be_had_from_flame_errors() -> None:
    mirror = import_module("flame.errors")
    assert mirror.__all__ == errors.__all__
    assert all(getattr(mirror, name) is getattr(errors, name) for name in errors.__all__)


def test_importing_flame_loads_nothing_heavy() -> None:
    heavy = ("asyncio", "pydantic", "rich", "boto3", "pika", "cloudpickle", "structlog", "msgpack")
    program = f"import flame, sys; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_importing_starts_no_thread() -> None:
    program = (
        "import threading, flame; flame.Runner, flame.connect, flame.Executor;"
        "print(threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_a_typed_program_is_accepted_by_mypy(tmp_path: Path) -> None:
    program = tmp_path / "typed_program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
