"""A signal that comes while a query waits is for its caller alone."""

from __future__ import annotations

import signal

import pytest

from tests.runtimes.scripts import Script

WAITS = {
    "joined": """
        embeddings.prefetch("held question")
        model.entered.wait()
        ask = lambda: embeddings.embed_query("held question")
    """,
    "own call": """
        ask = lambda: embeddings.embed_query("held question")
    """,
    "explicit": """
        embeddings.prefetch("held question")
        model.entered.wait()
        ask = lambda: embeddings.wait_for_prefetch("held question")
    """,
}
JOINS = [wait for wait in WAITS if wait != "own call"]


def waiting(how: str, then: str) -> str:
    lines = [text.strip() for text in WAITS[how].strip().splitlines()]
    return "\n".join(
        [
            "model = Held()",
            "embeddings = PrefetchingEmbeddings(model)",
            *lines,
            "say_when_main_is_in('embed_query', 'wait_for_prefetch')",
            *then.strip().splitlines(),
        ]
    )


@pytest.mark.parametrize("how", WAITS)
def test_ctrl_c_ends_the_wait_and_nothing_else(how: str) -> None:
    script = Script(
        waiting(
            how,
            """
try:
    ask()
except KeyboardInterrupt:
    say("interrupted")
model.go.set()
say(embeddings.embed_query("held question"), embeddings.embed_query("another"))
""",
        )
    )
    assert script.line() == "waits"
    script.send(signal.SIGINT)
    assert script.line() == "interrupted"
    status, lines, complaints = script.end()
    assert (status, complaints) == (0, "")
    assert lines == ["[13.0, 1.0] [7.0, 1.0]"]


@pytest.mark.parametrize("how", WAITS)
def test_ctrl_c_ends_a_program_that_waits(how: str) -> None:
    script = Script(waiting(how, "ask()"))
    assert script.line() == "waits"
    script.send(signal.SIGINT)
    status, _, complaints = script.end()
    assert status == -signal.SIGINT
    assert complaints.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("how", WAITS)
def test_sigterm_ends_a_program_that_waits(how: str) -> None:
    script = Script(waiting(how, "ask()"))
    assert script.line() == "waits"
    script.send(signal.SIGTERM)
    assert script.end()[0] == -signal.SIGTERM


@pytest.mark.parametrize("how", WAITS)
def test_a_handler_may_end_the_program_while_it_waits(how: str) -> None:
    script = Script(
        waiting(
            how,
            """
signal.signal(signal.SIGTERM, lambda *_: (embeddings.close(), sys.exit(7)))
ask()
""",
        )
    )
    assert script.line() == "waits"
    script.send(signal.SIGTERM)
    status, _, complaints = script.end()
    assert (status, complaints) == (7, "")


@pytest.mark.parametrize("call", ["aembed_query", "await_for_prefetch"])
def test_ctrl_c_ends_a_loop_whose_task_waits(call: str) -> None:
    script = Script(f"""
        model = HeldOnLoops()
        embeddings = PrefetchingEmbeddings(model)

        async def main():
            await embeddings.aprefetch("held question")
            say("waits")
            await embeddings.{call}("held question")

        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            say("interrupted")
        model.go.set()
        say(embeddings.embed_query("another"))
    """)
    assert script.line() == "waits"
    script.send(signal.SIGINT)
    assert script.line() == "interrupted"
    status, lines, complaints = script.end()
    assert (status, complaints) == (0, "")
    assert lines == ["[7.0, 1.0]"]
