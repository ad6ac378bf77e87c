"""What prefetching from partial transcripts costs and gains: `python -m benchmarks.partials`.

Replays recorded and generated traces (see `benchmarks/traces`, all synthetic) through the real
`UtterancePrefetcher`, in simulated time, with a worker always free: a call that starts is paid for.
With speech signals a voice activity detector is modelled that says "stopped" so many seconds into
each silence, and "started" when the caller goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks.traces.parametric import FAST_FINALS, FEW_PARTIALS, MANY_PARTIALS, generate
from benchmarks.traces.trace import Trace, load
from examples.local_openai import Delays
from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher, match_spoken
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings

GENERATED = 1_000

DETECTORS = (0.2, 0.5)
"""Seconds of silence after which a voice activity detector says "stopped": Pipecat's and LiveKit's
own are 0.2 and 0.55."""

NewSpeech = Callable[[PrefetchingEmbeddings], UtterancePrefetcher]


class Policy(NamedTuple):
    """A way of choosing what to prefetch.

    Attributes:
        new_speech: Makes the prefetcher.
        detector: Seconds of silence that the voice activity detector waits for; None without one.
    """

    new_speech: NewSpeech
    detector: float | None = None


class Outcome(NamedTuple):
    """What a policy did on a set of traces.

    Attributes:
        calls: Calls to the model per turn, the final's own included.
        hit: The share of turns whose final text was asked for before it was final.
        ceiling: The share of turns whose final text was ever a partial one.
        lead: Seconds between the two, on average over the hits.
        exposed: Seconds that a query at the final transcript waits, on average over the turns.
    """

    calls: float
    hit: float
    ceiling: float
    lead: float
    exposed: float


class Heard(NamedTuple):
    """Something that happens on the line."""

    at_seconds: float
    what: str
    text: str = ""


def happenings(trace: Trace, detector: float | None) -> Iterator[Heard]:
    """Yield what happens until the final transcript, in the order of time."""
    heard = [Heard(partial.at_seconds, "partial", partial.text) for partial in trace.partials]
    if detector is not None:
        heard.append(Heard(0.0, "started"))
        for begin, end in trace.pauses:
            if end - begin > detector:
                heard += [Heard(begin + detector, "stopped"), Heard(end, "started")]
        heard.append(Heard(trace.speech_end_seconds + detector, "stopped"))
    before = [each for each in heard if each.at_seconds <= trace.final.at_seconds]
    yield from sorted(before, key=lambda each: each.at_seconds)
    yield Heard(trace.final.at_seconds, "final", trace.final.text)
    if len(before) < len(heard):  # the detector is slower than the recogniser: the turn ends here
        yield Heard(heard[-1].at_seconds, "stopped")
        yield Heard(heard[-1].at_seconds, "final", trace.final.text)


def replay(traces: Sequence[Trace], policy: Policy, seed: int = 1) -> Outcome:
    """Run each trace as an utterance of its own.

    The embeddings' durations are drawn as the demo's are: 0.39 s at the 5th percentile, 1.16 s at
    the 95th. They are the same for each policy.
    """
    durations = Delays(p5=0.39, p95=1.16, seed=seed)
    calls: list[int] = []
    leads: list[float] = []
    exposed: list[float] = []
    foretold = 0
    for number, trace in enumerate(traces):
        model = ScriptedEmbeddings(dimensions=1)
        embeddings = ManualPrefetchingEmbeddings(model, match=match_spoken)
        speech = policy.new_speech(embeddings)
        _play(trace, policy.detector, embeddings, speech)
        utterance = speech.last_utterance
        assert utterance is not None
        calls.append(len(model.calls))
        lead = utterance.lead if utterance.hit else 0.0
        at_final = _before_final(lead, trace, policy.detector)
        if at_final > 0:
            leads.append(at_final)
        duration = durations.seconds_for(str(number))
        exposed.append(max(0.0, duration - at_final))
        final = match_spoken(trace.final.text)
        foretold += any(match_spoken(partial.text) == final for partial in trace.partials)
        embeddings.close()
    turns = len(traces)
    return Outcome(
        fmean(calls), len(leads) / turns, foretold / turns, fmean(leads or [0.0]), fmean(exposed)
    )


def _play(
    trace: Trace,
    detector: float | None,
    embeddings: ManualPrefetchingEmbeddings,
    speech: UtterancePrefetcher,
) -> None:
    now = 0.0
    for heard in happenings(trace, detector):
        embeddings.time.advance(heard.at_seconds - now)
        now = heard.at_seconds
        embeddings.executor.run_all()  # what fell due is paid for before it can be taken back
        match heard.what:
            case "partial":
                speech.on_partial(heard.text)
            case "final":
                speech.on_final(heard.text)
            case "started":
                speech.on_speech_started()
            case "stopped":
                speech.on_speech_stopped()
        embeddings.executor.run_all()


def _before_final(lead: float, trace: Trace, detector: float | None) -> float:
    """Return the lead before the final transcript, where the turn ended later than that."""
    if detector is None:
        return lead
    ended_after_final = trace.speech_end_seconds + detector - trace.final.at_seconds
    return max(0.0, lead - max(0.0, ended_after_final))


def policies() -> dict[str, Policy]:
    """The presets with and without speech signals, and a sweep of `debounce` and `max_calls`."""

    def swept(debounce: float, max_calls: int) -> NewSpeech:
        return lambda embeddings: UtterancePrefetcher(
            embeddings, debounce=debounce, min_words=4, max_calls=max_calls
        )

    presets: dict[str, NewSpeech] = {
        "default (0.4 s, 2 words, 3 calls)": UtterancePrefetcher,
        "for_many_partials": UtterancePrefetcher.for_many_partials,
        "for_few_partials": UtterancePrefetcher.for_few_partials,
        "for_eager_turn_ends": UtterancePrefetcher.for_eager_turn_ends,
    }
    named = {name: Policy(new_speech) for name, new_speech in presets.items()}
    for seconds in DETECTORS:
        for name in ("for_many_partials", "for_few_partials"):
            named[f"{name}, stopped after {seconds} s"] = Policy(presets[name], seconds)
    for debounce in (0.0, 0.2, 0.3, 0.4, 0.6):
        for max_calls in (1, 3, 6, 12):
            named[f"{debounce} s, 4 words, {max_calls} calls"] = Policy(swept(debounce, max_calls))
    return named


def measure() -> dict[str, dict[str, Outcome]]:
    """Replay every set of traces under every policy."""
    sets = {
        "recorded": load(),
        "generated, many partials": generate(GENERATED, shape=MANY_PARTIALS),
        "generated, few partials": generate(GENERATED, shape=FEW_PARTIALS),
        "generated, fast finals": generate(GENERATED, shape=FAST_FINALS),
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
            f"{each.calls:.2f} calls, {each.hit:.1%}, {each.lead:.2f} s, {each.exposed:.3f} s"
            for each in outcomes.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table: calls per turn, hit rate, mean lead, mean exposed time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partials", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    table = measure()
    print("Calls per turn (the final's own included), hit rate, mean lead of the hits, and what a")
    print("query at the final transcript waits on average. Texts compared by match_spoken. All")
    print("traces are synthetic.")
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
