"""What the measurement found: the table, one sentence, and JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.voice_bot.experiment import ARMS, AT_FINAL, OFF, Result


@dataclass(frozen=True)
class Summary:
    """One arm in figures; times in seconds.

    Attributes:
        turns: Number of turns.
        first_audio_median: Median of FIRST AUDIO PLAYED.
        first_audio_p95: Its 95th percentile.
        exposed_mean: Mean of what the chain waited for the embedding.
        limit_mean: Mean of ``max(0, embedding - head start)`` over the same turns.
        calls_per_turn: Upstream calls per turn.
    """

    turns: int
    first_audio_median: float
    first_audio_p95: float
    exposed_mean: float
    limit_mean: float
    calls_per_turn: float


def summarise(result: Result, arm: str) -> Summary:
    """One arm in figures."""
    turns = result.of(arm)
    first_audio = [turn.first_audio for turn in turns]
    return Summary(
        turns=len(turns),
        first_audio_median=statistics.median(first_audio),
        first_audio_p95=_p95(first_audio),
        exposed_mean=statistics.fmean(turn.exposed for turn in turns),
        limit_mean=statistics.fmean(turn.limit for turn in turns),
        calls_per_turn=result.upstream_calls[arm] / len(turns),
    )


def table(result: Result) -> str:
    """All arms side by side."""
    rows = [["", *ARMS]]
    summaries = [summarise(result, arm) for arm in ARMS]
    for label, name, unit, digits in (
        ("FIRST AUDIO PLAYED, median", "first_audio_median", " s", 2),
        ("FIRST AUDIO PLAYED, p95", "first_audio_p95", " s", 2),
        ("exposed embedding, mean", "exposed_mean", " s", 4),
        ("  its limit, mean", "limit_mean", " s", 4),
        ("upstream calls per turn", "calls_per_turn", "", 2),
    ):
        rows.append([label, *(f"{getattr(s, name):.{digits}f}{unit}" for s in summaries)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def sentence(result: Result) -> str:
    """What happened, in one sentence."""
    off, prefetched = summarise(result, OFF), summarise(result, AT_FINAL)
    return (
        f"With the embedding started at the final transcript, callers heard the answer after "
        f"{prefetched.first_audio_median:.2f} s instead of {off.first_audio_median:.2f} s "
        f"(median): of the {off.exposed_mean:.2f} s that the embedding takes, "
        f"{prefetched.exposed_mean:.2f} s were still waited for, "
        f"for {prefetched.calls_per_turn:.2f} upstream calls per turn "
        f"instead of {off.calls_per_turn:.2f}."
    )


def as_json(result: Result) -> dict[str, Any]:
    """Everything: the plan, the figures and each turn."""
    return {
        "plan": dataclasses.asdict(result.plan),
        "arms": {arm: dataclasses.asdict(summarise(result, arm)) for arm in ARMS},
        "turns": [{**dataclasses.asdict(turn), "limit": turn.limit} for turn in result.turns],
    }


def _p95(values: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]
