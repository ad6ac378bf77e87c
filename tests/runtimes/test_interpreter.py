"""Unusual interpreters: in development mode, at their end, frozen, and short of everything."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from tests.helpers import PATIENCE
from tests.runtimes.scripts import Script, run

EVERYTHING = """
    async def coroutines(embeddings):
        await embeddings.aprefetch("a question")
        assert await embeddings.await_for_prefetch("a question")
        assert await embeddings.aembed_query("a question") == [10.0, 1.0]
        assert await asyncio.gather(*(embeddings.aembed_query(str(n)) for n in range(20)))
        assert await embeddings.aembed_documents(["a", "b"]) == [[1.0, 1.0], [1.0, 1.0]]
        task = asyncio.create_task(embeddings.aembed_query("nobody waits"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def everything():
        with PrefetchingEmbeddings(Model()) as embeddings:
            embeddings.prefetch_many(["one", "two", "three"])
            assert embeddings.wait_for_prefetch("one")
            assert embeddings.embed_query("one") == [3.0, 1.0]
            assert embeddings.embed_documents(["a"]) == [[1.0, 1.0]]
            embeddings.explain_miss("four"), embeddings.expected_wait("four")
            embeddings.forget("two")
            for _ in range(3):
                asyncio.run(coroutines(embeddings))
            embeddings.warm_up()
            embeddings.clear()
            embeddings.stats()
"""


def test_development_mode_has_nothing_to_complain_about() -> None:
    lines = run(
        EVERYTHING + '    everything(); gc.collect(); say("done")', "-X", "dev", "-W", "error"
    )
    assert lines == ["done"]


def test_optimised_bytecode() -> None:
    assert run(EVERYTHING + '    everything(); say("done")', "-OO") == ["done"]


def test_on_uvloop() -> None:
    script = """
        import uvloop
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        everything()
        say(type(asyncio.new_event_loop()).__module__)
    """
    if sys.version_info >= (3, 12):
        script = """
            import uvloop
            with PrefetchingEmbeddings(Model()) as embeddings:
                for _ in range(3):
                    uvloop.run(coroutines(embeddings))
            say("uvloop")
        """
    from textwrap import dedent

    pytest.importorskip("uvloop")
    assert run(dedent(EVERYTHING) + dedent(script)) == ["uvloop"]


@pytest.mark.parametrize("how", ["thread", "executor", "daemon"])
def test_threads_that_ask_while_the_interpreter_ends(how: str) -> None:
    script = f"""
        import concurrent.futures
        embeddings = PrefetchingEmbeddings(Model())
        begun = threading.Event()

        def hammer():
            for number in range(20_000):
                embeddings.prefetch(f"text {{number}}")
                assert embeddings.embed_query(f"text {{number}}")
                if number == 100:
                    begun.set()

        if {how!r} == "executor":
            concurrent.futures.ThreadPoolExecutor().submit(hammer)
        else:
            threading.Thread(target=hammer, daemon={how == "daemon"}).start()
        begun.wait()
        say("main has ended")
    """
    assert run(script) == ["main has ended"]


def test_a_call_that_never_returns_does_not_keep_the_interpreter() -> None:
    script = """
        model = Held()
        embeddings = PrefetchingEmbeddings(model, max_workers=4)
        embeddings.prefetch_many([f"held {n}" for n in range(50)])
        model.entered.wait()
        say("main has ended")
    """
    assert run(script) == ["main has ended"]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system freezes no process")
@pytest.mark.parametrize("model", ["Held", "HeldOnLoops"])
def test_a_process_that_was_frozen(model: str) -> None:
    """While a laptop sleeps, or a container is paused, the clock goes on and nobody works."""
    prefetch = 'embeddings.prefetch("held question"); model.entered.wait()'
    script = Script(f"""
        model = {model}()
        embeddings = PrefetchingEmbeddings(model)

        async def main():
            await embeddings.aprefetch("held question")
            await asyncio.to_thread(model.entered.wait)
            say("under way")
            sys.stdin.readline()
            model.go.set()
            say(await embeddings.aembed_query("held question"))

        def in_threads():
            {prefetch}
            say("under way")
            sys.stdin.readline()
            model.go.set()
            say(embeddings.embed_query("held question"))

        in_threads() if type(model) is Held else asyncio.run(main())
        say(embeddings.embed_query("held question"))
        embeddings.prefetch("another")
        assert embeddings.wait_for_prefetch("another", 20)
        say(embeddings.embed_query("another"))
        say(model.calls <= 3)
    """)
    assert script.line() == "under way"
    script.send(signal.SIGSTOP)
    threading.Event().wait(4.0)  # longer than a call may usually take
    script.send(signal.SIGCONT)
    status, lines, complaints = script.end()
    assert (status, complaints) == (0, "")
    assert lines == ["[13.0, 1.0]", "[13.0, 1.0]", "[7.0, 1.0]", "True"]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no such limits")
def test_no_more_file_descriptors() -> None:
    script = """
        import resource
        embeddings = PrefetchingEmbeddings(Model())

        async def main():
            taken = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            say(embeddings.prefetch("a question"))
            say(embeddings.wait_for_prefetch("a question", 20))
            say(embeddings.embed_query("a question"))
            await embeddings.aprefetch("another")
            say(await embeddings.aembed_query("another"), embeddings.embed_documents(["a"]))
            for number in taken:
                os.close(number)

        asyncio.run(main())
    """
    assert run(script) == ["started", "True", "[10.0, 1.0]", "[7.0, 1.0] [[1.0, 1.0]]"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_no_more_threads() -> None:
    """A limit on memory, and stacks that are larger: no thread can be started."""
    script = """
        import resource
        embeddings = PrefetchingEmbeddings(Model())
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
        stack = threading.stack_size(512 << 20)
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            say("no thread to be had")
        say(embeddings.prefetch("a question"), embeddings.stats().prefetch_dropped)
        say(embeddings.wait_for_prefetch("a question", 0.0), embeddings.embed_query("a question"))
        threading.stack_size(stack)
        say(embeddings.prefetch("another"), embeddings.wait_for_prefetch("another", 20))
    """
    assert run(script) == [
        "no thread to be had",
        "dropped 1",
        "False [10.0, 1.0]",
        "started True",
    ]


def test_wrappers_that_nobody_closes_leave_no_thread_for_long() -> None:
    """Streamlit makes everything anew with every click, and so do notebooks with every run."""
    code = """
        for _ in range(30):
            embeddings = PrefetchingEmbeddings(Model())
            embeddings.prefetch("a question")
            assert embeddings.wait_for_prefetch("a question", 20)
            del embeddings
        gc.collect()
        give_up_at = time.monotonic() + 60
        while threading.active_count() > 1 and time.monotonic() < give_up_at:
            time.sleep(0.01)
        say(threading.active_count())
    """
    script = Script(code)
    assert script.line(2 * PATIENCE) == "1"
    assert script.end()[0] == 0
