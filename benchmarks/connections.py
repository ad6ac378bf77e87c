"""What the first query after a pause waits for: the client's own settings and `voice_embeddings`.

By default the pause is a little longer than the five seconds that the client keeps an idle
connection. `python -m benchmarks.connections --idle 60` waits for a minute instead.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from time import perf_counter
from unittest import mock

from langchain_openai import OpenAIEmbeddings

from benchmarks.table import Row, render
from examples.local_openai import Delays, LocalOpenAI
from prefetch_embeddings.openai import voice_embeddings

IDLE = 8.0
"""Seconds; the client's own keep-alive is 5."""
HANDSHAKE = 0.1
"""Seconds that opening a connection takes besides TLS: a network's round trips, put on top."""
ANSWER = 0.02
"""Seconds that each answer takes."""
CLIENTS = 5
"""Of each kind."""

Ask = Callable[[str], Awaitable[object]]


@dataclasses.dataclass(slots=True)
class Turn:
    """One client's queries before and after the pause.

    Attributes:
        before: Seconds of a query on the open connection.
        after: Seconds of the first query after the pause.
        opened: Connections that this query opened.
    """

    before: float
    after: float = 0.0
    opened: int = 0

    @property
    def added(self) -> float:
        """Milliseconds that the pause added to the query."""
        return (self.after - self.before) * 1e3


def measure(idle_seconds: float = IDLE) -> list[Row]:
    """Let clients of all kinds idle side by side, then ask one by one."""
    with LocalOpenAI(
        process=True,
        secure=True,
        handshake_delay=HANDSHAKE,
        delays=Delays.constant(ANSWER),
    ) as server:
        turns = asyncio.run(_turns(server, idle_seconds))
    rows = []
    for kind in ("sync", "async"):
        voice, default = turns["voice", kind], turns["default", kind]
        name = f"after {idle_seconds:g} s idle, {kind}"
        rows += [
            Row(f"connections opened {name}: voice_embeddings",
                max(turn.opened for turn in voice), "new", 0, f"by any of {CLIENTS} clients"),
            Row(f"connections opened {name}: OpenAIEmbeddings",
                min(turn.opened for turn in default), "new", 1, f"by each of {CLIENTS} clients",
                at_least=True),
            _added(f"added to the query {name}: voice_embeddings", voice, 0.5),
            _added(f"added to the query {name}: OpenAIEmbeddings", default, 0.9, at_least=True),
        ]  # fmt: skip
    return rows


def _added(what: str, turns: list[Turn], handshakes: float, *, at_least: bool = False) -> Row:
    """Return the row of the median turn; the bar is a share of the added handshake."""
    turn = sorted(turns, key=lambda turn: turn.added)[len(turns) // 2]
    detail = (
        f"median of {len(turns)}: {turn.before * 1e3:.1f} ms before, {turn.after * 1e3:.1f} ms "
        f"after; the network adds {HANDSHAKE * 1e3:g} ms to a handshake"
    )
    return Row(what, turn.added, "ms", handshakes * HANDSHAKE * 1e3, detail, at_least)


async def _turns(server: LocalOpenAI, idle_seconds: float) -> dict[tuple[str, str], list[Turn]]:
    asks: list[tuple[tuple[str, str], Ask]] = []
    # The endpoint's certificate is trusted by environment: no client needs a setting for it.
    with mock.patch.dict(os.environ, server.environment()):
        for _ in range(CLIENTS):
            for settings, make in (("voice", voice_embeddings), ("default", OpenAIEmbeddings)):
                model = make(check_embedding_ctx_length=False)
                asks.append(((settings, "sync"), _in_thread(model)))
                asks.append(((settings, "async"), model.aembed_query))
        turns = [Turn(await _warm(ask)) for _, ask in asks]
    await asyncio.sleep(idle_seconds)
    for (_, ask), turn in zip(asks, turns, strict=True):
        before = server.stats().connections
        turn.after = await _seconds(ask, "after the pause")
        turn.opened = server.stats().connections - before
    result: dict[tuple[str, str], list[Turn]] = {}
    for (kind, _), turn in zip(asks, turns, strict=True):
        result.setdefault(kind, []).append(turn)
    return result


def _in_thread(model: OpenAIEmbeddings) -> Ask:
    return lambda text: asyncio.to_thread(model.embed_query, text)


async def _warm(ask: Ask) -> float:
    """Open the connection; return what the quickest of three queries on it takes."""
    await ask("hello")
    return min([await _seconds(ask, f"question {i}") for i in range(3)])


async def _seconds(ask: Ask, text: str) -> float:
    began = perf_counter()
    await ask(text)
    return perf_counter() - began


def main() -> None:
    """Measure with a pause of one's own choice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connections", description=__doc__)
    parser.add_argument("--idle", type=float, default=IDLE, help="seconds (default: %(default)s)")
    print(render(measure(parser.parse_args().idle)))


if __name__ == "__main__":
    main()
