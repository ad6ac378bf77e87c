"""A user's code, type-checked and never run: what the public surface takes and gives.

Where a comment ignores an error, there must be that error: both checkers warn of comments that
ignore nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from typing import Literal, assert_never, assert_type

import redis
import redis.asyncio
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from opentelemetry.metrics import get_meter_provider
from opentelemetry.trace import get_tracer_provider
from prometheus_client import CollectorRegistry

import prefetch_embeddings.instrumentation.opentelemetry
import prefetch_embeddings.instrumentation.prometheus
from prefetch_embeddings import (
    ENGLISH_FILLERS,
    FILLERS,
    RUSSIAN_FILLERS,
    Hedge,
    HedgeStarted,
    MatchSpoken,
    Miss,
    MissReason,
    PrefetchDropped,
    PrefetchEvent,
    PrefetchFailed,
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchOutcome,
    PrefetchStarted,
    PrefetchStats,
    PrefetchSucceeded,
    QueryFailed,
    QueryServed,
    RedisCachedEmbeddings,
    RedisCacheEvent,
    RedisCacheEventKind,
    RedisCacheStats,
    SpeechStats,
    UtterancePrefetcher,
    UtteranceStats,
    match_spoken,
    prefetch_tap,
)
from prefetch_embeddings.existing import (
    CacheBackedEmbeddingsCache,
    ExistingCache,
    RedisVLEmbeddingsCache,
)
from prefetch_embeddings.instrumentation import opentelemetry, prometheus
from prefetch_embeddings.openai import voice_embeddings
from prefetch_embeddings.replay import (
    Line,
    LoggedSpeech,
    Outcome,
    TranscriptLog,
    advice,
    read,
    replay,
    table,
)
from prefetch_embeddings.speech import Prefetches
from prefetch_embeddings.testing import (
    Gate,
    ManualExecutor,
    ManualPrefetchingEmbeddings,
    ManualPrefetchingRetriever,
    ManualTime,
    ScriptedEmbeddings,
    ScriptedRetriever,
    assert_no_leaks,
)

# --- Making one ----------------------------------------------------------------------------------

model: Embeddings = ScriptedEmbeddings()


def first_word(text: str) -> Hashable:
    return text.split()[0]


def search(text: str) -> list[Document]:
    return [Document(text)]


def on_event(event: PrefetchEvent) -> None:
    assert_type(event.text_digest, str)
    assert_type(event.kind, Literal["embedding", "retrieval"])
    assert_type(event.text_length, int)
    match event:
        case PrefetchStarted() | HedgeStarted():
            assert_type(event.flight, int)
        case PrefetchSucceeded():
            assert_type((event.flight, event.seconds, event.attempt), tuple[int, float, int])
        case PrefetchFailed():
            assert_type((event.error, event.attempt, event.will_retry), tuple[str, int, bool])
        case PrefetchDropped():
            print(event.flight)  # type: ignore[attr-defined]  # it has none
        case QueryServed():
            assert_type(event.how, Literal["ready", "joined", "claimed", "missed"])
            assert_type((event.flight, event.seconds, event.recovered), tuple[int, float, bool])
        case QueryFailed():
            assert_type((event.flight, event.error, event.seconds), tuple[int, str, float])
            event.seconds = 0.0  # type: ignore[misc]  # frozen
        case _:
            assert_type(event, PrefetchEvent)


embeddings = PrefetchingEmbeddings(
    model,
    ttl=300,
    max_entries=1024,
    max_workers=32,
    max_pending=256,
    attempts=2,
    match=first_word,
    symmetric=True,
    hedge=Hedge(quantile=0.95, budget=0.05),
    on_event=on_event,
)
assert_type(embeddings.underlying_embeddings, Embeddings)
embeddings.underlying_embeddings = model  # type: ignore[misc]  # to be read only
PrefetchingEmbeddings(underlying_embeddings=model, match=str.casefold, on_event=print)
PrefetchingEmbeddings(PrefetchingEmbeddings(OpenAIEmbeddings()))
PrefetchingEmbeddings("text-embedding-3-small")  # type: ignore[arg-type]
PrefetchingEmbeddings(model, 300.0)  # type: ignore[call-arg]  # keywords only
PrefetchingEmbeddings(model, ttl="5m")  # type: ignore[arg-type]
PrefetchingEmbeddings(model, match=str.split)  # type: ignore[arg-type]  # a list has no hash
PrefetchingEmbeddings(model, retries=2)  # type: ignore[call-arg]
hedge = Hedge(after=1)
assert_type((hedge.after, hedge.quantile), tuple[float | None, float | None])
assert_type(hedge.budget, float)
Hedge(0.5)  # type: ignore[call-arg]

# --- Prefetching ---------------------------------------------------------------------------------

outcome = embeddings.prefetch("q")
assert_type(outcome, PrefetchOutcome)
assert_type(embeddings.prefetch_many(text for text in ("a", "b")), list[PrefetchOutcome])
assert_type(embeddings.wait_for_prefetch("q"), bool)
assert_type(embeddings.wait_for_prefetch("q", timeout=1), bool)
assert_type(embeddings.is_ready("q"), bool)
assert_type(embeddings.expected_wait("q"), float)
assert_type(embeddings.forget("q"), bool)
assert_type(embeddings.clear(), None)
assert_type(embeddings.warm_up(), float)
embeddings.prefetch(b"q")  # type: ignore[arg-type]
embeddings.prefetch_many(["a", 1])  # type: ignore[list-item]
print(embeddings.vectors)  # type: ignore[attr-defined]  # nothing is passed on to the model

as_text: str = outcome
match outcome:
    case PrefetchOutcome.STARTED | PrefetchOutcome.IN_FLIGHT | PrefetchOutcome.READY:
        pass
    case PrefetchOutcome.DROPPED:
        pass
    case _:
        assert_never(outcome)

miss = embeddings.explain_miss("q")
if miss is not None:
    assert_type((miss.reason.value, miss.text_digest, miss.nearest_digest), tuple[str, str, str])
    assert_type((miss.text_length, miss.nearest_length), tuple[int, int])
    assert_type((miss.similarity, miss.seconds), tuple[float, float])

# --- LangChain -----------------------------------------------------------------------------------

assert_type(embeddings.embed_query("q"), list[float])
assert_type(embeddings.embed_query(text="q", chunk_size=8), list[float])
assert_type(embeddings.embed_documents(["d"]), list[list[float]])
retriever = InMemoryVectorStore(embeddings).as_retriever()
as_embeddings: Embeddings = embeddings


async def use_it_on_a_loop() -> None:
    assert_type(await embeddings.aprefetch("q"), PrefetchOutcome)
    assert_type(await embeddings.await_for_prefetch("q", 0.5), bool)
    assert_type(await embeddings.aembed_query("q"), list[float])
    assert_type(await embeddings.aembed_documents(["d"]), list[list[float]])
    assert_type(await embeddings.awarm_up(), float)
    async with PrefetchingEmbeddings(model) as wrapper:
        assert_type(wrapper, PrefetchingEmbeddings)
    async with RedisCachedEmbeddings(model, "redis://localhost") as tier:
        assert_type(tier, RedisCachedEmbeddings)
        assert_type(await tier.aforget("q"), bool)
        assert_type(await tier.aembed_query("q"), list[float])
        assert_type(await tier.aembed_documents(["d"]), list[list[float]])
        assert_type(await tier.awarm_up(), float)
    assert_type(await tier.aclose(), None)


asyncio.run(use_it_on_a_loop())

with PrefetchingEmbeddings(model) as wrapper:
    assert_type(wrapper, PrefetchingEmbeddings)
assert_type(wrapper.close(), None)

# --- Retrieval -----------------------------------------------------------------------------------

ahead = PrefetchingRetriever(
    retriever,
    ttl=60,
    max_entries=256,
    max_workers=32,
    max_pending=256,
    attempts=2,
    match=str.casefold,
    hedge=hedge,
    on_event=on_event,
)
as_retriever: BaseRetriever = ahead
assert_type(ahead.underlying_retriever, Runnable[str, list[Document]])
PrefetchingRetriever(RunnableLambda(search))
PrefetchingRetriever("store")  # type: ignore[arg-type]
PrefetchingRetriever(retriever, 60.0)  # type: ignore[call-arg]  # keywords only
config = RunnableConfig(configurable={"tenant": "a"})
assert_type(ahead.prefetch("q"), PrefetchOutcome)
assert_type(ahead.prefetch("q", config), PrefetchOutcome)
assert_type(ahead.prefetch_many(["q"], config), list[PrefetchOutcome])
assert_type(ahead.wait_for_prefetch("q", 1.0, config), bool)
assert_type(ahead.is_ready("q", config), bool)
assert_type(ahead.expected_wait("q", config), float)
assert_type(ahead.explain_miss("q", config), Miss | None)
assert_type(ahead.forget("q", config), bool)
assert_type(ahead.stats(), PrefetchStats)
assert_type(ahead.prefetcher.closed, bool)
assert_type(ahead.invoke("q"), list[Document])
assert_type(ahead.clear(), None)
UtterancePrefetcher(ahead)
prefetch_tap(ahead)


async def retrieve_on_a_loop() -> None:
    assert_type(await ahead.aprefetch("q", config), PrefetchOutcome)
    assert_type(await ahead.await_for_prefetch("q", 0.5, config), bool)
    assert_type(await ahead.ainvoke("q"), list[Document])
    async with PrefetchingRetriever(retriever) as wrapper:
        assert_type(wrapper, PrefetchingRetriever)
    assert_type(wrapper.close(), None)


asyncio.run(retrieve_on_a_loop())

# --- What it tells -------------------------------------------------------------------------------

assert_type(embeddings.prefetcher.closed, bool)
asked, ticket = embeddings.prefetcher.ask("q")
assert_type(asked, PrefetchOutcome)
if ticket is not None:
    assert_type(embeddings.prefetcher.take_back(ticket), bool)
before = embeddings.stats()
during = embeddings.stats() - before
assert_type(during, PrefetchStats)
assert_type(
    [
        during.prefetch_started,
        during.prefetch_deduplicated,
        during.prefetch_dropped,
        during.prefetch_succeeded,
        during.prefetch_failed,
        during.prefetch_withdrawn,
        during.prefetch_retried,
        during.prefetch_used,
        during.prefetch_wasted,
        during.query_ready,
        during.query_joined,
        during.query_claimed,
        during.query_missed,
        during.query_recovered,
        during.query_failed,
        during.query_matched,
        during.hedge_started,
        during.hedge_won,
        during.hedge_denied,
        during.overdue_calls,
    ],
    list[int],
)
assert_type((during.hidden_seconds, during.exposed_seconds), tuple[float, float])
during.query_ready = 0  # type: ignore[misc]  # frozen
during - 1  # type: ignore[operator]

# --- Redis ---------------------------------------------------------------------------------------


def on_redis_event(event: RedisCacheEvent) -> None:
    assert_type(event.kind, RedisCacheEventKind)
    assert_type((event.count, event.seconds, event.error), tuple[int, float, str | None])
    match event.kind:
        case RedisCacheEventKind.HIT | RedisCacheEventKind.MISS | RedisCacheEventKind.SKIPPED:
            pass
        case RedisCacheEventKind.CORRUPT | RedisCacheEventKind.ERROR:
            pass
        case RedisCacheEventKind.WRITTEN | RedisCacheEventKind.WRITE_DROPPED:
            pass
        case RedisCacheEventKind.CARRIED_OVER | RedisCacheEventKind.WAITED:
            pass
        case RedisCacheEventKind.BREAKER_OPENED | RedisCacheEventKind.BREAKER_CLOSED:
            pass
        case _:
            assert_never(event.kind)


tier = RedisCachedEmbeddings(
    OpenAIEmbeddings(),
    "redis://localhost:6379/0",
    model_id="m",
    ttl=None,
    prefix="p",
    timeout=0.1,
    single_flight=True,
    on_event=on_redis_event,
    read_through=[
        CacheBackedEmbeddingsCache(roles=["document"], namespace="m"),
        RedisVLEmbeddingsCache(roles={"query", "document"}, model_name="m"),
    ],
    lease=3.0,
    secret=b"shared",
)
RedisCachedEmbeddings(model, client=redis.Redis(), async_client=redis.asyncio.Redis(), model_id="m")
redis_stats = tier.stats() - tier.stats()
assert_type(redis_stats, RedisCacheStats)
assert_type(
    [
        redis_stats.hits,
        redis_stats.misses,
        redis_stats.skipped,
        redis_stats.corrupt,
        redis_stats.errors,
        redis_stats.writes,
        redis_stats.writes_dropped,
        redis_stats.carried_over,
        redis_stats.waited,
    ],
    list[int],
)
assert_type((redis_stats.redis_seconds, redis_stats.waited_seconds), tuple[float, float])
assert_type(tier.embed_query("q"), list[float])
assert_type(tier.embed_documents(["d"]), list[list[float]])
assert_type(tier.warm_up(), float)
assert_type(tier.flush(timeout=1), bool)
assert_type(tier.forget("q"), bool)
assert_type(tier.close(), None)
older: ExistingCache = RedisVLEmbeddingsCache(roles=["query"], model_name="m")
assert_type(older.vector("q", older.command("q")), list[float] | None)
PrefetchingEmbeddings(tier, on_event=on_redis_event)  # type: ignore[arg-type]
CacheBackedEmbeddingsCache(roles=["passage"])  # type: ignore[list-item]
tier.stats() - embeddings.stats()  # type: ignore[operator]

# --- Speech --------------------------------------------------------------------------------------

spoken = PrefetchingEmbeddings(model, match=match_spoken)
PrefetchingEmbeddings(model, match=MatchSpoken(fillers=ENGLISH_FILLERS | RUSSIAN_FILLERS))
PrefetchingEmbeddings(model, match=MatchSpoken("en", "ru", fillers={"please"}))
MatchSpoken({"please"})  # type: ignore[arg-type]  # languages come first
assert_type(FILLERS["ru"], frozenset[str])
speech = UtterancePrefetcher(spoken, debounce=0.3, min_words=3, max_calls=5)
assert_type(UtterancePrefetcher.for_many_partials(spoken), UtterancePrefetcher)
assert_type(UtterancePrefetcher.for_few_partials(spoken), UtterancePrefetcher)
assert_type(UtterancePrefetcher.for_eager_turn_ends(spoken), UtterancePrefetcher)
UtterancePrefetcher(spoken, 0.3)  # type: ignore[call-arg]  # keywords only
UtterancePrefetcher(model)  # type: ignore[arg-type]  # prefetches nothing
assert_type(speech.on_partial("how much"), None)
assert_type(speech.on_final("how much is it"), None)
assert_type(speech.on_speech_started(), None)
assert_type(speech.on_speech_stopped(), None)
assert_type(speech.reset(), None)
spoken_so_far = speech.stats() - speech.stats()
assert_type(spoken_so_far, SpeechStats)
assert_type((spoken_so_far.utterances, spoken_so_far.calls), tuple[int, int])
assert_type(spoken_so_far.served, int)
assert_type((spoken_so_far.withdrawn, spoken_so_far.wasted), tuple[int, int])
assert_type((spoken_so_far.hits, spoken_so_far.lead_seconds), tuple[int, float])
utterance = speech.last_utterance
assert_type(utterance, UtteranceStats | None)
if utterance is not None:
    assert_type((utterance.calls, utterance.withdrawn, utterance.wasted), tuple[int, int, int])
    assert_type((utterance.hit, utterance.lead), tuple[bool, float])
    assert_type(utterance.served, bool)
miss = spoken.explain_miss("how much is it")
assert_type(miss, Miss | None)
if miss is not None:
    assert_type(miss.reason, MissReason)
    match miss.reason:
        case MissReason.NEVER_PREFETCHED | MissReason.GONE:
            pass
        case MissReason.REWRITTEN | MissReason.PREFIX:
            pass
        case MissReason.PUNCTUATION | MissReason.CASE | MissReason.CONFIG:
            pass
        case MissReason.DROPPED | MissReason.PAUSED:
            pass
        case MissReason.NEVER_ASKED | MissReason.CLOSED:
            pass
        case _:
            assert_never(miss.reason)
prefetch_tap(spoken).invoke("how much is it")

log = TranscriptLog("calls.jsonl", texts=False, clock=time.monotonic)
logged = LoggedSpeech(speech, log, "call 1")
assert_type(logged.on_partial("how much"), None)
assert_type(logged.on_final("how much is it"), None)
assert_type(logged.on_speech_started(), None)
assert_type(logged.on_speech_stopped(), None)
assert_type(logged.reset(), None)
assert_type(log.partial("call 1", "how much"), None)
assert_type(log.final("call 1", "how much is it"), None)
assert_type(log.speech_started("call 1"), None)
assert_type(log.speech_stopped("call 1"), None)
assert_type(log.query("call 1", "how much is it", seconds=0.7), None)
assert_type(log.hang_up("call 1"), None)
assert_type(log.close(), None)
lines, bad = read(["{}"])
assert_type(lines, list[Line])
assert_type(bad, list[int])
for line in lines:
    assert_type((line.call, line.t, line.e == "final", line.text), tuple[str, float, bool, str])
    assert_type(line.seconds, float | None)
outcomes = replay(lines, lambda line: line.seconds or 0.7)
for each in outcomes:
    assert_type(each, Outcome)
    assert_type((each.name, each.turns, each.calls), tuple[str, int, int])
    assert_type((each.hits, each.finals, each.lead_seconds), tuple[int, int, float])
    assert_type(each.exposed, tuple[float, ...])
    assert_type(
        (each.calls_a_turn, each.exposed_mean, each.exposed_p95), tuple[float, float, float]
    )
print(table(outcomes), advice(outcomes))

# --- Optional parts ------------------------------------------------------------------------------

assert_type(voice_embeddings(model="text-embedding-3-small", read_timeout=3), OpenAIEmbeddings)

prometheus.instrument(embeddings)
prometheus.instrument(tier, name="redis", registry=CollectorRegistry())
prometheus.instrument(embeddings, "bot")  # type: ignore[call-arg]  # keywords only
prometheus.instrument(model)  # type: ignore[arg-type]  # has no figures
opentelemetry.instrument(embeddings)
opentelemetry.instrument(
    tier,
    name="redis",
    meter_provider=get_meter_provider(),
    tracer_provider=get_tracer_provider(),
)
opentelemetry.instrument(embeddings, registry=None)  # type: ignore[call-arg]
assert_type(prefetch_embeddings.instrumentation.prometheus.instrument(embeddings, name="b"), None)
prefetch_embeddings.instrumentation.opentelemetry.instrument(embeddings, name="b")

# --- Testing one's own code ----------------------------------------------------------------------

scripted = ScriptedEmbeddings(8, delays={"slow": 0.5})
ScriptedEmbeddings(delays=lambda text: len(text) / 100)
gate = scripted.hold("q")
assert_type(gate, Gate)
assert_type(gate.wait_until_entered(), None)
assert_type(gate.open(), None)
assert_type(gate.hold(), None)
scripted.fail("q", ValueError(), asyncio.CancelledError())
scripted.fail("q", ValueError)  # type: ignore[arg-type]  # an instance
assert_type(scripted.calls, list[tuple[str, tuple[str, ...]]])
assert_type(scripted.calls_for("q"), int)
assert_type(scripted.vector("q"), list[float])
searching = ScriptedRetriever(delays={"slow": 0.5})
assert_type(searching.documents("q"), list[Document])
assert_type(searching.hold("q"), Gate)
searching.fail("q", ValueError())
with ManualPrefetchingRetriever(searching, ttl=1.0) as by_hand:
    assert_type(by_hand, ManualPrefetchingRetriever)
    assert_type(by_hand.executor.run_all(), int)
    by_hand.time.advance(1.0)
assert_no_leaks(by_hand)
with ManualPrefetchingEmbeddings(scripted, ttl=1.0) as manual:
    assert_type(manual, ManualPrefetchingEmbeddings)
    assert_type(manual.executor, ManualExecutor)
    assert_type(manual.time, ManualTime)
    assert_type(manual.executor.run_next(), bool)
    assert_type(manual.executor.run_all(), int)
    manual.executor.refusing = True
    assert_type(len(manual.executor), int)
    assert_type(manual.time.advance(1), None)
    assert_type(manual.time.calls_to_come, int)
    assert_type(manual.time(), float)
assert_no_leaks(manual)


async def hold_it_on_a_loop() -> None:
    assert_type(await gate.await_until_entered(), None)
    assert_type(await gate.ahold(), None)


asyncio.run(hold_it_on_a_loop())

# --- What the library itself calls ---------------------------------------------------------------

assert_type(manual.executor.accepts, bool)
assert_type(manual.executor.wake(), bool)
assert_type(manual.executor.join(1), bool)
assert_type(manual.executor.close(), None)
assert_type(manual.executor.reset_after_fork(), None)
assert_type(manual.time.call_later(1, print), bool)
assert_type(manual.time.close(), None)
assert_type(manual.time.reset_after_fork(), None)

# --- What speech stands on -----------------------------------------------------------------------

anything_that_prefetches: Prefetches = manual
assert_type(UtterancePrefetcher(anything_that_prefetches), UtterancePrefetcher)
