"""Measures Flame and its peers side by side on this machine: `make bench`.

Starts its own RabbitMQ node and S3 server, runs every system in a process of its own with two
worker processes each, and writes a table, the numbers and a chart. A full run takes about ten
minutes, `--quick` about three.

Examples:
    python benchmarks/run.py --quick
    python benchmarks/run.py --only flame,celery,amqp-echo --figures sequential,futures
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import psutil  # noqa: E402 - the folders above come first

from acceptance import UNKNOWN, Results, acceptance  # noqa: E402 - the folders above come first
from combine import Figures, combine  # noqa: E402
from lab.processes import Process  # noqa: E402
from machine import machine_facts  # noqa: E402
from measure import FIGURES, Settings  # noqa: E402
from processes import adopt_orphans, descendants, kill_left_behind  # noqa: E402
from report import acceptance_table, report  # noqa: E402
from services import Services, peers_python, services  # noqa: E402

OWN_FIGURES = (
    "mixed",
    "beside_map",
    "array_256m",
    "worker_ready",
    "import_flame",
    "flame_help",
    "history",
    "tracked",
    "delayed",
    "lost_workers",
    "heartbeats",
)
REPEATED = ("cold", "sequential", "futures")
PACKED = ("cold", "futures", "map_100k", "map_1m")
DRIVER_LIMIT_S = 900.0

SYSTEMS = {
    "flame": "own",
    "flame-embedded": "own",
    "celery": "peers",
    "ray": "peers",
    "parsl": "peers",
    "dask": "peers",
    "process-pool": "peers",
    "amqp-echo": "peers",
    "amqp-echo-packed": "peers",
}
"""Every system and the environment it runs in; its module is `systems/<name with _>.py`."""

FULL = Settings(figures=(*FIGURES, *OWN_FIGURES))
QUICK = Settings(
    figures=tuple(name for name in FULL.figures if name not in ("map_1m", "payload_256m")),
    cold_calls=2_000,
    sequential_calls=300,
    sequential_limit_s=2.0,
    futures_calls=2_000,
    futures_repeats=2,
    futures_limit_s=2.0,
    map_limit_s=6.0,
    payload_limit_s=1.0,
    idle_s=2.0,
    nap_s=2.5,
    history_calls=100_000,
    delayed_calls=5_000,
    delayed_s=8.0,
    long_nap_s=1.0,
    figure_limit_s=150.0,
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run's choices."""

    systems: tuple[str, ...]
    settings: Settings
    rounds: int
    out: Path
    mode: str
    partial: bool = False


def parse(arguments: list[str] | None = None) -> Run:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer calls, one round")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(SYSTEMS)}")
    parser.add_argument("--figures", metavar="NAMES", help=f"some of {','.join(FULL.figures)}")
    parser.add_argument("--rounds", type=int, help="how often each system is measured")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else FULL
    if given.figures:
        chosen = choose(parser, given.figures, FULL.figures)
        settings = dataclasses.replace(settings, figures=chosen)
    systems = choose(parser, given.only, tuple(SYSTEMS)) if given.only else tuple(SYSTEMS)
    rounds = given.rounds or (1 if given.quick else 2)
    return Run(
        systems,
        settings,
        rounds,
        given.out,
        "quick" if given.quick else "full",
        partial=bool(given.only or given.figures),
    )


def choose(parser: argparse.ArgumentParser, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Split a list of names and refuse the unknown."""
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return names


def settings_for(run: Run, system: str, at: int) -> Settings:
    """What one driver measures: everything in the first round, the core figures later."""
    figures = run.settings.figures
    if at > 0:
        figures = tuple(name for name in figures if name in REPEATED)
    if system == "amqp-echo-packed":
        figures = tuple(name for name in figures if name in PACKED)
    return dataclasses.replace(run.settings, figures=figures)


def driver_environment(python: Path, workdir: Path) -> dict[str, str]:
    """The driver finds our modules by path, and its own environment's programs first."""
    return {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "FLAME_HOME": str(workdir / "home"),
        "HOME": str(workdir),
    }


def drive(name: str, settings: Settings, lab: dict[str, Any], python: Path) -> Figures:
    """Run one driver to its end, kill what it left behind, and return its figures."""
    workdir = Path(tempfile.mkdtemp(prefix="fb-"))
    wanted, written = workdir / "settings.json", workdir / "figures.json"
    data = {"lab": {**lab, "workdir": str(workdir)}, "settings": dataclasses.asdict(settings)}
    wanted.write_text(json.dumps(data))
    command = [str(python), "-m", "measure", name.replace("-", "_"), str(wanted), str(written)]
    known = descendants()
    driver = Process(command, env=driver_environment(python, workdir), cwd=workdir)
    try:
        return await_driver(driver, written)
    finally:
        driver.close()
        if left := kill_left_behind(known):
            print(f"  {name} left {left} processes behind; killed", flush=True)
        shutil.rmtree(workdir, ignore_errors=True)


def await_driver(driver: Process, written: Path) -> Figures:
    """Wait for a driver within its limit; without figures, its output is the failure's text."""
    try:
        driver.wait(DRIVER_LIMIT_S)
    except AssertionError as late:
        return {"start": {"failed": str(late)[-300:]}}
    if not written.exists():
        return {"start": {"failed": driver.output().strip()[-300:]}}
    figures: Figures = json.loads(written.read_text())
    return figures


def turns(run: Run) -> Iterator[tuple[int, str]]:
    """Rounds and systems, interleaved; every second round goes backwards."""
    for at in range(run.rounds):
        ordered = run.systems if at % 2 == 0 else run.systems[::-1]
        for system in ordered:
            if settings_for(run, system, at).figures:
                yield at, system


def busy_cores() -> float:
    """How many cores are in use now, while nothing of ours works: the noise in what follows."""
    return psutil.cpu_percent(interval=0.5) / 100 * (os.cpu_count() or 1)


def measure_systems(run: Run, ready: Services, noise: list[float]) -> dict[str, list[Figures]]:
    """All rounds of all systems; `noise` collects how busy the machine was before each."""
    pythons = {"own": Path(sys.executable), "peers": peers_python()}
    vhosts = {system: ready.rabbit.vhost(system) for system in run.systems}
    rounds: dict[str, list[Figures]] = {system: [] for system in run.systems}
    for at, system in turns(run):
        noise.append(busy_cores())
        started = time.monotonic()
        lab = {
            "amqp_url": vhosts[system],
            "store_url": ready.store_url(),
            "s3_endpoint": ready.s3.endpoint,
        }
        figures = drive(system, settings_for(run, system, at), lab, pythons[SYSTEMS[system]])
        rounds[system].append(figures)
        took_s = time.monotonic() - started
        print(f"round {at + 1}: {system} ({took_s:.0f} s){complaints(figures)}", flush=True)
    return rounds


def complaints(figures: Figures) -> str:
    """What failed, for the console; what was skipped is in the table."""
    failed = [f"{name}: {f['failed']}" for name, f in figures.items() if "failed" in f]
    return "".join(f"\n  failed: {text}" for text in failed)


def write(run: Run, results: Results, machine: dict[str, Any]) -> str:
    """Write table, numbers and chart; return the acceptance table, of a partial run in part."""
    from chart import chart

    outcomes = acceptance(results)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "results.md").write_text(report(results, outcomes, machine, run.mode))
    numbers = {
        "mode": run.mode,
        "rounds": run.rounds,
        "machine": machine,
        "results": results,
        "acceptance": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    (run.out / "results.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    chart(results, run.out, f"{machine['cores']} cores, {machine['cpu']}, {run.mode} run")
    known = [outcome for outcome in outcomes if outcome.reached != UNKNOWN]
    return acceptance_table(known if run.partial else outcomes)


def main() -> None:
    """Measure, write, and print the acceptance table."""
    run = parse()
    adopt_orphans()
    started = time.monotonic()
    with services() as ready:
        noise: list[float] = []
        rounds = measure_systems(run, ready, noise)
        machine = {**machine_facts(ready.rabbit), "busy_cores": statistics.median(noise)}
    results = {system: combine(figures) for system, figures in rounds.items() if figures}
    table = write(run, results, machine)
    print(f"\n{(run.out / 'results.md').read_text().split('## Targets')[0]}")
    print(table)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
