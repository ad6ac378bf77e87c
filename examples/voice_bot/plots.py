"""The measurement in pictures: how long callers waited, and one turn on a timeline."""

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.voice_bot.arms import (
    ARMS,
    AT_FINAL,
    EMBEDDING,
    FLOOR,
    FROM_PARTIALS,
    OFF,
    PLAIN_TASK,
)
from examples.voice_bot.experiment import Result, Span, Turn

GREY, GREEN, RED, BLUE, INK = "#8a8f98", "#5b9a68", "#c8553d", "#4f7cac", "#333333"
ORANGE, VIOLET = "#d69a3c", "#8d6a9f"
PALE_GREEN = "#c4dcc9"
_COLOURS = {
    OFF: RED,
    EMBEDDING: ORANGE,
    PLAIN_TASK: VIOLET,
    AT_FINAL: BLUE,
    FROM_PARTIALS: GREEN,
    FLOOR: GREY,
}


def distributions(result: Result, arms: Sequence[str] = ARMS) -> Figure:
    """How long each caller waited for the first audio: a dot for each turn, a row for each arm."""
    figure = Figure(figsize=(9, 0.75 * len(arms) + 1.1), layout="constrained")
    axes = figure.subplots()
    dice = random.Random(1)
    for row, arm in enumerate(arms):
        seconds = [turn.first_audio for turn in result.of(arm)]
        heights = [row + dice.uniform(-0.22, 0.22) for _ in seconds]
        axes.scatter(seconds, heights, s=14, color=_COLOURS[arm], alpha=0.55, linewidths=0)
        median = statistics.median(seconds)
        axes.plot([median, median], [row - 0.32, row + 0.32], color=INK, linewidth=2)
        axes.annotate(
            f"{median:.2f} s",
            (median, row - 0.34),
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.7)
    axes.set_xlabel(
        "seconds from the final transcript to FIRST AUDIO PLAYED; the line is the median"
    )
    _plain(axes)
    return figure


def timeline(result: Result, arms: Sequence[str] = ARMS, question: str | None = None) -> Figure:
    """What happened when in one turn, a row for each arm, counted from the final transcript.

    Args:
        result: The measurement.
        arms: The rows.
        question: Whose turn; by default one whose embedding is slow and was begun at a partial
            transcript.
    """
    question = question or slow_question(result)
    turns = {turn.arm: turn for turn in result.turns if turn.question == question}
    figure = Figure(figsize=(9, 0.95 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    shown = [turns[arm] for arm in arms]
    for row, turn in enumerate(shown):
        _draw(axes, row, turn)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0.9)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.45, -0.75)
    calls = [span for turn in shown for span in (*turn.calls, *turn.guesses)]
    first_call = min((span.began for span in calls), default=0.0)
    axes.set_xlim(min(-0.2, first_call - 0.05), max(turn.first_audio for turn in shown) * 1.15)
    slowest = max(turn.embedding + turn.after_embedding for turn in turns.values())
    axes.set_xlabel("seconds from the final transcript")
    axes.set_title(f"One turn; embedding and search take {slowest:.2f} s", fontsize=11, loc="left")
    axes.legend(
        handles=[
            Patch(color=GREY, label="pause, filler"),
            Patch(color=GREEN, label="embedding, hidden"),
            Patch(color=RED, label="waited for"),
            Patch(color=PALE_GREEN, label="of other partials"),
            Patch(color=BLUE, label="LLM, speech"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.06 - 0.3 / len(arms)),
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    _plain(axes)
    return figure


def slow_question(result: Result) -> str:
    """A question that shows what there is to see: a slow embedding, foretold by a partial."""
    turns = result.of(FROM_PARTIALS)
    foretold = [turn for turn in turns if turn.lead > 0] or turns
    ordered = sorted(foretold, key=lambda turn: turn.embedding)
    return ordered[math.floor(0.95 * (len(ordered) - 1))].question


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    figure.savefig(path, dpi=130)


def _draw(axes: Axes, row: int, turn: Turn) -> None:
    """One turn: above, what the caller lives through; below, the model's calls."""
    spoken_until = turn.query.began
    _bar(axes, row - 0.2, Span(0.0, spoken_until), GREY)
    _bar(axes, row - 0.2, turn.query, RED)
    _bar(axes, row - 0.2, Span(turn.query.ended, turn.first_audio), BLUE)
    axes.plot([turn.first_audio], [row - 0.2], marker="v", color=INK, markersize=7, clip_on=False)
    axes.annotate(
        f"{turn.first_audio:.2f} s",
        (turn.first_audio, row - 0.2),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )
    for guess in turn.guesses:
        _bar(axes, row + 0.2, guess, PALE_GREEN)
    for call in turn.calls:
        _bar(axes, row + 0.2, Span(call.began, min(call.ended, turn.query.began)), GREEN)
        _bar(axes, row + 0.2, Span(max(call.began, turn.query.began), call.ended), RED)


def _bar(axes: Axes, at: float, span: Span, colour: str) -> None:
    if span.seconds > 0:
        axes.barh(
            at,
            span.seconds,
            left=span.began,
            height=0.34,
            color=colour,
            edgecolor="white",
            linewidth=0.8,
        )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
