"""The arms of the measurement: the same bot several times, each with its own way of retrieving."""

import asyncio
import contextlib
import importlib
import math
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import chromadb
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import Runnable, RunnableLambda
from prometheus_client import CollectorRegistry

from examples.local_openai import LocalOpenAI
from examples.local_openai.endpoint import API_KEY
from examples.voice_bot.agent import Agent, KnowledgeBase
from examples.voice_bot.knowledge import MODELS, passages_of
from examples.voice_bot.measuring import MeasuredEmbeddings, MeasuredRetriever
from examples.voice_bot.stand_ins import FarRetrieval, StandInLLM
from prefetch_embeddings import (
    PrefetchingEmbeddings,
    PrefetchingRetriever,
    PrefetchOutcome,
    UtterancePrefetcher,
    match_spoken,
)
from prefetch_embeddings.instrumentation import prometheus
from prefetch_embeddings.openai import voice_embeddings

OFF = "off"
PLAIN_TASK = "plain task at final"
EMBEDDING = "embedding at final"
AT_FINAL = "retrieval at final"
FROM_PARTIALS = "retrieval from partials"
FLOOR = "no retrieval"
ARMS = (OFF, EMBEDDING, PLAIN_TASK, AT_FINAL, FROM_PARTIALS, FLOOR)

_WARM_UP = "hello, can you hear me"


class TaskAgent(Agent):
    """What a bot would write itself: a task for each question, begun when it is known.

    Args:
        knowledge_bases: By name; their retriever is to take the question's task.
        llm: The chat model that words the answers.
        inner: By knowledge base, what the tasks ask.
        tasks: By question.
    """

    def __init__(
        self,
        knowledge_bases: Mapping[str, KnowledgeBase],
        llm: StandInLLM,
        inner: Mapping[str, FarRetrieval],
        tasks: dict[str, asyncio.Task[list[Document]]],
    ) -> None:
        super().__init__(knowledge_bases, llm)
        self._inner = inner
        self._tasks = tasks

    def prefetch_query_embedding(self, text: str, kb: str) -> PrefetchOutcome:
        """Begin the task."""
        self._tasks[text] = asyncio.create_task(self._inner[kb].ainvoke(text))
        return PrefetchOutcome.STARTED

    def is_ready(self, text: str, kb: str) -> bool:  # noqa: ARG002
        """Tell whether the task is done."""
        return self._tasks[text].done()

    def expected_wait(self, text: str, kb: str) -> float:
        """Return 0 for a task that is done; of the others it knows nothing."""
        return 0.0 if self.is_ready(text, kb) else math.inf


class AgentWithoutRetrieval(Agent):
    """The floor: the same bot, which answers from what it has been told beforehand."""

    def expected_wait(self, text: str, kb: str) -> float:  # noqa: ARG002
        """Return 0.0: it waits for nothing."""
        return 0.0


@dataclass
class Arm:
    """One arm's bot.

    Attributes:
        name: One of `ARMS`.
        agent: The bot's agent.
        waited: By knowledge base, what its chain waits for.
        models: The models at the bottom, one for each name.
        searches: By knowledge base, what is searched far away.
        server: Where the models ask; None for the user's own model.
    """

    name: str
    agent: Agent
    waited: Mapping[str, MeasuredRetriever]
    models: Mapping[str, MeasuredEmbeddings]
    searches: Mapping[str, FarRetrieval]
    server: LocalOpenAI | None

    def listen(self, kb: str, time_scale: float) -> UtterancePrefetcher | None:
        """What takes in one call's partial transcripts, in the arm that does: `Agent.listen`'s."""
        speech = self.agent.listen(kb) if self.name == FROM_PARTIALS else None
        ahead = self.waited[kb].underlying_retriever
        if speech is None or not isinstance(ahead, PrefetchingRetriever) or time_scale == 1:
            return speech
        return UtterancePrefetcher(
            ahead,
            debounce=speech.debounce * time_scale,
            min_words=speech.min_words,
            max_calls=speech.max_calls,
        )

    def model_of(self, kb: str) -> MeasuredEmbeddings:
        """The model of a knowledge base."""
        return self.models[MODELS[kb]]

    async def warm_up(self, connections: int) -> None:
        """Open the connections and load what is loaded on first use."""
        for model in self.models.values():
            await asyncio.gather(
                *(asyncio.to_thread(model.embed_query, _WARM_UP) for _ in range(connections))
            )

    def begin(self) -> None:
        """Count from here on."""
        for model in self.models.values():
            model.calls.forget_calls()
        for search in self.searches.values():
            search.searches.clear()
        if self.server is not None:
            self.server.reset_counts()

    def model_calls(self) -> int:
        """Calls that reached the endpoint; where nobody counts them there, calls to the model."""
        if self.server is not None:
            return self.server.stats().requests
        return sum(model.calls.count for model in self.models.values())

    def search_calls(self) -> int:
        """Searches far away."""
        return sum(len(search.searches) for search in self.searches.values())


@contextlib.asynccontextmanager
async def open_arm(
    name: str,
    *,
    model: str | None,
    calls: int,
    turns: int,
    llm_seconds: float,
    retrieval_seconds: float,
    registry: CollectorRegistry,
) -> AsyncIterator[Arm]:
    """Open an arm.

    Args:
        name: One of `ARMS`.
        model: The user's own model, as `own_model` takes it; None for the local stand-in.
        calls: Telephone calls at once.
        turns: Questions that it will be asked.
        llm_seconds: What its chat model takes.
        retrieval_seconds: What the search and the reranker take, besides the embedding.
        registry: Where the figures of its wrappers are exported.
    """
    with contextlib.ExitStack() as stack:
        server = None if model else stack.enter_context(LocalOpenAI(process=True))
        make = _stand_in_model(server) if server is not None else own_model(model or "")
        ample: dict[str, Any] = {  # partial transcripts: some calls for each caller
            "ttl": 3600.0,
            "max_entries": max(1024, 20 * turns),
            "max_workers": 4 * calls,
            "match": match_spoken,
        }
        models: dict[str, MeasuredEmbeddings] = {}
        wrapped: dict[str, PrefetchingEmbeddings | None] = {}
        for model_name in dict.fromkeys(MODELS.values()):
            models[model_name] = MeasuredEmbeddings(make(model_name))
            wrapped[model_name] = None
            if name in (EMBEDDING, AT_FINAL, FROM_PARTIALS):
                embeddings = PrefetchingEmbeddings(models[model_name], **ample)
                wrapped[model_name] = stack.enter_context(embeddings)
                prometheus.instrument(embeddings, name=f"{name}, {model_name}", registry=registry)
        client = chromadb.EphemeralClient()
        knowledge_bases: dict[str, KnowledgeBase] = {}
        waited: dict[str, MeasuredRetriever] = {}
        searches: dict[str, FarRetrieval] = {}
        tasks: dict[str, asyncio.Task[list[Document]]] = {}
        for kb, model_name in MODELS.items():
            prefetching = wrapped[model_name]
            store = Chroma(
                f"{kb}-{uuid.uuid4().hex}", prefetching or models[model_name], client=client
            )
            stack.callback(store.delete_collection)
            await asyncio.to_thread(store.add_texts, passages_of(kb))
            search = searches[kb] = FarRetrieval(store=store, seconds=retrieval_seconds)
            ahead: PrefetchingEmbeddings | PrefetchingRetriever | None = prefetching
            asked: Runnable[str, list[Document]] = search
            if name in (AT_FINAL, FROM_PARTIALS):
                asked = ahead = stack.enter_context(PrefetchingRetriever(search, **ample))
                prometheus.instrument(ahead, name=f"{name}, {kb}", registry=registry)
            elif name == PLAIN_TASK:
                asked = _taking(tasks)
            elif name == FLOOR:
                asked = _knowing(passages_of(kb)[:3])
            waited[kb] = MeasuredRetriever(underlying_retriever=asked)
            knowledge_bases[kb] = KnowledgeBase(store, ahead, waited[kb])
        llm = StandInLLM(seconds=llm_seconds)
        agent = Agent(knowledge_bases, llm)
        if name == PLAIN_TASK:
            agent = TaskAgent(knowledge_bases, llm, searches, tasks)
        elif name == FLOOR:
            agent = AgentWithoutRetrieval(knowledge_bases, llm)
        yield Arm(name, agent, waited, models, searches, server)


def _taking(tasks: dict[str, asyncio.Task[list[Document]]]) -> Runnable[str, list[Document]]:
    """Return what a chain must be given so that it takes a question's task."""

    async def take(text: str) -> list[Document]:
        return await tasks.pop(text)

    def take_in_a_thread(text: str) -> list[Document]:
        raise NotImplementedError(f"a task belongs to its loop: {text}")

    return RunnableLambda(take_in_a_thread, take)


def _knowing(texts: list[str]) -> Runnable[str, list[Document]]:
    """Return what answers at once, always with the same passages."""
    return RunnableLambda(lambda _: [Document(text) for text in texts])


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
