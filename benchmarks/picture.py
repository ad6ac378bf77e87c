"""The table as one picture: how much of each bar is used up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.table import Row

MET, MISSED = "#5b9a68", "#c8553d"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows that have a bar; shorter is better, and 1 is the limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    barred = [(row, row.bar) for row in rows if row.bar is not None and row.figure > 0]
    used = [bar / row.figure if row.at_least else row.figure / bar for row, bar in barred]
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(barred) + 1.2))
    places = range(len(barred), 0, -1)
    colours = [MET if row.met else MISSED for row, _ in barred]
    axes.barh(places, used, color=colours, height=0.6)
    axes.axvline(1.0, color="#333333", linestyle="--", linewidth=1)
    axes.set_yticks(places, [row.what.replace("`", "") for row, _ in barred], fontsize=8)
    for place, share, (row, bar) in zip(places, used, barred, strict=True):
        sign = "≥" if row.at_least else "≤"
        label = f" {row.figure:.3g} {row.unit} ({sign} {bar:g})"
        axes.text(share, place, label, va="center", fontsize=8)
    axes.set_xlim(0, max(1.3, *used) * 1.25)
    axes.set_xlabel("share of the limit that is used; 1 is the limit")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
