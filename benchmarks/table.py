"""The rows of the benchmark's table, and how times are compared in one run."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured.
        figure: The figure that the bar is about.
        unit: `x` for a ratio, else the unit.
        bar: The limit; None where there is none.
        at_least: Whether the bar is a lower limit.
        detail: The absolute figures behind it.
    """

    what: str
    figure: float
    unit: str
    bar: float | None
    detail: str
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        if self.bar is None:
            return None
        return self.figure >= self.bar if self.at_least else self.figure <= self.bar


def seconds(function: Callable[[], object]) -> float:
    """Return what one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def best_of_interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return each function's best time in seconds, over rounds that take turns.

    Turns meet the same noise; the best of many is what the code takes when nothing disturbs it.
    """
    best = [float("inf")] * len(functions)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for i, function in enumerate(functions):
                best[i] = min(best[i], seconds(function))
    finally:
        gc.enable()
    return best


def quantile(values: Sequence[float], q: float) -> float:
    """Return the `q`-quantile of `values`, the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def render(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | measured | bar | met | detail |", "| --- | ---: | ---: | :---: | --- |"]
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        bar = "" if row.bar is None else f"{sign} {row.bar:g} {row.unit}"
        met = {True: "yes", False: "NO", None: ""}[row.met]
        lines.append(f"| {row.what} | {row.figure:.3g} {row.unit} | {bar} | {met} | {row.detail} |")
    return "\n".join(lines)
