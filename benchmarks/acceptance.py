"""The targets of the engine, each computed from the figures of one run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from combine import Figures, measured

Results = dict[str, Figures]
MB = 1_000_000
UNKNOWN = "–"
EMBEDDED = "flame-embedded"

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "≥": operator.ge,
    ">": operator.gt,
    "≤": operator.le,
    "<": operator.lt,
}


class NotMeasured(Exception):
    """A figure that a target needs is missing in this run."""


@dataclass(frozen=True, slots=True)
class Target:
    """One target: what is compared with what."""

    what: str
    comparison: str
    limit: float
    unit: str
    value: Callable[[Results], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the acceptance table."""

    what: str
    target: str
    measured: str
    reached: str


def figure(results: Results, system: str, name: str) -> dict[str, Any]:
    """The figure of one system, which must hold numbers."""
    found = results.get(system, {}).get(name)
    if found is None or not measured(found):
        raise NotMeasured(f"{system} {name}")
    return found


def times(name: str, key: str, other: str) -> Callable[[Results], float]:
    """How many times Flame has what another system has."""

    def ratio(results: Results) -> float:
        return float(figure(results, "flame", name)[key] / figure(results, other, name)[key])

    return ratio


def plain(
    name: str, key: str, *, scale: float = 1.0, system: str = "flame"
) -> Callable[[Results], float]:
    """One number, divided by `scale`."""
    return lambda results: float(figure(results, system, name)[key]) / scale


def over_ideal(name: str) -> Callable[[Results], float]:
    """Elapsed time over the time that perfect packing takes."""

    def ratio(results: Results) -> float:
        found = figure(results, "flame", name)
        return float(found["seconds"] / found["ideal_s"])

    return ratio


def resident_mb(role: str) -> Callable[[Results], float]:
    """Resident memory of the largest process of a role."""

    def largest(results: Results) -> float:
        processes = figure(results, "flame", "memory").get(role)
        if not processes:
            raise NotMeasured(f"no process in the role {role}")
        return max(float(process["rss_bytes"]) for process in processes) / MB

    return largest


def idle_percent(results: Results) -> float:
    """Share of a core that an idle worker uses, its children included."""
    cores = figure(results, "flame", "idle")["cores"]
    return 100.0 * float(cores["worker"] + cores["child"])


TARGETS = [
    Target("separate futures, warm / Celery", "≥", 50, "×", times("futures", "rate", "celery")),
    Target("separate futures, warm / Ray", "≥", 25, "×", times("futures", "rate", "ray")),
    Target("separate futures, warm / pool", "≥", 4, "×", times("futures", "rate", "process-pool")),
    Target("separate futures, cold / Celery", "≥", 15, "×", times("cold", "rate", "celery")),
    Target("sequential p50 / bare echo", "≤", 1.5, "×", times("sequential", "p50_ms", "amqp-echo")),
    Target("sequential p50 / Celery", "<", 1, "×", times("sequential", "p50_ms", "celery")),
    Target("sequential p50 / Ray", "<", 1, "×", times("sequential", "p50_ms", "ray")),
    Target("map over 1,000,000", "≥", 100_000, "/s", plain("map_1m", "rate")),
    Target("client growth in it", "<", 200, "MB", plain("map_1m", "client_growth_bytes", scale=MB)),
    Target("embedded futures", "≥", 10_000, "/s", plain("futures", "rate", system=EMBEDDED)),
    Target("256 MiB array: downloads", "≤", 1.05, "", plain("array_256m", "downloads")),
    Target("a child's growth", "<", 20, "MB", plain("array_256m", "child_growth_bytes", scale=MB)),
    Target("whole / plain boto3", "≤", 1.5, "×", plain("array_256m", "times_plain")),
    Target("calls of 100 ms on 2 slots / ideal", "≤", 1.03, "×", over_ideal("nap_100ms")),
    Target("1 ms calls, 1 % of 5 s, 2 × 2 slots / ideal", "≤", 1.10, "×", over_ideal("mixed")),
    Target("a call beside another client's map", "<", 2, "s", plain("beside_map", "worst_s")),
    Target("futures with an orchestrator", "≥", 0.85, "× without", plain("tracked", "kept")),
    Target("calls written into the history", "≥", 20_000, "/s", plain("history", "rate")),
    Target("flame ps over them", "<", 300, "ms", plain("history", "ps_ms")),
    Target("delayed calls: start after due, p99", "≤", 100, "ms", plain("delayed", "late_p99_ms")),
    Target("orchestrator's memory", "<", 300, "MB", plain("delayed", "peak_bytes", scale=MB)),
    Target("worker killed: its call elsewhere", "<", 1, "s", plain("lost_workers", "closed_s")),
    Target("worker silent: its call elsewhere", "<", 15, "s", plain("lost_workers", "silent_s")),
    Target("the same with a lease", "<", 40, "s", plain("lost_workers", "leased_s")),
    Target(
        "1,000 workers' heartbeats", "<", 30, "% of a core",
        plain("heartbeats", "cores", scale=0.01),
    ),
    Target("worker idle, children included", "<", 1, "% of a core", idle_percent),
    Target("worker's memory (RSS)", "<", 80, "MB", resident_mb("worker")),
    Target("child's memory (RSS)", "<", 45, "MB", resident_mb("child")),
    Target("worker ready", "<", 1.5, "s", plain("worker_ready", "seconds")),
    Target("import flame", "<", 100, "ms", plain("import_flame", "ms")),
    Target("flame --help", "<", 250, "ms", plain("flame_help", "ms")),
]  # fmt: skip


def judge(target: Target, results: Results) -> Outcome:
    """Compute one line."""
    wanted = f"{target.comparison} {target.limit:,g} {target.unit}".strip()
    try:
        value = target.value(results)
    except NotMeasured as missing:
        return Outcome(target.what, wanted, f"not measured ({missing})", UNKNOWN)
    shown = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
    reached = COMPARISONS[target.comparison](value, target.limit)
    shown = f"{shown} {target.unit}".strip()
    return Outcome(target.what, wanted, shown, "yes" if reached else "no")


def acceptance(results: Results) -> list[Outcome]:
    """The whole table."""
    return [judge(target, results) for target in TARGETS]
