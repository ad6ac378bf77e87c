"""The retriever you have, with its query's embedding started earlier.

Offline, on the local stand-in:

    python -m examples.local_openai --p5 0.39 --p95 1.16 -- python -m examples.quickstart
"""

import time

from langchain_chroma import Chroma
from langchain_openai import OpenAIEmbeddings

from examples.knowledge_base import PASSAGES
from prefetch_embeddings import PrefetchingEmbeddings

model = OpenAIEmbeddings(check_embedding_ctx_length=False)  # no tokenizer to download
embeddings = PrefetchingEmbeddings(model)
store = Chroma.from_texts([passage.text for passage in PASSAGES], embeddings)
retriever = store.as_retriever(search_kwargs={"k": 3})

question = "there's a red light on my router"
embeddings.prefetch(question)  # as soon as the question is known; returns at once
time.sleep(1.0)  # here the bot says "one moment, please"

began = time.perf_counter()
documents = retriever.invoke(question)  # finds the vector ready, or joins the call under way
print(f"{documents[0].page_content}\nfound after {time.perf_counter() - began:.3f} s")
