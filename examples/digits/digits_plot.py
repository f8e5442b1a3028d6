"""The picture at the end of the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

_COLOURS = ("#e4572e", "#17889c", "#f3a712", "#6a4c93", "#4c956c", "#3a506b")
_INK = "#2b2d42"
_SHOWN_MISTAKES = 12
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#c9ccd6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(path: Path, trials: list[Any], grid: Any, best: Any, mistakes: list[Any]) -> None:
    """Draw trials, the winner's grid, and what the winner misreads."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 7.4), dpi=130, layout="constrained", facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=(2.7, 1))
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        left, right = top.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_trials(left, trials, best)
        _draw_grid(right, trials, grid, best)
        _draw_mistakes(bottom, mistakes, best)
        figure.savefig(path)


def _draw_trials(axes: Any, trials: list[Any], best: Any) -> None:
    """Errors against the time of a fit, a dot for each trial; better is higher."""
    for model, colour in zip(dict.fromkeys(t.model for t in trials), _COLOURS, strict=False):
        mine = [trial for trial in trials if trial.model == model]
        times, errors = zip(*((t.fit_s * 1000, 1 - t.accuracy) for t in mine), strict=True)
        axes.scatter(times, errors, s=46, color=colour, alpha=0.85, edgecolor="white", label=model)
    place = best.fit_s * 1000, 1 - best.accuracy
    axes.scatter(*place, s=150, facecolor="none", edgecolor=_INK, linewidth=1.4)
    axes.annotate(
        f"best: {best.accuracy:.2%}", place, (8, 9), textcoords="offset points", weight="bold"
    )
    axes.set(xscale="log", yscale="log", title=f"{len(trials)} trials: misread digits and time")
    axes.set(xlabel="milliseconds of one fit", ylabel="misread", ylim=(1.05, 0.0065))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color="#eceef3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower left")


def _draw_grid(axes: Any, trials: list[Any], grid: Any, best: Any) -> None:
    """The winning model's grid, if two parameters were varied."""
    if len(grid.varied) != 2:
        axes.set_axis_off()
        return
    rows, columns = grid.varied
    values = np.full((len(grid.parameters[rows]), len(grid.parameters[columns])), np.nan)
    for trial in trials:
        if trial.model == best.model:
            row = list(grid.parameters[rows]).index(trial.parameters[rows])
            column = list(grid.parameters[columns]).index(trial.parameters[columns])
            values[row, column] = trial.accuracy
    shade = -np.log(np.maximum(1 - values, 1e-3))
    axes.imshow(shade, cmap="YlGnBu", aspect="auto", origin="lower", alpha=0.9)
    middle = (np.nanmin(shade) + np.nanmax(shade)) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if shade[row, column] > middle else _INK
        axes.text(column, row, f"{value:.1%}", ha="center", va="center", color=colour, size=8)
    axes.set_xticks(range(values.shape[1]), map(str, grid.parameters[columns]))
    axes.set_yticks(range(values.shape[0]), map(str, grid.parameters[rows]))
    axes.set(xlabel=columns, ylabel=rows, title=f"{best.model}: accuracy by {rows} and {columns}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_mistakes(figure: Any, mistakes: list[Any], best: Any) -> None:
    """What the best trial misreads."""
    chosen = ", ".join(f"{name}={value}" for name, value in best.parameters.items())
    figure.suptitle(
        f"Misread by the best trial ({best.model}, {chosen}: {best.accuracy:.2%})",
        x=0.012,
        ha="left",
        size=10,
        weight="bold",
    )
    for axes, mistake in zip(
        figure.subplots(1, _SHOWN_MISTAKES), [*mistakes, *[None] * _SHOWN_MISTAKES], strict=False
    ):
        axes.set_axis_off()
        if mistake is not None:
            pixels, label, guess = mistake
            axes.imshow(np.asarray(pixels).reshape(8, 8), cmap="Greys", interpolation="nearest")
            axes.set_title(f"{label} read as {guess}", loc="center", size=8, weight="normal", pad=4)
