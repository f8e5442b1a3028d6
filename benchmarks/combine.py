"""Puts the rounds of one system together: medians of numbers, all repeats of lists."""

from __future__ import annotations

import statistics
from typing import Any

Figure = dict[str, Any]
Figures = dict[str, Figure]


def measured(figure: Figure | None) -> bool:
    """Whether the figure holds numbers, and neither a reason nor an error."""
    return bool(figure) and "skipped" not in figure and "failed" not in figure  # type: ignore[operator]


def merge_values(values: list[Any]) -> Any:
    """The median of numbers, all elements of lists of numbers, else the first value."""
    first = values[0]
    if isinstance(first, int | float) and not isinstance(first, bool):
        return statistics.median(values)
    if isinstance(first, list) and all(isinstance(item, float) for item in first):
        return [item for value in values for item in value]
    return first


def merge(figures: list[Figure]) -> Figure:
    """One figure out of several rounds; a failed round counts only when all have failed."""
    good = [figure for figure in figures if measured(figure)]
    if not good:
        return figures[0]
    merged = {key: merge_values([figure[key] for figure in good]) for key in good[0]}
    if "rates" in merged:
        merged["rate"] = statistics.median(merged["rates"])
        merged["best"] = max(merged["rates"])
    return merged


def combine(rounds: list[Figures]) -> Figures:
    """All figures of one system out of its rounds."""
    names = {name: None for one in rounds for name in one}
    return {name: merge([one[name] for one in rounds if name in one]) for name in names}
