"""Prints what the traces look like: `python -m benchmarks.traces.summary`."""

from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING

from benchmarks.traces.parametric import FEW_PARTIALS, MANY_PARTIALS, Punctuation, generate
from benchmarks.traces.trace import RECORDED, load, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.traces.trace import Trace

GENERATED = 2_000


def statistics(traces: "Sequence[Trace]") -> dict[str, float]:
    """Shares are of the traces, times in seconds; "plain" leaves case and punctuation aside."""
    settled = [trace for trace in traces if trace.settled]
    alike = [trace for trace in traces if plain(_last(trace)) == plain(trace.final.text)]
    return {
        "traces": len(traces),
        "last interim equals the final": len(settled) / len(traces),
        "... plain": len(alike) / len(traces),
        "some interim equals the final (ceiling)": fmean(trace.foretold() for trace in traces),
        "... plain (ceiling)": fmean(trace.foretold(loosely=True) for trace in traces),
        "lead where plain equal, median s": median(trace.lead_seconds for trace in alike),
        "... mean s": fmean(trace.lead_seconds for trace in alike),
        "end of speech to final, median s": median(
            trace.final.at_seconds - trace.speech_end_seconds for trace in traces
        ),
        "partials per utterance, mean": fmean(len(trace.partials) for trace in traces),
        "words in the final, mean": fmean(len(trace.final.text.split()) for trace in traces),
        "word error rate of the final": word_error_rate(traces),
    }


def word_error_rate(traces: "Sequence[Trace]") -> float:
    """Words to change, insert or drop in the finals, as a share of the words that were said."""
    pairs = [(plain(trace.question).split(), plain(trace.final.text).split()) for trace in traces]
    return sum(_edits(*pair) for pair in pairs) / sum(len(said) for said, _ in pairs)


def table(columns: "dict[str, dict[str, float]]") -> str:
    """The statistics as a Markdown table, a column each."""
    names = list(next(iter(columns.values())))
    rows = [[name, *(_shown(name, column[name]) for column in columns.values())] for name in names]
    head = [["", *columns], ["---", *("---:" for _ in columns)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def main() -> None:
    """Print the statistics of the recorded and of generated traces."""
    final_only = replace(MANY_PARTIALS, punctuation=Punctuation.FINAL)
    columns = {
        "recorded": load(RECORDED),
        "recorded, rescored": load(RECORDED, rescored=True),
        "generated, many partials": generate(GENERATED, shape=MANY_PARTIALS),
        "generated, few partials": generate(GENERATED, shape=FEW_PARTIALS),
        "generated, final punctuated": generate(GENERATED, shape=final_only),
    }
    print(table({name: statistics(traces) for name, traces in columns.items()}))


def _last(trace: "Trace") -> str:
    return trace.partials[-1].text if trace.partials else ""


def _shown(name: str, value: float) -> str:
    return str(int(value)) if name == "traces" else f"{value:.3f}"


def _edits(said: list[str], heard: list[str]) -> int:
    """The Levenshtein distance in words."""
    distances = list(range(len(heard) + 1))
    for row, word in enumerate(said, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(heard, start=1):
            changed = diagonal + (word != other)
            diagonal = distances[column]
            distances[column] = min(changed, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


if __name__ == "__main__":
    main()
