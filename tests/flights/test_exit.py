"""The interpreter exits at once, whatever is queued, hanging or about to be retried."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import PATIENCE

ROOT = Path(__file__).parents[2]
EXIT_SECONDS = 1.0  # what the library promises, from the end of the main module
SPREAD = 5  # how many times as long one exit may take as another, for no reason but the load

PRELUDE = """
import asyncio, atexit, logging, threading, time
from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome
from prefetch_embeddings.testing import ScriptedEmbeddings
from tests.helpers import SyncSideOnly

logging.getLogger("prefetch_embeddings").addHandler(logging.NullHandler())
model = ScriptedEmbeddings()
hanging = {f"hanging {number}": model.hold(f"hanging {number}") for number in range(8)}
queued = [f"queued {number}" for number in range(100)]

def all_hang():
    for gate in hanging.values():
        gate.wait_until_entered()
"""

THE_END = """
print("the end", time.monotonic(), flush=True)
"""


def run(script: str, *, may_complain: bool = False) -> list[str]:
    """Run a script, assert that it ends in good time and silently, and return what it printed.

    A machine that is busy with other things gets more time, by how long it takes to end a script
    that leaves nothing behind, and three tries: what the library itself waited for, it would wait
    for in each.
    """
    for _ in range(3):
        seconds, printed = timed(script, may_complain=may_complain)
        if seconds < EXIT_SECONDS:
            return printed
        usual, _ = timed("")
        if seconds < EXIT_SECONDS + SPREAD * usual:
            return printed
    pytest.fail(f"{seconds:.1f} s after the end of its main module, where {usual:.1f} s are usual")


def timed(script: str, *, may_complain: bool = False) -> tuple[float, list[str]]:
    """Run a script once; return how long it outlived its main module, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(script) + THE_END],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, complaints = process.communicate(timeout=PATIENCE)
        ended_at = time.monotonic()
    finally:
        process.kill()
        process.wait()
    assert complaints == "" or may_complain
    assert process.returncode == 0
    (main_ended_at,) = (
        float(line.split()[-1]) for line in printed.splitlines() if line.startswith("the end")
    )
    return ended_at - main_ended_at, printed.splitlines()


@pytest.mark.parametrize("last", ["", "embeddings.close()"], ids=["unclosed", "closed"])
def test_with_100_queued_and_8_hanging_prefetches(last: str) -> None:
    run(f"""
        embeddings = PrefetchingEmbeddings(model, max_workers=8)
        outcomes = embeddings.prefetch_many([*hanging, *queued])
        assert outcomes == [PrefetchOutcome.STARTED] * 108
        all_hang()
        {last}
    """)


def test_with_a_hanging_batch() -> None:
    run("""
        embeddings = PrefetchingEmbeddings(model, symmetric=True)
        embeddings.prefetch_many([*hanging, *queued])
        next(iter(hanging.values())).wait_until_entered()
    """)


def test_inside_a_context_manager() -> None:
    run("""
        with PrefetchingEmbeddings(model, max_workers=8) as embeddings:
            embeddings.prefetch_many([*hanging, *queued])
            all_hang()
    """)


@pytest.mark.parametrize("kind", ["model", "SyncSideOnly(model)"], ids=["async", "sync"])
def test_with_hanging_aprefetches_at_the_end_of_asyncio_run(kind: str) -> None:
    run(f"""
        async def main():
            for text in hanging:
                assert await embeddings.aprefetch(text) is PrefetchOutcome.STARTED
            await asyncio.to_thread(all_hang)

        embeddings = PrefetchingEmbeddings({kind})
        asyncio.run(main())
    """)


def test_with_hanging_aprefetches_on_a_loop_that_nobody_ends() -> None:
    # asyncio itself complains of tasks that are still there.
    run(
        """
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        embeddings = PrefetchingEmbeddings(model)
        for text in hanging:
            asyncio.run_coroutine_threadsafe(embeddings.aprefetch(text), loop).result()
        all_hang()
        """,
        may_complain=True,
    )


def test_with_a_retry_to_come() -> None:
    run("""
        failed = threading.Event()
        embeddings = PrefetchingEmbeddings(
            SyncSideOnly(model), attempts=100, on_event=lambda event: failed.set()
        )
        model.fail("failing", *[ConnectionError("unreachable") for _ in range(100)])
        embeddings.prefetch("failing")
        failed.wait()
    """)


@pytest.mark.parametrize("before", ["", "embeddings.prefetch('earlier')"], ids=["unused", "used"])
def test_a_prefetch_in_an_exit_handler_raises_nothing(before: str) -> None:
    lines = run(f"""
        def farewell():
            print(embeddings.prefetch("late"))
            print(embeddings.prefetch("hanging 1"))
            print(embeddings.prefetch_many(["later", "latest"]))
            print(embeddings.embed_query("late") == model.vector("late"))

        embeddings = PrefetchingEmbeddings(model)
        atexit.register(farewell)
        {before}
    """)
    single, hanging, many, right = lines[1:]
    assert {single, hanging} <= {"started", "dropped"}
    assert right == "True"
    assert many.count("PrefetchOutcome") == 2


@pytest.mark.parametrize(
    "call",
    [
        "embeddings.prefetch('q')",
        "embeddings.embed_query('q')",
        "embeddings.wait_for_prefetch('queued')",
        "speech.on_partial('a partial transcript'); speech.on_final('a final one')",
    ],
)
def test_a_finalizer_that_comes_when_no_thread_can_start_any_more(call: str) -> None:
    lines = run(f"""
        from prefetch_embeddings import Hedge, UtterancePrefetcher

        class Session:
            def __del__(self, print=print):
                {call}
                print("done")

        embeddings = PrefetchingEmbeddings(model, hedge=Hedge(after=1.0))
        speech = UtterancePrefetcher(embeddings)
        session = Session()
        session.itself = session  # what only the collector can take, it takes at the very end
    """)
    assert lines[1:] == ["done"]


def test_a_prefetch_for_which_no_thread_can_start_is_dropped(
    wrap: Callable[..., PrefetchingEmbeddings],
    model: ScriptedEmbeddings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:  # as Python does at exit, since 3.12
        raise RuntimeError("can't create new thread at interpreter shutdown")

    embeddings = wrap(model)
    monkeypatch.setattr(threading.Thread, "start", refuse)

    assert embeddings.prefetch("late") is PrefetchOutcome.DROPPED

    assert embeddings.embed_query("late") == model.vector("late")
    assert embeddings.stats().prefetch_dropped == embeddings.stats().query_missed == 1


def test_a_query_in_an_exit_handler_claims_what_no_worker_will_run() -> None:
    lines = run("""
        def farewell():
            print(embeddings.embed_query(queued[-1]) == model.vector(queued[-1]))
            print(asyncio.run(embeddings.aembed_query(queued[-2])) == model.vector(queued[-2]))

        embeddings = PrefetchingEmbeddings(model, max_workers=8)
        atexit.register(farewell)
        embeddings.prefetch_many([*hanging, *queued])
        all_hang()
    """)
    assert lines[1:] == ["True", "True"]


def test_with_a_daemon_thread_that_goes_on_prefetching() -> None:
    # Untimed: the thread that the script leaves behind keeps the processor from the exit.
    script = """
        def hammer():
            number = 0
            while True:
                number += 1
                embeddings.prefetch(f"text {number}")
                if number == 500:
                    under_way.set()

        embeddings = PrefetchingEmbeddings(model)
        under_way = threading.Event()
        threading.Thread(target=hammer, daemon=True).start()
        under_way.wait()
    """
    timed(script)
