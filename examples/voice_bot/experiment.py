"""The A/B measurement: the same cold questions, with and without prefetching.

Several calls run at once. Each puts its questions to both arms, one right after the other, the
arms taking turns at being first. So they are paired: same question, same delay, same load on the
machine, and with a real provider the same weather. An arm has an agent, a wrapper and a knowledge
base of its own and meets every question once, so that nothing is cached in either.
"""

import asyncio
import concurrent.futures
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import chromadb
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from examples.knowledge_base import PASSAGES, QUESTIONS
from examples.local_openai import Delays, LocalOpenAI
from examples.voice_bot.agent import Agent
from examples.voice_bot.handler import StasisHandler, normalise
from examples.voice_bot.measuring import MeasuredEmbeddings
from examples.voice_bot.stand_ins import (
    FILLER,
    Durations,
    StandInChannel,
    StandInLLM,
    StandInTextToSpeech,
)
from prefetch_embeddings import PrefetchingEmbeddings

OFF = "off"
AT_FINAL = "prefetch at final"
ARMS = (OFF, AT_FINAL)

_SECONDS_BETWEEN_CALLS = 0.3
_WARM_UP = "hello, can you hear me"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        turns: Turns for each arm.
        calls: Calls at once.
        seed: Decides the questions and the delays.
        p5: 5th percentile of the stand-in endpoint's delays, in seconds, before `time_scale`.
        p95: Their 95th percentile.
        durations: The turn's other parts, before `time_scale`.
        time_scale: Factor on all of these; 1.0 for real time.
        live: Ask the real API instead of the stand-in.
    """

    turns: int = 48
    calls: int = 8
    seed: int = 1
    p5: float = 0.39
    p95: float = 1.16
    durations: Durations = field(default_factory=Durations)
    time_scale: float = 1.0
    live: bool = False

    def questions(self) -> list[str]:
        """As many different questions as there are turns."""
        texts = [question.text for question in QUESTIONS]
        return random.Random(self.seed).sample(texts, self.turns)

    def delays(self) -> Delays:
        """The endpoint's delays."""
        return Delays(p5=self.p5, p95=self.p95, seed=self.seed, time_scale=self.time_scale)


@dataclass(frozen=True)
class Turn:
    """What one turn showed, in seconds.

    Attributes:
        arm: The arm it belongs to.
        question: What the caller asked.
        first_audio: From the final transcript to the answer's first audio.
        exposed: What the chain waited for the embedding.
        head_start: From the prefetch to the chain's query for it; 0.0 without a prefetch.
        embedding: How long the embedding itself takes: the endpoint's draw, or live as measured.
    """

    arm: str
    question: str
    first_audio: float
    exposed: float
    head_start: float
    embedding: float

    @property
    def limit(self) -> float:
        """What is exposed at least, however well the prefetch works."""
        return max(0.0, self.embedding - self.head_start)


@dataclass(frozen=True)
class Result:
    """All turns, and the upstream calls that each arm made for them."""

    plan: Plan
    turns: tuple[Turn, ...]
    upstream_calls: dict[str, int]

    def of(self, arm: str) -> list[Turn]:
        """The turns of one arm."""
        return [turn for turn in self.turns if turn.arm == arm]


@dataclass(frozen=True)
class _Arm:
    """One arm's bot, with its probes."""

    name: str
    agent: Agent
    store: Chroma
    model: MeasuredEmbeddings
    waited: MeasuredEmbeddings
    prefetching: PrefetchingEmbeddings | None
    server: LocalOpenAI | None


async def run(plan: Plan, on_turn: Callable[[int], None]) -> Result:
    """Measure.

    Args:
        plan: What to measure.
        on_turn: Called after each turn with the number of turns done, both arms counted.
    """
    # A sync embedding call holds one thread of the loop's default pool. Its usual size on a small
    # machine, 6, would make calls wait for each other, which is not what is measured here.
    threads = concurrent.futures.ThreadPoolExecutor(max_workers=4 * plan.calls)
    asyncio.get_running_loop().set_default_executor(threads)
    async with contextlib.AsyncExitStack() as stack:
        arms = [await stack.enter_async_context(_arm(name, plan)) for name in ARMS]
        await _warm_up(arms, plan)
        turns: list[Turn] = []

        async def call(number: int, questions: Sequence[str]) -> None:
            await asyncio.sleep(number * _SECONDS_BETWEEN_CALLS * plan.time_scale)
            for index, question in enumerate(questions):
                for arm in arms if index % 2 == 0 else reversed(arms):
                    turns.append(await _turn(arm, question, plan))
                    on_turn(len(turns))

        questions = plan.questions()
        async with asyncio.TaskGroup() as calls:
            for number in range(plan.calls):
                calls.create_task(call(number, questions[number :: plan.calls]))
        upstream = {arm.name: _upstream_calls(arm) for arm in arms}
    return Result(plan, tuple(turns), upstream)


@contextlib.asynccontextmanager
async def _arm(name: str, plan: Plan) -> AsyncIterator[_Arm]:
    with contextlib.ExitStack() as stack:
        server = None if plan.live else stack.enter_context(LocalOpenAI(process=True))
        model = MeasuredEmbeddings(_openai(server))
        prefetching = None
        if name != OFF:
            prefetching = stack.enter_context(PrefetchingEmbeddings(model))
        waited = MeasuredEmbeddings(prefetching or model)
        store = await asyncio.to_thread(_knowledge_base, waited)
        stack.callback(store.delete_collection)
        agent = Agent(store, StandInLLM(seconds=plan.durations.llm * plan.time_scale), prefetching)
        yield _Arm(name, agent, store, model, waited, prefetching, server)


def _openai(server: LocalOpenAI | None) -> Embeddings:
    """The real client; without a server, for the real API and with the key in the environment."""
    if server is None:
        return OpenAIEmbeddings(model="text-embedding-3-small", check_embedding_ctx_length=False)
    return OpenAIEmbeddings(
        base_url=server.base_url,
        api_key=SecretStr("stand-in"),
        model="text-embedding-3-small",
        check_embedding_ctx_length=False,
    )


def _knowledge_base(embeddings: Embeddings) -> Chroma:
    store = Chroma(
        collection_name=f"help-desk-{uuid.uuid4().hex}",
        embedding_function=embeddings,
        client=chromadb.EphemeralClient(),
    )
    store.add_texts([passage.text for passage in PASSAGES])
    return store


async def _warm_up(arms: Sequence[_Arm], plan: Plan) -> None:
    """Open the connections and load what is loaded on first use, alike in both arms."""
    for arm in arms:
        await asyncio.gather(
            *(asyncio.to_thread(arm.model.embed_query, _WARM_UP) for _ in range(plan.calls))
        )
    await asyncio.gather(*(_turn(arm, _WARM_UP, plan) for arm in arms))
    for arm in arms:
        arm.model.forget_calls()
        arm.waited.forget_calls()
        if arm.server is not None:
            arm.server.reset_counts()
            arm.server.set_delays(plan.delays())


async def _turn(arm: _Arm, question: str, plan: Plan) -> Turn:
    """Let a caller ask one question, and listen."""
    durations = plan.durations.scaled(plan.time_scale)
    channel = StandInChannel(durations.filler)
    handler = StasisHandler(
        arm.agent,
        channel,
        StandInTextToSpeech(durations.tts),
        filler=FILLER,
        pause=durations.pause,
    )
    asked = time.perf_counter()
    await handler.on_final_transcript(question)
    _filler, (answered, _audio), *_ = channel.played
    text = normalise(question)
    query = arm.waited.calls_for(text)[-1]
    if arm.server is None:
        embedding = arm.model.calls_for(text)[-1].seconds
    else:
        embedding = plan.delays().seconds_for(text)
    return Turn(
        arm=arm.name,
        question=question,
        first_audio=answered - asked,
        exposed=query.seconds,
        head_start=query.began - asked if arm.prefetching is not None else 0.0,
        embedding=embedding,
    )


def _upstream_calls(arm: _Arm) -> int:
    """Calls that reached the endpoint; live, where nobody counts them there, calls to the model."""
    if arm.server is not None:
        return arm.server.stats().requests
    return arm.model.count
