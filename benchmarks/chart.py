"""Draws the chart that the README shows: four panels of bars, one bar for each system."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from acceptance import Results
from combine import Figure, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PEERS, FLOOR, INK = "#d1495b", "#8d99ae", "#c9cfd9", "#2b2d42"
LABELS = {
    "flame": "Flame",
    "flame-embedded": "Flame embedded",
    "celery": "Celery",
    "ray": "Ray",
    "parsl": "Parsl HTEX",
    "dask": "Dask distributed",
    "process-pool": "ProcessPoolExecutor",
    "amqp-echo": "bare AMQP echo",
}


def total_pss_mb(figure: Figure) -> float:
    """Memory of all the system's processes, shared pages counted once."""
    return float(sum(p["pss_bytes"] for role in figure.values() for p in role)) / 1e6


PANELS: list[tuple[str, str, Callable[[Figure], float], bool]] = [
    ("Separate futures, calls/s, log scale (more is better)", "futures", lambda f: f["rate"], True),
    (
        "One call at a time, ms, log scale (less is better)",
        "sequential",
        lambda f: f["p50_ms"],
        True,
    ),
    ("1 MiB there and back, ms, log scale (less is better)", "payload_1m", lambda f: f["ms"], True),
    ("Memory of all processes, MB (less is better)", "memory", total_pss_mb, False),
]


def colour(system: str) -> str:
    """Ours stands out; what has no pool of workers steps back."""
    if system.startswith("flame"):
        return OURS
    return FLOOR if system == "amqp-echo" else PEERS


def text(value: float) -> str:
    """A value as its bar's label."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_panel(
    axes: Axes, results: Results, title: str, name: str, value: Callable[[Figure], float], log: bool
) -> None:
    """One panel, in the order of the systems' list."""
    shown = {
        system: value(results[system][name])
        for system in LABELS
        if measured(results.get(system, {}).get(name))
    }
    if not shown:
        axes.set_axis_off()
        return
    bars = axes.barh(
        [LABELS[system] for system in shown], list(shown.values()), color=[colour(s) for s in shown]
    )
    axes.bar_label(bars, labels=[text(v) for v in shown.values()], padding=4, color=INK, fontsize=9)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=10 ** math.floor(math.log10(min(shown.values()) * 0.999)))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def chart(results: Results, folder: Path, subtitle: str) -> None:
    """Write `chart.svg` and `chart.png`."""
    mpl.rcParams["svg.hashsalt"] = "flame"
    figure, grid = plt.subplots(2, 2, figsize=(11, 6.6), layout="constrained")
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        draw_panel(axes, results, *panel)
    figure.suptitle(f"No-op calls on two worker processes\n{subtitle}", fontsize=11, color=INK)
    figure.savefig(folder / "chart.svg", metadata={"Date": None})
    figure.savefig(folder / "chart.png", dpi=150)
    plt.close(figure)
