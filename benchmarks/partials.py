"""What prefetching from partial transcripts costs and gains: `python -m benchmarks.partials`.

Replays recorded and generated traces (see `benchmarks/traces`, all synthetic) through the real
`UtterancePrefetcher`, in simulated time, with a worker always free: a call that starts is paid for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks.traces.parametric import FEW_PARTIALS, MANY_PARTIALS, generate
from benchmarks.traces.trace import Trace, load
from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher, match_spoken
from prefetch_embeddings._background.pool import Source
from prefetch_embeddings.testing import (
    ManualExecutor,
    ManualPrefetchingEmbeddings,
    ScriptedEmbeddings,
)

GENERATED = 1_000

Policy = Callable[[PrefetchingEmbeddings], UtterancePrefetcher]


class RunsAtOnce(ManualExecutor):
    """A pool with a worker free for each job."""

    def wake(self) -> bool:
        """Run what waits."""
        self.run_all()
        return super().wake()


class Simulated(ManualPrefetchingEmbeddings):
    """Prefetching in simulated time."""

    def _make_executor(self, source: Source, max_workers: int) -> ManualExecutor:  # noqa: ARG002
        self.executor = RunsAtOnce(source)
        return self.executor


class Outcome(NamedTuple):
    """What a policy did on a set of traces.

    Attributes:
        calls: Calls to the model per turn, the final's own included.
        hit: The share of turns whose final text was asked for before it was final.
        ceiling: The share of turns whose final text was ever a partial one.
        lead: Seconds between the two, on average over the hits.
    """

    calls: float
    hit: float
    ceiling: float
    lead: float


def replay(traces: Sequence[Trace], policy: Policy) -> Outcome:
    """Run each trace as an utterance of its own."""
    calls: list[int] = []
    leads: list[float] = []
    foretold = 0
    for trace in traces:
        model = ScriptedEmbeddings(dimensions=1)
        embeddings = Simulated(model, match=match_spoken)
        speech = policy(embeddings)
        now = 0.0
        for partial in trace.partials:
            embeddings.time.advance(partial.at_seconds - now)
            now = partial.at_seconds
            speech.on_partial(partial.text)
        embeddings.time.advance(trace.final.at_seconds - now)
        speech.on_final(trace.final.text)
        utterance = speech.last_utterance
        assert utterance is not None
        calls.append(len(model.calls))
        if utterance.hit:
            leads.append(utterance.lead)
        final = match_spoken(trace.final.text)
        foretold += any(match_spoken(partial.text) == final for partial in trace.partials)
        embeddings.close()
    turns = len(traces)
    return Outcome(fmean(calls), len(leads) / turns, foretold / turns, fmean(leads or [0.0]))


def policies() -> dict[str, Policy]:
    """The presets, and a sweep of `debounce` and `max_calls`."""

    def swept(debounce: float, max_calls: int) -> Policy:
        return lambda embeddings: UtterancePrefetcher(
            embeddings, debounce=debounce, min_words=4, max_calls=max_calls
        )

    named: dict[str, Policy] = {
        "default (0.4 s, 2 words, 3 calls)": UtterancePrefetcher,
        "for_many_partials": UtterancePrefetcher.for_many_partials,
        "for_few_partials": UtterancePrefetcher.for_few_partials,
        "for_eager_turn_ends": UtterancePrefetcher.for_eager_turn_ends,
    }
    for debounce in (0.0, 0.2, 0.3, 0.4, 0.6):
        for max_calls in (1, 3, 6, 12):
            named[f"{debounce} s, 4 words, {max_calls} calls"] = swept(debounce, max_calls)
    return named


def measure() -> dict[str, dict[str, Outcome]]:
    """Replay every set of traces under every policy."""
    sets = {
        "recorded": load(),
        "generated, many partials": generate(GENERATED, shape=MANY_PARTIALS),
        "generated, few partials": generate(GENERATED, shape=FEW_PARTIALS),
    }
    return {
        name: {label: replay(traces, policy) for label, traces in sets.items()}
        for name, policy in policies().items()
    }


def render(table: dict[str, dict[str, Outcome]]) -> str:
    """Return the outcomes as a Markdown table."""
    labels = list(next(iter(table.values())))
    ceilings = next(iter(table.values()))
    heads = [f"{label} (ceiling {ceilings[label].ceiling:.1%})" for label in labels]
    lines = ["| policy | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(labels)]
    for name, outcomes in table.items():
        cells = [
            f"{each.calls:.2f} calls, {each.hit:.1%}, {each.lead:.2f} s"
            for each in outcomes.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table: calls per turn, hit rate, mean lead."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partials", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    table = measure()
    print("Calls per turn (the final's own included), hit rate and mean lead of the hits;")
    print("texts compared by match_spoken. All traces are synthetic.")
    print()
    print(render(table))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    name: {label: outcome._asdict() for label, outcome in outcomes.items()}
                    for name, outcomes in table.items()
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
