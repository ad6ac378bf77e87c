"""What the measurement found: the table, one sentence, and JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.voice_bot.arms import ARMS, AT_FINAL, CACHED, FROM_PARTIALS, OFF
from examples.voice_bot.experiment import Result, Turn

BEYOND_LIMIT_BAR = 0.005
"""Seconds that the mean exposed embedding may lie above its limit."""

COLD_BAR = 0.03
"""By how much the median of cold questions may lie above that of cached ones, as a share of it."""


@dataclass(frozen=True)
class Summary:
    """One arm in figures; times in seconds.

    Attributes:
        turns: Number of turns.
        first_audio_median: Median of FIRST AUDIO PLAYED.
        first_audio_p95: Its 95th percentile.
        first_audio_p99: Its 99th percentile.
        exposed_mean: Mean of what the chain waited for the embedding.
        limit_mean: Mean of ``max(0, embedding - head start)`` over the same turns.
        foretold: Share of the turns whose final text a partial transcript had prefetched.
        calls_per_turn: Upstream calls per turn.
    """

    turns: int
    first_audio_median: float
    first_audio_p95: float
    first_audio_p99: float
    exposed_mean: float
    limit_mean: float
    foretold: float
    calls_per_turn: float


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
        foretold=statistics.fmean(turn.lead > 0 for turn in turns),
        calls_per_turn=result.upstream_calls[arm] / len(turns),
    )


def table(result: Result) -> str:
    """All arms side by side."""
    summaries = [summarise(result, arm) for arm in ARMS]
    cached = summarise(result, CACHED).first_audio_median
    rows = [
        ["", *ARMS],
        ["FIRST AUDIO PLAYED, median", *(f"{s.first_audio_median:.2f} s" for s in summaries)],
        ["FIRST AUDIO PLAYED, p95", *(f"{s.first_audio_p95:.2f} s" for s in summaries)],
        ["FIRST AUDIO PLAYED, p99", *(f"{s.first_audio_p99:.2f} s" for s in summaries)],
        [
            "median beside already cached",
            *(f"{s.first_audio_median / cached - 1:+.1%}" for s in summaries),
        ],
        ["exposed embedding, mean", *(f"{s.exposed_mean:.4f} s" for s in summaries)],
        ["  its limit, mean", *(f"{s.limit_mean:.4f} s" for s in summaries)],
        ["final text foretold", *(f"{s.foretold:.0%}" for s in summaries)],
        ["upstream calls per turn", *(f"{s.calls_per_turn:.2f}" for s in summaries)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def sentence(result: Result) -> str:
    """What happened, in two sentences."""
    off, at_final, partials = (summarise(result, arm) for arm in (OFF, AT_FINAL, FROM_PARTIALS))
    return (
        f"With the embedding started at the final transcript, callers heard the answer after "
        f"{at_final.first_audio_median:.2f} s instead of {off.first_audio_median:.2f} s (median): "
        f"of the {off.exposed_mean:.2f} s that the embedding takes, {at_final.exposed_mean:.2f} s "
        f"were still waited for, for {at_final.calls_per_turn:.2f} upstream calls per turn instead "
        f"of {off.calls_per_turn:.2f}. "
        f"From partial transcripts it is {partials.exposed_mean:.3f} s, for "
        f"{partials.calls_per_turn:.1f} calls."
    )


def bars(result: Result) -> list[str]:
    """What the measurement is held to, line by line, with what was measured.

    A machine that is busy with other things misses them.
    """
    at_final, partials, cached = (
        summarise(result, arm) for arm in (AT_FINAL, FROM_PARTIALS, CACHED)
    )
    beyond = at_final.exposed_mean - at_final.limit_mean
    checks = [
        (
            beyond <= BEYOND_LIMIT_BAR,
            f"{AT_FINAL}: exposed at most {BEYOND_LIMIT_BAR * 1e3:.0f} ms beyond its limit: "
            f"{beyond * 1e3:+.1f} ms",
        ),
        (
            partials.exposed_mean < at_final.exposed_mean,
            f"{FROM_PARTIALS}: less exposed than that: {partials.exposed_mean * 1e3:.1f} ms "
            f"against {at_final.exposed_mean * 1e3:.1f} ms",
        ),
        (
            at_final.calls_per_turn == 1,
            f"{AT_FINAL}: exactly 1 upstream call per turn: {at_final.calls_per_turn:.2f}",
        ),
    ]
    for name, summary in ((AT_FINAL, at_final), (FROM_PARTIALS, partials)):
        above = summary.first_audio_median / cached.first_audio_median - 1
        checks.append(
            (
                above <= COLD_BAR,
                f"{name}: median at most {COLD_BAR:.0%} above already cached: {above:+.1%}",
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
