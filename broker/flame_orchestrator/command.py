"""The ``flame-orchestrator`` command."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from datetime import timedelta
from importlib.metadata import version
from typing import Final

from flame_broker.config import Settings, load
from flame_broker.errors import BrokerUnavailable, ConfigError, FlameError, ResourceError
from flame_broker.logs import show_logs
from flame_broker.resources import ResourceRequirement

__all__ = ["main"]

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 22
EXIT_UNAVAILABLE: Final = 69

_SHORTEST_LEASE_S: Final = 5.0
"""Workers beat ten times a lease, and a broker that is busy needs a second or two."""

_EPILOG = """\
examples:
  flame-orchestrator                                       the history in FLAME_HOME/ledger.sqlite
  flame-orchestrator --database postgresql://flame@db/flame
  flame-orchestrator --keep-days 7 --keep-calls 2000000

SIGTERM and Ctrl-C end it; what is not written down yet waits in the broker. The broker and key come
from FLAME_BROKER_URL and FLAME_KEY, or from flame.yaml; `flame config` prints what applies.
"""


def main(argv: list[str] | None = None) -> int:
    """Run an orchestrator until it is told to leave; the return value is the exit code."""
    arguments = _parser().parse_args(argv)
    show_logs(verbose=arguments.verbose)
    try:
        asyncio.run(_serve(_settings(arguments), arguments))
    except ConfigError as problem:
        return _complain(problem, EXIT_CONFIG)
    except BrokerUnavailable as problem:
        return _complain(problem, EXIT_UNAVAILABLE)
    except FlameError as problem:
        return _complain(problem, EXIT_FAILED)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flame-orchestrator",
        description="Keep the story of every call for `flame ps`, `show` and `result`, what it\n"
        "prints for `flame logs`, and the calls that need time: those to be tried again, later,\n"
        "once, or on a schedule.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    name = f"flame-orchestrator {version('flame')}"
    parser.add_argument("--version", action="version", version=name)
    parser.add_argument("--broker", help="broker URL, instead of FLAME_BROKER_URL")
    parser.add_argument("--database", help="database URL, instead of FLAME_DATABASE_URL")
    parser.add_argument(
        "--keep-days",
        type=float,
        default=30.0,
        help="forget ended calls after so long (%(default)g)",
    )
    parser.add_argument(
        "--keep-calls",
        type=int,
        default=10_000_000,
        help="forget the oldest ended calls beyond so many (%(default)s)",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        default=30.0,
        metavar="SECONDS",
        help="give what a worker runs to others after so long a silence, at least 5 (%(default)g)",
    )
    parser.add_argument(
        "--keep-log",
        type=_size,
        default="10m",
        metavar="SIZE",
        help="keep so much of what one call prints (%(default)s); 0: nothing",
    )
    parser.add_argument("--store", help="store URL for large logs, instead of FLAME_STORE_URL")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step")
    return parser


def _lease(text: str) -> float:
    seconds = float(text)
    if not _SHORTEST_LEASE_S <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected {_SHORTEST_LEASE_S:g} seconds or more")
    return seconds


def _size(text: str) -> int:
    try:
        return ResourceRequirement.from_string(f"mem={text}").mem_bytes
    except ResourceError as problem:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 10m") from problem


def _settings(arguments: argparse.Namespace) -> Settings:
    configured = load(broker=arguments.broker, store=arguments.store)
    if configured.broker_url is None:
        raise ConfigError(
            "no broker is configured: set FLAME_BROKER_URL, or pass --broker amqp://host/"
        )
    return configured


async def _serve(configured: Settings, arguments: argparse.Namespace) -> None:
    try:
        from flame_orchestrator.daemon import Orchestrator, OrchestratorSettings
        from flame_orchestrator.database import default_url
    except ModuleNotFoundError as exc:
        raise ConfigError(f'{exc}: install "flame[orchestrator]"') from exc
    url = arguments.database or configured.database_url or default_url(configured.home)
    settings = OrchestratorSettings(
        broker_url=configured.broker_url or "",
        keyring=configured.keyring,
        database_url=url,
        keep=timedelta(days=arguments.keep_days),
        keep_calls=arguments.keep_calls,
        lease_s=arguments.lease,
        keep_log_bytes=arguments.keep_log,
        store_url=configured.store_url,
    )
    orchestrator = Orchestrator(settings)
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    try:
        await orchestrator.start()
        await leave.wait()
    finally:
        await orchestrator.stop()


def _complain(problem: FlameError, code: int) -> int:
    sys.stderr.write(f"flame-orchestrator: {problem}\n")
    return code
