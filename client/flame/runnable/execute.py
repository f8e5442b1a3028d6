"""The call that ``flame run`` makes: execute this YAML.

What is wrong with the configuration is returned, what the Runnable raises is raised: so the
command can tell the two apart although both may be any exception.
"""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flame.client import close_default_client
from flame.runnable.base import Runnable
from flame.runnable.extensions import Extension, PackedExtension, imported, unpack
from flame.runnable.registry import Registry
from flame.runnable.safe import compile_document, prepare
from flame.runnable.yaml import check_tags, parse
from flame_broker.bridged import unseal_here, worker_folder
from flame_broker.errors import ConfigError

__all__ = ["UNPACKED", "Flags", "Job", "execute", "run", "secrets_context"]

UNPACKED: Final = "flame-run-"
"""What the folders begin with that extensions are unpacked into."""


@dataclass(frozen=True, slots=True)
class Flags:
    """What a ``run`` may be told.

    Args:
        force: Override an existing execution.
        verbose: Say more.
        debug: It runs in the command's own process.
    """

    force: bool = False
    verbose: bool = False
    debug: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A Runnable on its way to a worker.

    Args:
        id: Of this run; its secrets are sealed for it.
        file: Name of the YAML file, for messages.
        text: What it holds.
        installed: Extensions that are installed packages, name to requirement.
        packed: Extensions that travel along.
        flags: From the command line.
        sealed: The secrets file, encrypted; empty for none.
        directory: Where to run; empty where the worker sees other files than the user.
        environ: How wide and colourful the user's terminal is.
    """

    id: str
    file: str
    text: str
    installed: Mapping[str, str]
    packed: tuple[PackedExtension, ...]
    flags: Flags = Flags()
    sealed: bytes = field(default=b"", repr=False)
    directory: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)


def secrets_context(job_id: str) -> bytes:
    """What secrets are sealed for: they open in this run only."""
    return b"flame run " + job_id.encode()


def execute(job: Job) -> str:
    """Run a Runnable.

    Returns:
        What is wrong with the configuration; empty if it ran.

    Raises:
        BaseException: What its ``run`` raised.
    """
    with ExitStack() as until_the_end:
        try:
            runnable = _prepare(job, until_the_end)
        except ConfigError as exc:
            return str(exc)
        try:
            run(runnable, job.flags)
        except BaseException:  # it goes on; its traceback is written when the files are gone
            _remember_sources()
            raise
        finally:
            close_default_client()  # what its own calls printed is on the console then
    return ""


def _prepare(job: Job, until_the_end: ExitStack) -> Runnable:
    # A call that is killed removes nothing; then the worker does.
    unpacked = tempfile.TemporaryDirectory(prefix=UNPACKED, dir=worker_folder())
    folder = until_the_end.enter_context(unpacked)
    extensions = unpack(job.packed, Path(folder))
    extensions += [Extension(name, text) for name, text in job.installed.items()]
    until_the_end.enter_context(_surroundings(job))
    registry = Registry(until_the_end.enter_context(imported(extensions)))
    document = parse(job.text, job.file)
    check_tags(document, registry)
    runnable = compile_document(document, registry)
    secrets = unseal_here(job.sealed, secrets_context(job.id)) if job.sealed else b""
    prepare(runnable, job.text, document.extensions, secrets.decode())
    return runnable


def _remember_sources() -> None:
    """Have tracebacks show the lines of unpacked files, also when those are gone."""
    for module in [*sys.modules.values()]:
        file = getattr(module, "__file__", None) or ""
        if UNPACKED in file:
            lines = linecache.getlines(file)
            # Without a time of change the entry is not checked against the file any more.
            linecache.cache[file] = (0, None, lines, file)


def run(runnable: Runnable, flags: Flags) -> None:
    """Call ``run`` with the flags that it takes."""
    given = {"force": flags.force, "verbose": flags.verbose, "debug": flags.debug}
    parameters = inspect.signature(runnable.run).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    runnable.run(**given)


@contextmanager
def _surroundings(job: Job) -> Iterator[None]:
    """The user's directory and terminal, as far as there are such."""
    before = {name: os.environ.get(name) for name in job.environ}
    os.environ.update(job.environ)
    if job.directory:
        os.chdir(job.directory)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
