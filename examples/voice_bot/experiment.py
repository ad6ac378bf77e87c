"""The A/B measurement: the same cold questions, each answered in several ways.

Several calls run at once. Each puts its questions to all arms at nearly the same time, the arms
taking turns at being first. So they are paired: same question, same delay, same load on the
machine, and with a real provider the same weather. An arm has an agent, wrappers and knowledge
bases of its own and meets every question once, so that nothing is cached that should not be.
"""

import asyncio
import concurrent.futures
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from examples.local_openai import Delays
from examples.voice_bot.arms import ARMS, EMBEDDING, FLOOR, OFF, Arm, open_arm
from examples.voice_bot.handler import FILLER_FROM, StasisHandler
from examples.voice_bot.knowledge import Asked, questions
from examples.voice_bot.measuring import Call
from examples.voice_bot.stand_ins import (
    FILLER,
    Durations,
    StandInChannel,
    StandInRecogniser,
    StandInTextToSpeech,
    moments,
)
from examples.voice_bot.transcripts import listen_to
from prefetch_embeddings import UtterancePrefetcher, match_spoken
from prefetch_embeddings.replay import TranscriptLog

_SECONDS_BETWEEN_CALLS = 0.25
_SECONDS_BETWEEN_ARMS = 0.35


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        turns: Turns for each arm.
        calls: Calls at once.
        seed: Decides the questions, their order, the delays and the partial transcripts.
        p5: 5th percentile of the stand-in endpoint's delays, in seconds, before `time_scale`.
        p95: Their 95th percentile.
        durations: The turn's other parts, before `time_scale`.
        filler_from: Seconds of expected wait, before `time_scale`, from which the filler is played;
            0.0 for always, so that the arms differ in the retrieval alone.
        time_scale: Factor on all of these; 1.0 for real time.
        model: The user's own model, as `own_model` takes it, instead of the stand-in.
        questions: What to ask.
    """

    turns: int = 96
    calls: int = 24
    seed: int = 1
    p5: float = 0.39
    p95: float = 1.16
    durations: Durations = field(default_factory=Durations)
    filler_from: float = FILLER_FROM
    time_scale: float = 1.0
    model: str | None = None
    questions: Sequence[Asked] = field(default_factory=questions)

    def drawn(self) -> list[Asked]:
        """As many different questions as there are turns."""
        return random.Random(self.seed).sample(list(self.questions), self.turns)

    def delays(self) -> Delays:
        """The endpoint's delays."""
        return Delays(p5=self.p5, p95=self.p95, seed=self.seed, time_scale=self.time_scale)


@dataclass(frozen=True)
class Span:
    """From when to when something happened, in seconds after the final transcript."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(frozen=True)
class Turn:
    """What one turn showed, in seconds.

    Attributes:
        arm: The arm it belongs to.
        question: What the caller asked.
        first_audio: From the final transcript to the answer's first audio.
        filler: The filler phrase; None if none was played.
        query: What the chain waited for its documents.
        calls: The model's calls for the question.
        guesses: Its calls for partial transcripts that were another text.
        head_start: From the prefetch to the chain's query for it; 0.0 without a prefetch. If a
            partial transcript had the same text, from the prefetch of that.
        lead: By how much that was before the final transcript; 0.0 if there was none.
        embedding: How long the embedding itself takes: the endpoint's draw, or as measured.
        after_embedding: How long the search and the reranker take.
    """

    arm: str
    question: str
    first_audio: float
    filler: Span | None
    query: Span
    calls: tuple[Span, ...]
    guesses: tuple[Span, ...]
    head_start: float
    lead: float
    embedding: float
    after_embedding: float

    @property
    def exposed(self) -> float:
        """What the chain waited for its documents."""
        return self.query.seconds

    @property
    def limit(self) -> float:
        """What is exposed at least, however well the arm does what it does."""
        if self.arm == FLOOR:
            return 0.0
        if self.arm == EMBEDDING:
            return max(0.0, self.embedding - self.head_start) + self.after_embedding
        return max(0.0, self.embedding + self.after_embedding - self.head_start)


@dataclass(frozen=True)
class Result:
    """All turns, the calls and searches that each arm made for them, and Prometheus' page of it."""

    plan: Plan
    turns: tuple[Turn, ...]
    model_calls: dict[str, int]
    searches: dict[str, int]
    metrics: bytes

    def of(self, arm: str) -> list[Turn]:
        """The turns of one arm."""
        return [turn for turn in self.turns if turn.arm == arm]


async def run(
    plan: Plan,
    on_turn: Callable[[int], None] = lambda _: None,
    registry: CollectorRegistry | None = None,
) -> Result:
    """Measure.

    Args:
        plan: What to measure.
        on_turn: Called after each turn with the number of turns done, all arms counted.
        registry: Where to export the wrappers' figures meanwhile; by default one of its own.
    """
    registry = registry or CollectorRegistry()
    # A sync embedding call holds one thread of the loop's default pool. Its usual size on a small
    # machine, 6, would make calls wait for each other, which is not what is measured here.
    threads = concurrent.futures.ThreadPoolExecutor(max_workers=len(ARMS) * plan.calls)
    asyncio.get_running_loop().set_default_executor(threads)
    drawn = plan.drawn()
    turns: list[Turn] = []
    async with contextlib.AsyncExitStack() as stack:
        arms = [await stack.enter_async_context(_open(name, plan, registry)) for name in ARMS]
        for arm in arms:
            await _prepare(arm, plan)

        async def turn(place: int, arm: Arm, question: Asked) -> None:
            await asyncio.sleep(place * _SECONDS_BETWEEN_ARMS * plan.time_scale)
            turns.append(await _turn(arm, question, plan))
            on_turn(len(turns))

        async def call(number: int) -> None:
            await asyncio.sleep(number * _SECONDS_BETWEEN_CALLS * plan.time_scale)
            for index, question in enumerate(drawn[number :: plan.calls], start=number):
                first = index % len(arms)
                async with asyncio.TaskGroup() as callers:
                    for place, arm in enumerate(arms[first:] + arms[:first]):
                        callers.create_task(turn(place, arm, question))

        async with asyncio.TaskGroup() as calls:
            for number in range(plan.calls):
                calls.create_task(call(number))
        model_calls = {arm.name: arm.model_calls() for arm in arms}
        searches = {arm.name: arm.search_calls() for arm in arms}
        page = generate_latest(registry)
        return Result(plan, tuple(turns), model_calls, searches, page)


def _open(
    name: str, plan: Plan, registry: CollectorRegistry
) -> contextlib.AbstractAsyncContextManager[Arm]:
    return open_arm(
        name,
        model=plan.model,
        calls=plan.calls,
        turns=plan.turns,
        llm_seconds=plan.durations.llm * plan.time_scale,
        retrieval_seconds=plan.durations.after_embedding * plan.time_scale,
        registry=registry,
    )


async def _prepare(arm: Arm, plan: Plan) -> None:
    """Bring an arm to where a bot is that has been in use for a while."""
    await arm.warm_up(connections=1 if plan.model else plan.calls)
    if arm.server is not None:
        arm.server.set_delays(plan.delays())
    arm.begin()


def write_log(result: Result, path: Path) -> None:
    """Write what happened to the callers of the arm without prefetching, for the replay."""
    now = 0.0
    log = TranscriptLog(path, clock=lambda: now)
    scale = result.plan.time_scale
    for number, turn in enumerate(result.of(OFF)):
        heard = listen_to(turn.question, seed=result.plan.seed)
        began = 1000.0 * number  # each turn is a call of its own, long after the one before
        call = f"call {number}"
        for at, what, text in moments(heard):
            now = began + at * scale
            getattr(log, what)(call, *text)
        now = began + heard.final_at * scale + turn.query.ended
        log.query(call, turn.question, seconds=turn.query.seconds)
    log.close()


async def _turn(arm: Arm, question: Asked, plan: Plan) -> Turn:
    """Let a caller ask one question, and listen."""
    durations = plan.durations.scaled(plan.time_scale)
    channel = StandInChannel(durations.filler)
    speech = arm.listen(question.kb, plan.time_scale)
    handler = StasisHandler(
        arm.agent,
        channel,
        StandInTextToSpeech(durations.tts),
        kb=question.kb,
        filler=FILLER,
        speech=speech,
        pause=durations.pause,
        filler_from=plan.filler_from * plan.time_scale,
    )
    heard = listen_to(question.text, seed=plan.seed)
    final_at = await StandInRecogniser(plan.time_scale).hear(handler, heard)
    await handler.turn_over()

    answers = [began for audio, began, _ in channel.played if audio != FILLER]
    if not answers:
        raise RuntimeError("a turn failed; the log says why")
    fillers = [Span(began, ended) for audio, began, ended in channel.played if audio == FILLER]
    model = arm.model_of(question.kb).calls
    query = _after(final_at, arm.waited[question.kb].calls.calls_for(question.text)[-1])
    heard_of = {text for _, text in heard.partials} if speech is not None else set()
    alike = {text for text in heard_of if match_spoken(text) == match_spoken(question.text)}
    calls = [call for text in {question.text, *alike} for call in model.calls_for(text)]
    embedded = next((text for text in alike if model.calls_for(text)), question.text)
    lead = _lead(speech)
    return Turn(
        arm=arm.name,
        question=question.text,
        first_audio=answers[0] - final_at,
        filler=Span(fillers[0].began - final_at, fillers[0].ended - final_at) if fillers else None,
        query=query,
        calls=tuple(_after(final_at, call) for call in calls),
        guesses=tuple(
            _after(final_at, call)
            for text in heard_of - {question.text, *alike}
            for call in model.calls_for(text)
        ),
        head_start=0.0 if arm.name in (OFF, FLOOR) else query.began + lead,
        lead=lead,
        embedding=_embedding(arm, embedded, plan, calls),
        after_embedding=durations.after_embedding,
    )


def _after(moment: float, call: Call) -> Span:
    return Span(call.began - moment, call.began + call.seconds - moment)


def _lead(speech: UtterancePrefetcher | None) -> float:
    utterance = None if speech is None else speech.last_utterance
    return 0.0 if utterance is None else utterance.lead


def _embedding(arm: Arm, text: str, plan: Plan, calls: Sequence[Call]) -> float:
    if arm.server is not None:
        return plan.delays().seconds_for(text)
    return calls[0].seconds if calls else 0.0
