"""Writes the figures as Markdown: two tables of systems, the notes, the acceptance table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acceptance import Outcome, Results
from combine import Figure, Figures, measured

Cell = Callable[[Figure], str]


def number(key: str, *, scale: float = 1.0) -> Cell:
    """A cell with one number, in as many digits as are worth reading."""

    def cell(figure: Figure) -> str:
        value = float(figure[key]) / scale
        if abs(value) < 1e-3:
            return "0"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return cell


def pss_mb(figure: Figure) -> str:
    """Memory of all the system's processes, shared pages counted once."""
    total = sum(process["pss_bytes"] for role in figure.values() for process in role)
    return f"{total / 1e6:.0f}"


def largest_worker_mb(figure: Figure) -> str:
    """Resident memory of the largest process that runs calls."""
    processes = figure.get("child") or figure.get("worker") or []
    return f"{max((p['rss_bytes'] for p in processes), default=0) / 1e6:.0f}"


CALLS: dict[str, tuple[str, Cell]] = {
    "start-up, s": ("start", number("seconds")),
    "one call at a time, p50, ms": ("sequential", number("p50_ms")),
    "p99, ms": ("sequential", number("p99_ms")),
    "separate futures, /s": ("futures", number("rate")),
    "best, /s": ("futures", number("best")),
    "cold burst, /s": ("cold", number("rate")),
    "map of 100,000, /s": ("map_100k", number("rate")),
    "map of 1,000,000, /s": ("map_1m", number("rate")),
}
RESOURCES: dict[str, tuple[str, Cell]] = {
    "1 KiB there and back, ms": ("payload_1k", number("ms")),
    "1 MiB, ms": ("payload_1m", number("ms")),
    "256 MiB, ms": ("payload_256m", number("ms")),
    "1 ms calls, % of ideal": ("nap_1ms", number("efficiency", scale=0.01)),
    "5 ms calls, % of ideal": ("nap_5ms", number("efficiency", scale=0.01)),
    "20 ms calls, % of ideal": ("nap_20ms", number("efficiency", scale=0.01)),
    "100 ms calls, % of ideal": ("nap_100ms", number("efficiency", scale=0.01)),
    "memory of all, MB (PSS)": ("memory", pss_mb),
    "largest worker, MB (RSS)": ("memory", largest_worker_mb),
    "idle, % of a core": ("idle", number("total_cores", scale=0.01)),
}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *rows])


def cell_text(figures: Figures, name: str, cell: Cell, notes: list[str], system: str) -> str:
    """One cell: the number, or a reference to the note that says why there is none."""
    figure = figures.get(name)
    if figure is None:
        return ""
    if measured(figure):
        return cell(figure)
    reason = figure.get("skipped") or f"failed: {figure['failed']}"
    note = f"{system}, {name}: {reason}"
    if note not in notes:
        notes.append(note)
    return f"[{notes.index(note) + 1}]"


def systems_table(results: Results, columns: dict[str, tuple[str, Cell]], notes: list[str]) -> str:
    """One row for each system."""
    rows = [
        [system, *(cell_text(figures, *column, notes, system) for column in columns.values())]
        for system, figures in results.items()
    ]
    return markdown_table(["", *columns], rows)


def acceptance_table(outcomes: list[Outcome]) -> str:
    """The targets and what this run reached."""
    rows = [[o.what, o.target, o.measured, o.reached] for o in outcomes]
    return markdown_table(["", "target", "measured", "reached"], rows)


def machine_text(machine: dict[str, Any]) -> str:
    """One sentence about the machine and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB"
    others = f"Before each system's turn other programs used {machine['busy_cores']:.2g} cores"
    return f"{facts}, Linux {machine['kernel']}. {versions}. {others} (median)."


def method_text(results: Results) -> str:
    """What the figures mean, with the counts of this run."""
    counts = {name: figure_calls(results, name) for name in ("futures", "cold")}
    return (
        "Two worker processes each (Flame embedded: one a core); the bare echo has one server "
        "process and runs nothing, packed with 64 calls in a message. Separate futures: the "
        f"median of bursts of {counts['futures']} no-op calls, each with a future of its own. "
        f"Cold burst: the first {counts['cold']} calls of a new client and of a target that was "
        "never called, connecting included, modules loaded. Maps batch as each system's own map "
        "does, 64 a chunk. Start-up: until the workers are ready. Idle: all processes but the "
        "broker."
    )


def figure_calls(results: Results, name: str) -> str:
    """How many calls a figure was made of, at most."""
    calls = [figures[name]["calls"] for figures in results.values() if measured(figures.get(name))]
    return f"{int(max(calls, default=0)):,}"


def report(results: Results, outcomes: list[Outcome], machine: dict[str, Any], mode: str) -> str:
    """The whole page."""
    notes: list[str] = []
    tables = [systems_table(results, columns, notes) for columns in (CALLS, RESOURCES)]
    parts = [
        "# Benchmark results",
        f"One run on one machine ({mode}): {machine_text(machine)}",
        method_text(results),
        "## Calls",
        tables[0],
        "## Payloads and resources",
        tables[1],
        "\n".join(f"{at}. {note}" for at, note in enumerate(notes, 1)),
        "## Targets",
        acceptance_table(outcomes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
