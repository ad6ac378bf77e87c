"""A local stand-in for OpenAI's embeddings endpoint, for tests, examples and benchmarks.

It speaks enough of ``POST /v1/embeddings`` for the real ``langchain_openai.OpenAIEmbeddings``, is
as slow as it is told to be, fails when it is told to, and counts what reaches it. Its vectors
compare spellings, not meanings: it is no embedding model, and says so in each answer.

    with LocalOpenAI(delays=Delays(p5=0.39, p95=1.16)) as server:
        embeddings = OpenAIEmbeddings(
            base_url=server.base_url, api_key="stand-in", check_embedding_ctx_length=False
        )
        embeddings.embed_query("is the office open on sundays")
        print(server.stats().requests)

``LocalOpenAI(process=True)`` runs the same server in a process of its own, so that the two do not
share an interpreter lock. ``python -m examples.local_openai`` runs it standalone.
"""

from examples.local_openai.delays import Delays
from examples.local_openai.endpoint import LocalOpenAI
from examples.local_openai.faults import Fault
from examples.local_openai.server import ServerStats

__all__ = ["Delays", "Fault", "LocalOpenAI", "ServerStats"]
