"""The A/B measurement as a command: ``python -m examples.voice_bot``."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from examples.knowledge_base import QUESTIONS
from examples.voice_bot import report
from examples.voice_bot.experiment import ARMS, Plan, run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.voice_bot",
        description="Measure a voice turn with and without prefetching its embedding.",
    )
    parser.add_argument("--turns", type=int, default=48, help="turns for each arm (default 48)")
    parser.add_argument("--calls", type=int, default=8, help="calls at once (default 8)")
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the delays")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="factor on all times; 0.1 is ten times faster"
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="ask the real API with OPENAI_API_KEY; each question goes to it once for each arm, "
        "one right after the other, the arms taking turns at being first",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    options = parser.parse_args(arguments)
    if not 1 <= options.turns <= len(QUESTIONS):
        parser.error(f"--turns: from 1 to {len(QUESTIONS)}, the number of different questions")
    if options.calls < 1:
        parser.error("--calls: at least 1")
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error("--live needs OPENAI_API_KEY in the environment")

    plan = Plan(
        turns=options.turns,
        calls=options.calls,
        seed=options.seed,
        time_scale=options.time_scale,
        live=options.live,
    )
    print(_explanation(plan))
    try:
        result = asyncio.run(run(plan, _progress(len(ARMS) * plan.turns)))
    except KeyboardInterrupt:
        return 130
    print(f"\n{report.table(result)}\n\n{report.sentence(result)}")
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(result), indent=2, ensure_ascii=False))
    return 0


def _explanation(plan: Plan) -> str:
    if plan.live:
        upstream = "the real OpenAI API; the limit is taken from each turn's own measured embedding"
    else:
        upstream = (
            f"a local stand-in that answers after {plan.p5}-{plan.p95} s (p5-p95, lognormal), "
            "the same for a question in both arms"
        )
    times = "All times but the API's own" if plan.live else "All times"
    scale = "" if plan.time_scale == 1 else f" {times} are multiplied by {plan.time_scale}."
    return (
        f"{plan.turns} cold questions for each of {len(ARMS)} arms, {plan.calls} calls at once; "
        f"filler {plan.durations.filler_in_all:.1f} s in all.{scale}\n"
        f"Embeddings: OpenAIEmbeddings over HTTP to {upstream}.\n"
        "Real: Chroma, LangChain, the OpenAI client. Stand-ins: telephone, recogniser, "
        "language model, speech synthesis."
    )


def _progress(total: int) -> Callable[[int], None]:
    """Shows how far it is: a line rewritten on a terminal, elsewhere a line now and then."""
    terminal = sys.stderr.isatty()

    def show(done: int) -> None:
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r{done} of {total} turns", end=end, file=sys.stderr, flush=True)
        elif done % 10 == 0 or done == total:
            print(f"{done} of {total} turns", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
