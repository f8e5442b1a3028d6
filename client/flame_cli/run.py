"""``flame run FILE.yaml``: a Runnable, executed as a call on a worker."""

from __future__ import annotations

import logging
import re
import secrets as dice
import shutil
import sys
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer

from flame_broker.errors import ConfigError, RemoteError
from flame_cli.completion import PROGRAM
from flame_cli.exits import INTERRUPTED, WORK_FAILED

if TYPE_CHECKING:
    from flame.client import Client
    from flame.futures import ObjectFuture
    from flame.runnable.execute import Flags, Job
    from flame.runnable.extensions import Extension
    from flame.runnable.yaml import Document

__all__ = ["run"]

_LOG_BYTES: Final = 1024 * 1024
_LOG_FILES: Final = 3
_TICK_S: Final = 0.1
_NO_WORKER_AFTER_S: Final = 3.0
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line \d+')
_OURS = re.compile(r"/(?:flame/runnable|flame_cli)/\w+\.py$")


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", show_default=False)],
    *,
    cluster: Annotated[
        Path | None, typer.Option("-c", "--cluster", help="Run on this cluster (not there yet).")
    ] = None,
    install: Annotated[
        bool, typer.Option("-i", "--install-extensions", help="Install extensions with pip first.")
    ] = False,
    secrets: Annotated[
        str | None,
        typer.Option("-s", "--secrets", help="INI file; ~/.flame/secrets.ini if it is there."),
    ] = None,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Override an existing execution.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show all logs.")] = False,
    debug: Annotated[
        bool, typer.Option("-d", "--debug", help="Run in this process, without a worker.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait for the end (not there yet).")
    ] = False,
) -> None:
    """Run the Runnable of a YAML file on a worker, with its output here.

    With no broker configured, an embedded cluster runs it on this machine. Exit codes: 0 done, 1
    the Runnable failed, 22 the configuration is wrong, 69 no broker, 130 interrupted.

    \b
    Examples:
      flame run examples/digits/digits.yaml
      flame examples/digits/digits.yaml --debug
      flame run push.yaml --secrets secrets.ini --install-extensions
    """
    _refuse_what_is_not_there(cluster, detach, debug)
    from importlib.metadata import version

    from flame.runnable.execute import Flags

    started = monotonic()
    typer.secho(f"{PROGRAM} {version('flame')}", bold=True, err=True)
    _log(verbose)
    flags = Flags(force=force, verbose=verbose, debug=debug)
    try:
        if debug:
            _run_here(file, secrets, install, flags)
        else:
            _run_on_worker(file, secrets, install, flags)
    except KeyboardInterrupt:
        typer.secho("Interrupted", fg="yellow", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.secho(f"Done in {monotonic() - started:.1f} s", fg="green", err=True)


def _refuse_what_is_not_there(cluster: Path | None, detach: bool, debug: bool) -> None:
    if cluster is not None and debug:
        raise typer.BadParameter("--debug runs in this process, so it takes no --cluster")
    for option, given in (("--cluster", cluster is not None), ("--detach", detach)):
        if given:
            raise typer.BadParameter(f"{option} is not there yet in this version")


def _log(verbose: bool) -> None:
    """Warnings (with ``-v`` everything) on the console, and all of it in a rotating file."""
    from flame_broker.config import home_path
    from flame_broker.logs import show_logs

    show_logs(verbose=verbose)
    logger = logging.getLogger("flame")
    if not verbose:
        logger.handlers[0].setLevel(logging.WARNING)
    folder = home_path() / "logs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = RotatingFileHandler(
            folder / "flame.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, delay=True
        )
    except OSError as exc:
        raise ConfigError(f"cannot make {folder}: {exc.strerror}; set FLAME_HOME") from exc
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)


# ── in this process ──────────────────────────────────────────────────────────


def _run_here(file: Path, secrets: str | None, install: bool, flags: Flags) -> None:
    from flame.runnable.execute import run
    from flame.runnable.safe import SafeExecutionContext

    context = SafeExecutionContext(str(file))
    try:
        runnable, _ = context.preprocess(secrets=secrets, install_ext=install)
        try:
            run(runnable, flags)
        # The border to the user's code, whose failure is ours to show.
        except Exception as exc:
            from traceback import format_exception

            _fail(_without_our_frames("".join(format_exception(exc))))
            raise typer.Exit(WORK_FAILED) from exc
    finally:
        context.close()


# ── on a worker ──────────────────────────────────────────────────────────────


def _run_on_worker(file: Path, secrets: str | None, install: bool, flags: Flags) -> None:
    from flame.runnable.extensions import locate_extensions
    from flame.runnable.installer import install as install_extensions
    from flame.runnable.secrets import find_secrets
    from flame.runnable.yaml import read_document

    document = read_document(file)
    extensions = locate_extensions(document.extensions, file.parent)
    plain = find_secrets(secrets)
    import flame

    client = flame.connect()
    try:
        if install:
            _check_workers_are_here(client)
            install_extensions(extensions, lambda line: typer.echo(line, err=True))
        job = _job(document, extensions, plain, flags, client)
        problem = _execute(client, job, document.node.tag.removeprefix("!"), extensions)
    finally:
        client.close()
    if problem:
        raise ConfigError(problem)


def _check_workers_are_here(client: Client) -> None:
    if client.settings.broker_url is not None:
        raise ConfigError(
            "--install-extensions installs on this machine only, and the workers of the configured "
            "broker may be elsewhere: install the extension there, or name its folder"
        )


def _job(
    document: Document,
    extensions: Sequence[Extension],
    plain: str,
    flags: Flags,
    client: Client,
) -> Job:
    from flame.runnable.execute import Job, secrets_context

    job_id = dice.token_hex(8)
    packed = [one.pack() for one in extensions]
    return Job(
        id=job_id,
        file=document.file,
        text=document.text,
        installed={one.name: one.location for one in extensions if one.entry is None},
        packed=tuple(one for one in packed if one is not None),
        flags=flags,
        sealed=client.seal(plain.encode(), secrets_context(job_id)) if plain else b"",
        # An embedded worker sees the user's files; others may, but under which names?
        directory=str(Path.cwd()) if client.settings.broker_url is None else "",
        environ=_terminal(),
    )


def _terminal() -> dict[str, str]:
    """What programs look at to see how wide the screen is and whether it has colours."""
    if not sys.stdout.isatty():
        return {}
    return {"COLUMNS": str(shutil.get_terminal_size().columns), "FORCE_COLOR": "1"}


def _execute(client: Client, job: Job, name: str, extensions: Sequence[Extension]) -> str:
    """Make the call and wait for it; what is wrong with the configuration, or ``""``."""
    from flame.calls import Caller, CallOptions
    from flame.packaging import pack_target
    from flame.runnable.execute import execute

    caller = Caller(client, pack_target(execute), CallOptions(label=""))
    future = caller.submit((job,), {})
    try:
        _watch(future, name, client)
        return str(future.result(0))
    except KeyboardInterrupt:
        future.cancel()
        raise
    # Whatever the Runnable raised arrives as itself; what is ours has no remote traceback.
    except BaseException as exc:
        remote = exc if isinstance(exc, RemoteError) else exc.__cause__
        if not isinstance(remote, RemoteError):
            raise
        text = _without_our_frames(remote.traceback) or str(remote)
        _fail(_with_own_paths(text, extensions))
        raise typer.Exit(WORK_FAILED) from exc


def _watch(future: ObjectFuture[Any], name: str, client: Client) -> None:
    """Wait, with a line that moves on a terminal; say so when no worker takes the call."""
    asked = monotonic() + _NO_WORKER_AFTER_S
    with _Line(name) as line:
        while not future.wait(_TICK_S):
            line.show(*future.progress)
            if asked and not future.running() and monotonic() > asked:
                asked = 0.0
                if client.reaches_workers and not client.workers(1.0):
                    typer.echo(
                        "waiting for a worker: none answers; start one with flame-worker", err=True
                    )


class _Line:
    """A live line under the output: what runs, how far it is, and since when."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task(self._name, total=None)
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, fraction: float, text: str) -> None:
        """Move."""
        if self._progress is not None and (fraction or text):
            self._progress.update(
                self._task, completed=fraction, total=1.0, description=f"{self._name} {text}"
            )


def _without_our_frames(traceback: str) -> str:
    """A traceback that begins where the user's code does."""
    lines: list[str] = []
    ours = False
    for line in traceback.splitlines():
        frame = _FRAME.match(line)
        if frame is not None:
            ours = _OURS.search(frame["file"]) is not None
        elif not line.startswith("    "):
            ours = False
        if not ours:
            lines.append(line)
    return "\n".join(lines)


def _with_own_paths(traceback: str, extensions: Sequence[Extension]) -> str:
    """A remote traceback that names the user's files, not the copies on the worker."""
    from flame.runnable.execute import UNPACKED

    for one in extensions:
        if one.entry is not None:
            there = re.compile(rf'(?<=File ")[^"]*/{UNPACKED}[^/"]*/{one.name}/')
            here = f"{one.entry.parent}/".replace("\\", r"\\")
            traceback = there.sub(here, traceback)
    return traceback


def _fail(text: str) -> None:
    typer.echo(text.rstrip("\n"), err=True)
    typer.secho("Failed", fg="red", bold=True, err=True)
