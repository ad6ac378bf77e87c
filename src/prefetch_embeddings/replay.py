"""What prefetching from partial transcripts would have brought: a replay of a bot's own traffic.

Write a log with `TranscriptLog`, or anything else that writes its lines, and ask:

    python -m prefetch_embeddings.replay LOG

Each line is a JSON object: `call` names the telephone call or conversation, `t` is the time in
seconds, on any clock, and `e` what happened: `partial`, `final`, `speech_started`,
`speech_stopped`, `query` or `hang_up`. The first two and `query` have the `text`; `query` may have
`seconds`, which is what it took. Instead of the text there may be a `digest` of it and `words`,
their number.

The log is played to the real `UtterancePrefetcher`, with a clock by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Callable  # noqa: TC003 - in an annotation that runs
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings.events import PrefetchStarted, QueryServed
from prefetch_embeddings.matching import match_spoken
from prefetch_embeddings.speech import UtterancePrefetcher
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from prefetch_embeddings.transcripts import Line, LoggedSpeech, TranscriptLog, read

if TYPE_CHECKING:
    from prefetch_embeddings.events import PrefetchEvent

__all__ = ["Line", "LoggedSpeech", "Outcome", "TranscriptLog", "advice", "read", "replay", "table"]

OFF: Final = "off"
AT_FINAL: Final = "at final"
PRESETS: Final[dict[str, Callable[[Any], UtterancePrefetcher]]] = {
    "for_many_partials": UtterancePrefetcher.for_many_partials,
    "for_few_partials": UtterancePrefetcher.for_few_partials,
    "for_eager_turn_ends": UtterancePrefetcher.for_eager_turn_ends,
}
"""What is compared, besides no prefetching and prefetching at the final transcript."""

WORTH_A_CALL: Final = 0.02
"""A preset that waits so many seconds less, for each further call a turn, is worth its calls."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of prefetching would have brought.

    Attributes:
        name: The preset.
        turns: Queries in the log.
        calls: Calls to the model.
        hits: Final transcripts that a partial one had foretold.
        finals: Final transcripts.
        lead_seconds: By how much the hits came before their final transcripts, in all.
        exposed: What each query would have waited, in seconds.
    """

    name: str
    turns: int
    calls: int
    hits: int
    finals: int
    lead_seconds: float
    exposed: tuple[float, ...]

    @property
    def calls_a_turn(self) -> float:
        """Calls to the model per query."""
        return self.calls / self.turns if self.turns else 0.0

    @property
    def exposed_mean(self) -> float:
        """The mean of what queries would have waited, in seconds."""
        return statistics.fmean(self.exposed) if self.exposed else 0.0

    @property
    def exposed_p95(self) -> float:
        """Its 95th percentile."""
        if len(self.exposed) < 2:
            return self.exposed_mean
        return statistics.quantiles(self.exposed, n=20, method="inclusive")[-1]


def replay(lines: list[Line], durations: Callable[[Line], float]) -> list[Outcome]:
    """Play a log once for each way of prefetching.

    Args:
        lines: The log. One without queries is taken as if each final transcript were asked for at
            once.
        durations: Returns what the work for a query takes, in seconds.

    Returns:
        What each would have brought: none, at the final transcript, and each preset.
    """
    if not any(line.e == "query" for line in lines):
        asked = [dataclasses.replace(line, e="query") for line in lines if line.e == "final"]
        lines = sorted([*lines, *asked], key=lambda line: line.t)
    ways: dict[str, Callable[[Any], UtterancePrefetcher] | None] = {OFF: None}
    ways |= {AT_FINAL: UtterancePrefetcher, **PRESETS}
    return [_play(name, make, lines, durations) for name, make in ways.items()]


def _play(
    name: str,
    make: Callable[[Any], UtterancePrefetcher] | None,
    lines: list[Line],
    durations: Callable[[Line], float],
) -> Outcome:
    began: dict[int, float] = {}  # by flight
    served: list[QueryServed] = []

    def on_event(event: PrefetchEvent) -> None:
        if isinstance(event, PrefetchStarted):
            began[event.flight] = bot.time()
        elif isinstance(event, QueryServed):
            served.append(event)

    model = ScriptedEmbeddings(1)
    exposed: list[float] = []
    speech: dict[str, UtterancePrefetcher] = {}
    start = lines[0].t if lines else 0.0
    with ManualPrefetchingEmbeddings(model, match=match_spoken, on_event=on_event) as bot:
        epoch = bot.time()
        for line in lines:
            bot.time.advance(max(0.0, epoch + line.t - start - bot.time()))
            bot.executor.run_all()
            if line.e == "query":
                bot.embed_query(line.text)
                now = bot.time()
                head_start = now - began.setdefault(served[-1].flight, now)
                exposed.append(max(0.0, durations(line) - (0.0 if make is None else head_start)))
            elif make is not None and (name != AT_FINAL or line.e in ("final", "hang_up")):
                _tell(speech.setdefault(line.call, make(bot)), line)
            bot.executor.run_all()
        heard = [each.stats() for each in speech.values()]
    return Outcome(
        name,
        turns=len(exposed),
        calls=len(exposed) if make is None else len(model.calls),
        hits=sum(each.hits for each in heard),
        finals=sum(line.e == "final" for line in lines),
        lead_seconds=sum(each.lead_seconds for each in heard),
        exposed=tuple(exposed),
    )


def _tell(speech: UtterancePrefetcher, line: Line) -> None:
    match line.e:
        case "partial":
            speech.on_partial(line.text)
        case "final":
            speech.on_final(line.text)
        case "speech_started":
            speech.on_speech_started()
        case "speech_stopped":
            speech.on_speech_stopped()
        case "hang_up":
            speech.reset()
        case "query":
            pass


def table(outcomes: list[Outcome]) -> str:
    """Return all of them, one below the other."""
    rows = [["", "calls a turn", "foretold", "lead", "waited, mean", "p95"]]
    for each in outcomes:
        lead = each.lead_seconds / each.hits if each.hits else 0.0
        rows.append(
            [
                each.name,
                f"{each.calls_a_turn:.2f}",
                f"{each.hits / each.finals if each.finals else 0.0:.0%}",
                f"{lead:.2f} s",
                f"{each.exposed_mean:.3f} s",
                f"{each.exposed_p95:.3f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    )


def advice(outcomes: list[Outcome]) -> str:
    """Say in one sentence which preset to take, and what it would have brought."""
    off, *others = outcomes
    best = min(others, key=lambda each: each.exposed_mean + WORTH_A_CALL * each.calls_a_turn)
    if not off.turns:
        return "The log has no query and no final transcript: there is nothing to say."
    if off.exposed_mean - best.exposed_mean < WORTH_A_CALL:
        return "Prefetching would have brought next to nothing: queries come as soon as the text."
    return (
        f"Take {best.name!r}: callers would have waited {best.exposed_mean:.2f} s a turn instead "
        f"of {off.exposed_mean:.2f} s, for {best.calls_a_turn:.1f} calls to the model instead of "
        f"{off.calls_a_turn:.1f}."
    )


def _durations(options: argparse.Namespace, lines: list[Line]) -> Callable[[Line], float]:
    """Return what tells how long work takes: by the log, else by the options."""
    known = [line.seconds for line in lines if line.seconds is not None]
    dice = random.Random(1)  # noqa: S311 - not a secret
    if options.p5 is not None and options.p95 is not None:
        middle = (math.log(options.p5) + math.log(options.p95)) / 2
        spread = (math.log(options.p95) - math.log(options.p5)) / (2 * 1.645)
        drawn = {id(line): dice.lognormvariate(middle, spread) for line in lines}
        return lambda line: drawn[id(line)]
    if options.stats is not None:
        stats = json.loads(options.stats.read_text("utf-8"))
        flights = stats["prefetch_used"] + stats["query_missed"]
        mean = (stats["hidden_seconds"] + stats["exposed_seconds"]) / max(1, flights)
        return lambda line: mean if line.seconds is None else line.seconds
    fallback = statistics.fmean(known) if known else options.seconds
    return lambda line: fallback if line.seconds is None else line.seconds


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prefetch_embeddings.replay",
        description="What prefetching from partial transcripts would have brought on a log.",
    )
    parser.add_argument("log", type=Path, help="one JSON object a line, see TranscriptLog")
    parser.add_argument(
        "--seconds", type=float, default=0.7, help="what the work takes where the log has no word"
    )
    parser.add_argument("--p5", type=float, help="draw it instead: its 5th percentile, ...")
    parser.add_argument("--p95", type=float, help="... and its 95th (lognormal)")
    parser.add_argument(
        "--stats", type=Path, help="or take its mean from a wrapper's stats(), as JSON"
    )
    parser.add_argument("--picture", type=Path, help="draw it into this file, too")
    options = parser.parse_args(arguments)
    try:
        with options.log.open(encoding="utf-8", errors="replace") as file:
            lines, bad = read(file)
    except OSError as error:
        parser.error(f"{options.log}: {error.strerror}")
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        print(f"{len(bad)} lines make no sense and do not count: {shown}", file=sys.stderr)
    outcomes = replay(lines, _durations(options, lines))
    print(f"{table(outcomes)}\n\n{advice(outcomes)}")
    if options.picture is not None:
        _draw(outcomes, options.picture)
    return 0


def _draw(outcomes: list[Outcome], path: Path) -> None:
    from matplotlib.figure import Figure  # of the extra `examples`; only where it is asked for

    figure = Figure(figsize=(8, 0.6 * len(outcomes) + 1), layout="constrained")
    axes = figure.subplots()
    names = [each.name for each in outcomes]
    axes.barh(names, [each.exposed_mean for each in outcomes], color="#4f7cac", height=0.6)
    for place, each in enumerate(outcomes):
        label = f" {each.exposed_mean:.2f} s, {each.calls_a_turn:.1f} calls"
        axes.text(each.exposed_mean, place, label, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("what callers would have waited, mean, in seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
