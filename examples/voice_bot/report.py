"""What the measurement found: the table, one sentence, and JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.voice_bot.arms import ARMS, AT_FINAL, FLOOR, FROM_PARTIALS, OFF
from examples.voice_bot.experiment import Result, Turn

BEYOND_LIMIT_BAR = 0.010
"""Seconds that the mean exposed retrieval may lie above its limit."""

FLOOR_BAR = 0.05
"""By how much the median may lie above that of the same bot without retrieval, as a share of it."""


@dataclass(frozen=True)
class Summary:
    """One arm in figures; times in seconds.

    Attributes:
        turns: Number of turns.
        first_audio_median: Median of FIRST AUDIO PLAYED.
        first_audio_p95: Its 95th percentile.
        first_audio_p99: Its 99th percentile.
        exposed_mean: Mean of what the chain waited for its documents.
        limit_mean: Mean of ``max(0, work - head start)`` over the same turns.
        fillers: Share of the turns in which the filler was played.
        foretold: Share of the turns whose final text a partial transcript had prefetched.
        model_calls: Calls to the embedding model per turn.
        searches: Searches per turn.
    """

    turns: int
    first_audio_median: float
    first_audio_p95: float
    first_audio_p99: float
    exposed_mean: float
    limit_mean: float
    fillers: float
    foretold: float
    model_calls: float
    searches: float


def summarise(result: Result, arm: str) -> Summary:
    """One arm in figures."""
    turns = result.of(arm)
    first_audio = [turn.first_audio for turn in turns]
    return Summary(
        turns=len(turns),
        first_audio_median=statistics.median(first_audio),
        first_audio_p95=_percentile(first_audio, 95),
        first_audio_p99=_percentile(first_audio, 99),
        exposed_mean=statistics.fmean(turn.exposed for turn in turns),
        limit_mean=statistics.fmean(turn.limit for turn in turns),
        fillers=statistics.fmean(turn.filler is not None for turn in turns),
        foretold=statistics.fmean(turn.lead > 0 for turn in turns),
        model_calls=result.model_calls[arm] / len(turns),
        searches=result.searches[arm] / len(turns),
    )


def table(result: Result) -> str:
    """All arms, one below the other."""
    floor = summarise(result, FLOOR).first_audio_median
    rows = [
        ["", *("first audio", "p95", "beside no", "documents", "of it at", "filler"), "model", ""],
        ["", *("median", "", "retrieval", "waited for", "least", "played"), "calls", "searches"],
    ]
    for arm in ARMS:
        summary = summarise(result, arm)
        rows.append(
            [
                arm,
                f"{summary.first_audio_median:.2f} s",
                f"{summary.first_audio_p95:.2f} s",
                f"{summary.first_audio_median / floor:.2f} x",
                f"{summary.exposed_mean:.3f} s",
                f"{summary.limit_mean:.3f} s",
                f"{summary.fillers:.0%}",
                f"{summary.model_calls:.2f}",
                f"{summary.searches:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def sentence(result: Result) -> str:
    """What happened, in two sentences."""
    off, at_final, partials, floor = (
        summarise(result, arm) for arm in (OFF, AT_FINAL, FROM_PARTIALS, FLOOR)
    )
    return (
        f"With the retrieval started while the caller still speaks, callers heard the answer after "
        f"{partials.first_audio_median:.2f} s instead of {off.first_audio_median:.2f} s (median); "
        f"the same bot without any retrieval takes {floor.first_audio_median:.2f} s. "
        f"That costs {partials.model_calls:.1f} calls to the model per turn instead of "
        f"{off.model_calls:.1f}; started at the final transcript, {at_final.model_calls:.2f}."
    )


def bars(result: Result) -> list[str]:
    """What the measurement is held to, line by line, with what was measured.

    A machine that is busy with other things misses them.
    """
    at_final, partials, floor = (summarise(result, arm) for arm in (AT_FINAL, FROM_PARTIALS, FLOOR))
    ratio = partials.first_audio_median / floor.first_audio_median
    checks = [
        (
            ratio <= 1 + FLOOR_BAR,
            f"{FROM_PARTIALS}: median at most {1 + FLOOR_BAR:.2f} x that of {FLOOR}: {ratio:.2f} x",
        ),
        (
            (at_final.model_calls, at_final.searches) == (1, 1),
            f"{AT_FINAL}: exactly 1 call to the model and 1 search per turn: "
            f"{at_final.model_calls:.2f} and {at_final.searches:.2f}",
        ),
    ]
    for name, summary in ((AT_FINAL, at_final), (FROM_PARTIALS, partials)):
        beyond = summary.exposed_mean - summary.limit_mean
        checks.append(
            (
                beyond <= BEYOND_LIMIT_BAR,
                f"{name}: waited at most {BEYOND_LIMIT_BAR * 1e3:.0f} ms longer than it must: "
                f"{beyond * 1e3:+.1f} ms",
            )
        )
    return [f"{'ok  ' if met else 'MISS'} {words}" for met, words in checks]


def as_json(result: Result) -> dict[str, Any]:
    """Everything: the plan, the figures and each turn."""
    return {
        "plan": {**dataclasses.asdict(result.plan), "questions": len(result.plan.questions)},
        "arms": {arm: dataclasses.asdict(summarise(result, arm)) for arm in ARMS},
        "turns": [_turn_as_json(turn) for turn in result.turns],
    }


def _turn_as_json(turn: Turn) -> dict[str, Any]:
    return {**dataclasses.asdict(turn), "exposed": turn.exposed, "limit": turn.limit}


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
