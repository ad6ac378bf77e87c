"""`SystemExit` and `KeyboardInterrupt` get out, wherever they are raised."""

from __future__ import annotations

import sys

import pytest

from tests.flights.outside import run_program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")

MODEL = """
import asyncio, os, signal, threading, time
from langchain_core.embeddings import Embeddings
from prefetch_embeddings import Hedge, PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings

logging.getLogger("asyncio").setLevel(logging.CRITICAL)
in_model = threading.Event()


class Model(Embeddings):
    async_too = True

    def embed_documents(self, texts):
        raise NotImplementedError

    def embed_query(self, text):
        in_model.set()
        if text == "raises":
            raise raised
        time.sleep(seconds)
        return [1.0]

    async def aembed_query(self, text):
        in_model.set()
        if text == "raises":
            raise raised
        time.sleep(seconds)  # a step that blocks, as a local model has
        await asyncio.sleep(0)
        return [1.0]


seconds = 5.0
raised = SystemExit(3)
"""

SIGNALLED = (
    MODEL
    + """
ways = sys.argv[1]
if sys.argv[2] == "exit":
    handler = lambda *_: sys.exit(3)
else:
    handler = signal.default_int_handler
signal.signal(signal.SIGTERM, handler)


def soon():
    in_model.wait()
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=soon, daemon=True).start()
embeddings = PrefetchingEmbeddings(Model(), hedge=Hedge(after=60.0) if "hedged" in ways else None)


async def main():
    if "aprefetch" in ways:
        await embeddings.aprefetch("q")
        await asyncio.sleep(20)
    elif "joined" in ways:
        await embeddings.aprefetch("q")
        await embeddings.aembed_query("q")
    elif "waited" in ways:
        await embeddings.aprefetch("q")
        await embeddings.await_for_prefetch("q", 20)
    elif "gathered" in ways:
        await asyncio.gather(
            *(embeddings.aembed_query(f"q {n}") for n in range(3)), return_exceptions=True
        )
    else:
        await embeddings.aembed_query("q")
    os._exit(7)  # it was swallowed


try:
    if "inline" in ways:
        embeddings.embed_query("q")
        os._exit(7)
    elif "sync join" in ways:
        embeddings.prefetch("q")
        embeddings.embed_query("q")
        os._exit(7)
    elif "sync wait" in ways:
        embeddings.prefetch("q")
        embeddings.wait_for_prefetch("q")
        os._exit(7)
    else:
        asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(3)
"""
)


@pytest.mark.parametrize("kind", ["exit", "interrupt"])
@pytest.mark.parametrize(
    "way",
    [
        "aprefetch",
        "aprefetch, joined",
        "aprefetch, waited",
        "aembed_query",
        "aembed_query, hedged",
        "gathered",
        "inline",
        "inline, hedged",
        "sync join",
        "sync wait",
    ],
)
def test_a_signals_handler_ends_the_process(way: str, kind: str) -> None:
    run_program(SIGNALLED, way, kind, limit=60.0, status=3)


RAISED = (
    MODEL
    + """
ways = sys.argv[1]
if sys.argv[2] == "interrupt":
    raised = KeyboardInterrupt()
embeddings = PrefetchingEmbeddings(Model())


async def main():
    if "aprefetch" in ways:
        await embeddings.aprefetch("raises")
        await asyncio.sleep(20)
    elif "suppressed" in ways:
        try:
            await embeddings.aembed_query("raises")
        except Exception:
            pass
    else:
        await embeddings.aembed_query("raises")
    os._exit(7)


try:
    if "sync" in ways:
        try:
            embeddings.embed_query("raises")
        except Exception:
            pass
        os._exit(7)
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(3)
"""
)


@pytest.mark.parametrize("kind", ["exit", "interrupt"])
@pytest.mark.parametrize("way", ["aprefetch", "aembed_query", "suppressed", "sync"])
def test_the_model_itself_ends_the_process(way: str, kind: str) -> None:
    """As it does without the library, from a task as from a call."""
    run_program(RAISED, way, kind, limit=60.0, status=3)


def test_a_worker_that_a_model_ends_leaves_the_others_well() -> None:
    """In a thread, `SystemExit` ends the thread, not the process. Nobody is left waiting for it."""
    program = """
    import threading
    from prefetch_embeddings import PrefetchingEmbeddings
    from prefetch_embeddings.testing import ScriptedEmbeddings, assert_no_leaks

    seen = []
    threading.excepthook = lambda args: seen.append(args.exc_type)
    model = ScriptedEmbeddings()
    embeddings = PrefetchingEmbeddings(model, max_workers=2, attempts=1)
    answers = []
    for number, error in enumerate((SystemExit(3), KeyboardInterrupt(), SystemExit(4)) * 3):
        text = f"q {number}"
        gate = model.hold(text)
        model.fail(text, error)
        embeddings.prefetch(text)
        gate.wait_until_entered()
        asking = threading.Thread(target=lambda: answers.append(embeddings.embed_query(text)))
        asking.start()
        gate.open()
        asking.join(20)
        assert not asking.is_alive()
        assert answers[-1] == model.vector(text)
    for number in range(20):
        text = f"later {number}"
        embeddings.prefetch(text)
        assert embeddings.wait_for_prefetch(text, 20), "there are no workers left"
    embeddings.close()
    assert_no_leaks(embeddings)
    print("ok")
    """
    assert run_program(program, limit=60.0) == ["ok"]


def test_a_workers_interrupt_is_told_of() -> None:
    """What a bare thread tells of by `threading.excepthook`, a worker's thread does not hide."""
    program = """
    import threading, time
    from prefetch_embeddings import PrefetchingEmbeddings
    from prefetch_embeddings.testing import ScriptedEmbeddings

    seen = []
    threading.excepthook = lambda args: seen.append(args.exc_type)
    model = ScriptedEmbeddings()
    bare = ScriptedEmbeddings()
    bare.fail("q", KeyboardInterrupt())
    thread = threading.Thread(target=bare.embed_query, args=("q",))
    thread.start()
    thread.join()
    assert seen == [KeyboardInterrupt]
    model.fail("q", KeyboardInterrupt())
    embeddings = PrefetchingEmbeddings(model, attempts=1)
    embeddings.prefetch("q")
    for _ in range(2000):
        if len(seen) == 2:
            break
        time.sleep(0.01)
    assert seen == [KeyboardInterrupt] * 2, seen
    print("ok")
    """
    assert run_program(program, limit=60.0) == ["ok"]


def test_the_process_ends_while_calls_hang_that_are_overdue() -> None:
    program = """
    import threading, time
    from prefetch_embeddings import PrefetchingEmbeddings
    from prefetch_embeddings.testing import ScriptedEmbeddings

    calls = 0

    class Model(ScriptedEmbeddings):
        def embed_query(self, text):
            global calls
            if text == "q":
                calls += 1
                threading.Event().wait()
            return super().embed_query(text)

    embeddings = PrefetchingEmbeddings(Model())
    for number in range(25):
        embeddings.embed_query(f"measured {number}")
    embeddings.prefetch("q")
    threading.Thread(target=embeddings.embed_query, args=("q",), daemon=True).start()
    while calls < 2:
        time.sleep(0.01)
    print("ok", flush=True)
    """
    assert run_program(program, limit=30.0) == ["ok"]
