"""The ``flame-worker`` command."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import inf, nan
from pathlib import Path
from typing import Final

from flame_broker.config import load
from flame_broker.errors import (
    BrokerUnavailable,
    ConfigError,
    FlameError,
    ResourceError,
    StoreError,
)
from flame_broker.logs import show_logs
from flame_broker.resources import Capacity
from flame_broker.topology import DEFAULT_POOL, check_pool
from flame_worker.capacity import detect_capacity, parse_bytes
from flame_worker.daemon import Worker, WorkerSettings

__all__ = ["main"]

MOST_SLOTS: Final = 1024
"""One loop would spend its time on the children of more."""

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 22
EXIT_UNAVAILABLE: Final = 69
EXIT_INTERRUPTED: Final = 130

_EPILOG = """\
examples:
  flame-worker                                   one slot a cpu, pool "default"
  flame-worker --slots 4 --pool gpu --gpu 2      four slots, two of the GPUs
  flame-worker --label rack=b12 --drain-timeout 300

SIGTERM drains: finish what runs, hand back the rest, exit 0. A second one ends at once.
The broker, store and key come from FLAME_BROKER_URL, FLAME_STORE_URL and FLAME_KEY, or from
flame.yaml; `flame config show` prints what applies.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a worker until it is told to leave; the return value is the exit code."""
    arguments = _parser().parse_args(argv)
    show_logs(verbose=arguments.verbose)
    try:
        return asyncio.run(_serve(_settings(arguments)))
    except ConfigError as problem:
        return _complain(problem, EXIT_CONFIG)
    except (BrokerUnavailable, StoreError) as problem:
        return _complain(problem, EXIT_UNAVAILABLE)
    except FlameError as problem:
        return _complain(problem, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flame-worker",
        description="Run calls of a pool on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flame-worker {version('flame')}")
    parser.add_argument(
        "--pool", type=_pool, default=DEFAULT_POOL, help="the pool to serve (%(default)s)"
    )
    parser.add_argument("--slots", type=_slots, help="children of the default class (one a cpu)")
    parser.add_argument("--cpu", type=_cpus, help="cpus to reserve from (all that are detected)")
    parser.add_argument("--mem", type=_size, help="memory to reserve from, as 16g (all)")
    parser.add_argument("--gpu", type=_count, help="GPUs to reserve from (all that are detected)")
    parser.add_argument(
        "--label", action="append", default=[], metavar="K=V", help="shown in `flame workers`"
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a drain waits for running calls (%(default)s)",
    )
    parser.add_argument(
        "--recycle-calls",
        type=_count,
        default=0,
        metavar="N",
        help="replace a child after so many calls (0: never)",
    )
    parser.add_argument(
        "--recycle-memory",
        type=_size,
        metavar="SIZE",
        help="replace a child that keeps more than this between calls, as 8g; 0: never "
        "(memory divided by slots, 2g at least; where a class reserves memory, that)",
    )
    parser.add_argument(
        "--health-file", type=Path, help="rewritten every 2 s while the worker is well"
    )
    parser.add_argument("--broker", help="broker URL, instead of FLAME_BROKER_URL")
    parser.add_argument("--store", help="store URL, instead of FLAME_STORE_URL")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step")
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of {least} or more")
    return int(text)


def _cpus(text: str) -> float:
    number = _number(text)
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def _seconds(text: str) -> float:
    number = _number(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds, 0 or more")
    return number


def _number(text: str) -> float:
    """What is no number is NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return nan


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ResourceError as problem:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 16g") from problem


def _pool(text: str) -> str:
    try:
        return check_pool(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text}: {problem}") from problem


def _slots(text: str) -> int:
    number = _positive(text)
    if number > MOST_SLOTS:
        raise argparse.ArgumentTypeError(
            f"{text}: one worker serves {MOST_SLOTS} slots at most; start several workers"
        )
    return number


def _settings(arguments: argparse.Namespace) -> WorkerSettings:
    configured = load(broker=arguments.broker, store=arguments.store)
    if configured.broker_url is None:
        raise ConfigError(
            "no broker is configured: set FLAME_BROKER_URL, or pass --broker amqp://host/"
        )
    return WorkerSettings(
        broker_url=configured.broker_url,
        store_url=configured.store_url,
        keyring=configured.keyring,
        home=configured.home,
        pool=arguments.pool,
        slots=arguments.slots,
        capacity=_capacity(arguments),
        labels=_labels(arguments.label),
        drain_timeout_s=arguments.drain_timeout,
        recycle_calls=arguments.recycle_calls,
        recycle_memory_bytes=arguments.recycle_memory,
        health_file=arguments.health_file,
    )


def _capacity(arguments: argparse.Namespace) -> Capacity:
    found = detect_capacity()
    cpu = arguments.cpu if arguments.cpu is not None else found.cpu
    return Capacity(
        cpu=max(cpu, arguments.slots or 0),
        mem_bytes=arguments.mem if arguments.mem is not None else found.mem_bytes,
        gpu=arguments.gpu if arguments.gpu is not None else found.gpu,
    )


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--label {pair}: expected K=V, as in --label rack=b12")
        labels[name] = value
    return labels


async def _serve(settings: WorkerSettings) -> int:
    worker = Worker(settings)
    starting = asyncio.ensure_future(worker.start())
    with _signals(worker, starting):
        try:
            await starting
        except asyncio.CancelledError:
            await worker.stop()
            return EXIT_DONE
        except FlameError:
            await worker.stop()  # leave no folders behind: whoever starts us will try again
            raise
        await worker.drained.wait()
    return EXIT_DONE


@contextmanager
def _signals(worker: Worker, starting: asyncio.Future[None]) -> Iterator[None]:
    """SIGTERM and SIGINT drain; the second one ends the process where it stands."""
    loop = asyncio.get_running_loop()
    asked: list[asyncio.Task[None]] = []

    def leave() -> None:
        if asked:
            worker.kill_children()
            os._exit(EXIT_FAILED)
        if not starting.done():
            starting.cancel()
        asked.append(asyncio.ensure_future(worker.drain() if starting.done() else asyncio.sleep(0)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _complain(problem: FlameError, code: int) -> int:
    sys.stderr.write(f"flame-worker: {problem}\n")
    return code
