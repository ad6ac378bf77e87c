"""The quickstart with a Redis tier: what one worker has embedded, no other embeds again.

Offline, on the local stand-in, with a Redis server on its usual port:

    python -m examples.local_openai --p5 0.39 --p95 1.16 -- python -m examples.quickstart_redis
"""

import os
import time

from langchain_chroma import Chroma
from langchain_openai import OpenAIEmbeddings

from examples.knowledge_base import PASSAGES
from prefetch_embeddings import PrefetchingEmbeddings, RedisCachedEmbeddings

model = OpenAIEmbeddings(check_embedding_ctx_length=False)  # no tokenizer to download
cached = RedisCachedEmbeddings(
    model,
    os.environ.get("REDIS_URL", "redis://localhost:6379/0"),
    single_flight=True,  # workers that ask for the same question at once make one call
)
embeddings = PrefetchingEmbeddings(cached)
store = Chroma.from_texts([passage.text for passage in PASSAGES], embeddings)
retriever = store.as_retriever(search_kwargs={"k": 3})

question = "there's a red light on my router"
embeddings.prefetch(question)  # as soon as the question is known; returns at once
time.sleep(1.0)  # here the bot says "one moment, please"

began = time.perf_counter()
documents = retriever.invoke(question)  # run this twice: the second time out of Redis
print(f"{documents[0].page_content}\nfound after {time.perf_counter() - began:.3f} s")

stats = cached.stats()
print(f"out of Redis: {stats.hits} of {stats.hits + stats.misses + stats.skipped} texts")
embeddings.close()
cached.close()  # lets the last vectors reach Redis
