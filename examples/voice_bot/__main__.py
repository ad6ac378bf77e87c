"""The A/B measurement as a command: ``python -m examples.voice_bot``."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from examples.voice_bot import knowledge, report
from examples.voice_bot.arms import ARMS, own_model
from examples.voice_bot.experiment import Plan, Result, run, write_log

_REAL = "text-embedding-3-small"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    questions = knowledge.questions()
    if options.questions is not None:
        try:
            questions = knowledge.questions_in(options.questions)
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--questions: {error}")
    turns = min(Plan.turns, len(questions)) if options.turns is None else options.turns
    if not 1 <= turns <= len(questions):
        parser.error(f"--turns: from 1 to {len(questions)}, the number of different questions")
    if options.calls < 1:
        parser.error("--calls: at least 1")
    if options.time_scale <= 0:
        parser.error("--time-scale: more than 0")
    if options.model is not None:
        if ":" not in options.model and not os.environ.get("OPENAI_API_KEY"):
            parser.error("asking OpenAI's API needs OPENAI_API_KEY in the environment")
        try:
            own_model(options.model)
        except ValueError as error:
            parser.error(f"--model: {error}")

    plan = Plan(
        turns=turns,
        calls=min(options.calls, turns),
        seed=options.seed,
        filler_from=0.0 if options.always_filler else Plan.filler_from,
        time_scale=options.time_scale,
        model=options.model,
        questions=questions,
    )
    print(_explanation(plan), flush=True)
    registry = CollectorRegistry()
    try:
        with serve_metrics(registry, options.metrics):
            result = asyncio.run(run(plan, _progress(len(ARMS) * plan.turns), registry))
    except KeyboardInterrupt:
        return 130
    print(f"\n{report.table(result)}\n\n{report.sentence(result)}")
    if plan.filler_from > 0 and plan.model is None:
        print("\n" + "\n".join(report.bars(result)))
    if options.output is not None:
        _write(result, options.output)
    if options.log is not None:
        write_log(result, options.log)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.voice_bot",
        description="Measure a voice turn with and without prefetching its retrieval.",
    )
    parser.add_argument(
        "--turns", type=int, help=f"turns for each arm (default {Plan.turns}, or all questions)"
    )
    parser.add_argument(
        "--calls", type=int, default=Plan.calls, help=f"calls at once (default {Plan.calls})"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the delays")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="factor on all times; 0.1 is ten times faster"
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="your own model instead of the stand-in: the name of one of OpenAI's (asked with "
        "OPENAI_API_KEY, at OPENAI_BASE_URL if that is set), or package.module:name of an "
        "Embeddings or of a function that returns one. It should not cache: each question goes to "
        "it once for each arm, at nearly the same time, and the partial transcripts besides",
    )
    parser.add_argument(
        "--live",
        dest="model",
        action="store_const",
        const=_REAL,
        help=f"the same as --model {_REAL}",
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="your own questions, one a line"
    )
    parser.add_argument(
        "--always-filler",
        action="store_true",
        help="play the filler in every turn, so that the arms differ in the retrieval alone; "
        "otherwise only where the expected wait warrants it, as a bot does",
    )
    parser.add_argument(
        "--metrics",
        type=int,
        metavar="PORT",
        help="serve the bots' metrics there meanwhile, at http://127.0.0.1:PORT/metrics, as a bot "
        "in operation does; 0 for any free port",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="write what happened to the callers without prefetching, for "
        "python -m prefetch_embeddings.replay FILE",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write there: all figures as JSON, two pictures, the metrics page at the end",
    )
    return parser


@contextlib.contextmanager
def serve_metrics(registry: CollectorRegistry, port: int | None) -> Iterator[None]:
    """Serve the figures of `registry` for as long as the block lasts, if there is a port."""
    if port is None:
        yield
        return
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    print(f"Metrics: http://127.0.0.1:{server.server_port}/metrics", flush=True)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _explanation(plan: Plan) -> str:
    if plan.model is None:
        upstream = (
            "OpenAIEmbeddings over HTTP to a local stand-in that answers after "
            f"{plan.p5}-{plan.p95} s (p5-p95, lognormal), the same for a question in all arms"
        )
    else:
        kind = plan.model if ":" in plan.model else f"OpenAIEmbeddings, {plan.model}, the real API"
        upstream = f"{kind}; the limit is taken from each turn's own measured embedding"
    times = "All times" if plan.model is None else "All times but the model's own"
    scale = "" if plan.time_scale == 1 else f" {times} are multiplied by {plan.time_scale}."
    filler = (
        f"the filler ({plan.durations.filler:.1f} s) in every turn"
        if plan.filler_from == 0
        else f"a filler of {plan.durations.filler:.1f} s where a wait of {plan.filler_from} s or "
        "more is expected"
    )
    return (
        f"{plan.turns} cold questions for each of {len(ARMS)} arms, {plan.calls} calls at once, "
        f"{len(knowledge.MODELS)} knowledge bases; {filler}.{scale}\n"
        f"Embeddings: {upstream}.\n"
        f"Search: real Chroma, and stand-ins that add {plan.durations.search} s for a network and "
        f"{plan.durations.rerank} s for a reranker.\n"
        "Real: Chroma, LangChain, the OpenAI client. Stand-ins besides: telephone, caller, "
        "recogniser with partial transcripts and speech detector, language model, speech synthesis."
    )


def _write(result: Result, folder: Path) -> None:
    from examples.voice_bot import plots  # matplotlib takes its time to import

    folder.mkdir(parents=True, exist_ok=True)
    figures = folder / "figures.json"
    figures.write_text(json.dumps(report.as_json(result), indent=2, ensure_ascii=False), "utf-8")
    plots.save(plots.distributions(result), folder / "first_audio.png")
    plots.save(plots.timeline(result), folder / "turn.png")
    (folder / "metrics.txt").write_bytes(result.metrics)
    print(f"\nWritten to {folder}: figures.json, first_audio.png, turn.png, metrics.txt")


def _progress(total: int) -> Callable[[int], None]:
    """Shows how far it is: a line rewritten on a terminal, elsewhere a line now and then."""
    terminal = sys.stderr.isatty()

    def show(done: int) -> None:
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r{done} of {total} turns", end=end, file=sys.stderr, flush=True)
        elif done % 50 == 0 or done == total:
            print(f"{done} of {total} turns", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
