"""The arms of the measurement: the same bot four times, each with its own way of embedding."""

import asyncio
import contextlib
import importlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import chromadb
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings
from prometheus_client import CollectorRegistry

from examples.local_openai import LocalOpenAI
from examples.local_openai.endpoint import API_KEY
from examples.voice_bot.agent import Agent, KnowledgeBase
from examples.voice_bot.knowledge import MODELS, Asked, passages_of
from examples.voice_bot.measuring import MeasuredEmbeddings
from examples.voice_bot.stand_ins import StandInLLM
from prefetch_embeddings import PrefetchingEmbeddings, UtterancePrefetcher
from prefetch_embeddings.instrumentation import prometheus
from prefetch_embeddings.openai import voice_embeddings

OFF = "off"
AT_FINAL = "prefetch at final"
FROM_PARTIALS = "prefetch from partials"
CACHED = "already cached"
ARMS = (OFF, AT_FINAL, FROM_PARTIALS, CACHED)

_WARM_UP = "hello, can you hear me"


@dataclass(frozen=True)
class Measured:
    """One embedding model within an arm, with its probes.

    Args:
        model: What the model was asked.
        waited: What the vector stores waited for.
        prefetching: The wrapper between the two; None in the arm without.
    """

    model: MeasuredEmbeddings
    waited: MeasuredEmbeddings
    prefetching: PrefetchingEmbeddings | None


@dataclass
class Arm:
    """One arm's bot."""

    name: str
    agent: Agent
    models: Mapping[str, Measured]  # by knowledge base
    server: LocalOpenAI | None
    cached_at: dict[str, float] = field(default_factory=dict)  # by question, on `perf_counter`

    def listen(self, kb: str, time_scale: float) -> UtterancePrefetcher | None:
        """What takes in one call's partial transcripts, in the arm that does: `Agent.listen`'s."""
        speech = self.agent.listen(kb) if self.name == FROM_PARTIALS else None
        prefetching = self.models[kb].prefetching
        if speech is None or prefetching is None or time_scale == 1:
            return speech
        return UtterancePrefetcher(
            prefetching,
            debounce=speech.debounce * time_scale,
            min_words=speech.min_words,
            max_calls=speech.max_calls,
        )

    async def warm_up(self, connections: int) -> None:
        """Open the connections and load what is loaded on first use."""
        for measured in self._distinct():
            await asyncio.gather(
                *(
                    asyncio.to_thread(measured.model.embed_query, _WARM_UP)
                    for _ in range(connections)
                )
            )

    async def cache(self, questions: Sequence[Asked]) -> None:
        """Embed all questions beforehand."""
        for question in questions:
            self.agent.ensure_prefetched_embedding(question.text, question.kb)
        for question in questions:
            if not await self.agent.wait_for_prefetch(question.text):
                raise RuntimeError("a question could not be embedded")
            self.cached_at[question.text] = time.perf_counter()

    def begin(self) -> None:
        """Count from here on."""
        for measured in self._distinct():
            measured.model.forget_calls()
            measured.waited.forget_calls()
        if self.server is not None:
            self.server.reset_counts()

    def upstream_calls(self) -> int:
        """Calls that reached the endpoint; where nobody counts them there, calls to the model."""
        if self.server is not None:
            return self.server.stats().requests
        return sum(measured.model.count for measured in self._distinct())

    def _distinct(self) -> list[Measured]:
        return list({id(measured): measured for measured in self.models.values()}.values())


@contextlib.asynccontextmanager
async def open_arm(
    name: str,
    *,
    model: str | None,
    calls: int,
    turns: int,
    llm_seconds: float,
    registry: CollectorRegistry,
) -> AsyncIterator[Arm]:
    """Open an arm.

    Args:
        name: One of `ARMS`.
        model: The user's own model, as `own_model` takes it; None for the local stand-in.
        calls: Telephone calls at once.
        turns: Questions that it will be asked.
        llm_seconds: What its chat model takes.
        registry: Where the figures of its wrappers are exported.
    """
    with contextlib.ExitStack() as stack:
        server = None if model else stack.enter_context(LocalOpenAI(process=True))
        make = _stand_in_model(server) if server is not None else own_model(model or "")
        measured = {}
        for model_name in dict.fromkeys(MODELS.values()):
            probed = MeasuredEmbeddings(make(model_name))
            prefetching = None
            if name != OFF:
                prefetching = stack.enter_context(
                    PrefetchingEmbeddings(
                        probed,
                        ttl=3600.0,
                        max_entries=max(1024, 20 * turns),
                        max_workers=4 * calls,  # partial transcripts: some calls for each caller
                    )
                )
                prometheus.instrument(prefetching, name=f"{name}, {model_name}", registry=registry)
            measured[model_name] = Measured(
                probed, MeasuredEmbeddings(prefetching or probed), prefetching
            )
        client = chromadb.EphemeralClient()
        knowledge_bases = {}
        for kb, model_name in MODELS.items():
            store = Chroma(f"{kb}-{uuid.uuid4().hex}", measured[model_name].waited, client=client)
            stack.callback(store.delete_collection)
            await asyncio.to_thread(store.add_texts, passages_of(kb))
            knowledge_bases[kb] = KnowledgeBase(store, measured[model_name].prefetching)
        agent = Agent(knowledge_bases, StandInLLM(seconds=llm_seconds))
        models = {kb: measured[model_name] for kb, model_name in MODELS.items()}
        yield Arm(name, agent, models, server)


def _stand_in_model(server: LocalOpenAI) -> Callable[[str], Embeddings]:
    """The real client, speaking to the stand-in."""
    return lambda model_name: voice_embeddings(
        base_url=server.base_url,
        api_key=API_KEY,
        model=model_name,
        check_embedding_ctx_length=False,
    )


def own_model(spec: str) -> Callable[[str], Embeddings]:
    """What makes the user's own model, in place of each of the demo's.

    Args:
        spec: An OpenAI model's name, or ``package.module:name`` of an `Embeddings` or of a function
            without arguments that returns one.

    Raises:
        ValueError: If there is no such thing.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        return lambda _: voice_embeddings(model=spec, check_embedding_ctx_length=False)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no {spec}: {error}") from error

    def make(_: str) -> Embeddings:
        model = found if isinstance(found, Embeddings) else found()
        if not isinstance(model, Embeddings):
            raise TypeError(f"{spec} is no Embeddings, and makes none")
        return model

    return make
