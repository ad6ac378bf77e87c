"""The examples run, and show what they claim to show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from examples.knowledge_base import PASSAGES, QUESTIONS
from examples.local_openai import Delays, LocalOpenAI
from examples.voice_bot import report
from examples.voice_bot.__main__ import main
from examples.voice_bot.agent import Agent
from examples.voice_bot.experiment import AT_FINAL, OFF, Plan, Result, Turn
from examples.voice_bot.handler import StasisHandler
from examples.voice_bot.measuring import MeasuredEmbeddings
from examples.voice_bot.stand_ins import (
    FILLER,
    StandInChannel,
    StandInLLM,
    StandInTextToSpeech,
)
from prefetch_embeddings import PrefetchingEmbeddings

ROOT = Path(__file__).parents[1]


def test_the_quickstart_runs_as_it_stands() -> None:
    with LocalOpenAI(process=True) as server:
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-m", "examples.quickstart"],
            cwd=ROOT,
            env={**os.environ, **server.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        stats = server.stats()
    assert "A red light means that there is no signal" in done.stdout
    assert stats.inputs == len(PASSAGES) + 1, "the question went upstream once"


def test_the_knowledge_base_answers_its_questions() -> None:
    assert len(QUESTIONS) >= 120
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS)
    with LocalOpenAI() as server, openai.DefaultHttpxClient() as connections:
        store = InMemoryVectorStore(
            OpenAIEmbeddings(
                base_url=server.base_url,
                api_key=SecretStr("stand-in"),
                check_embedding_ctx_length=False,
                http_client=connections,
            )
        )
        store.add_texts(
            [passage.text for passage in PASSAGES], [{"id": passage.id} for passage in PASSAGES]
        )
        right = 0
        for question in QUESTIONS:
            found = store.similarity_search(question.text, k=3)
            right += question.passage in [document.metadata["id"] for document in found]
    assert right / len(QUESTIONS) >= 0.9


@pytest.fixture
def bot() -> tuple[MeasuredEmbeddings, PrefetchingEmbeddings, Agent]:
    """An agent that prefetches, over a model that is counted."""
    model = MeasuredEmbeddings(DeterministicFakeEmbedding(size=8))
    prefetching = PrefetchingEmbeddings(model)
    store = InMemoryVectorStore(prefetching)
    store.add_texts(["The shop opens at nine. It closes at seven."])
    llm = FakeListChatModel(responses=["We open at nine. We close at seven"])
    return model, prefetching, Agent(store, llm, prefetching)


async def test_a_turn_prefetches_what_the_chain_then_asks_for(
    bot: tuple[MeasuredEmbeddings, PrefetchingEmbeddings, Agent],
) -> None:
    model, prefetching, agent = bot
    channel = StandInChannel(filler_seconds=0.0)
    handler = StasisHandler(agent, channel, StandInTextToSpeech(0.0), filler=FILLER, pause=0.0)
    with prefetching:
        await handler.on_final_transcript("  when do  you open ")
        assert [audio for _, audio in channel.played] == [
            FILLER,
            b"We open at nine.",
            b"We close at seven",
        ]
        assert len(model.calls_for("when do you open")) == model.count == 1
        assert prefetching.stats().prefetch_started == 1
        assert prefetching.stats().query_missed == 0


async def test_silence_is_no_turn(
    bot: tuple[MeasuredEmbeddings, PrefetchingEmbeddings, Agent],
) -> None:
    model, prefetching, agent = bot
    channel = StandInChannel(filler_seconds=0.0)
    handler = StasisHandler(agent, channel, StandInTextToSpeech(0.0), filler=FILLER, pause=0.0)
    with prefetching:
        await handler.on_final_transcript("  ")
    assert channel.played == []
    assert model.count == 0


async def test_the_agent_can_wait_for_its_prefetch(
    bot: tuple[MeasuredEmbeddings, PrefetchingEmbeddings, Agent],
) -> None:
    model, prefetching, agent = bot
    with prefetching:
        agent.ensure_prefetched_embedding("when do you open")
        assert await agent.wait_for_prefetch("when do you open")
        assert model.count == 1
        without = Agent(InMemoryVectorStore(model), StandInLLM(seconds=0.0), None)
        assert without.prefetch_query_embedding("when do you open") is None
        assert not await without.wait_for_prefetch("when do you open")


def test_the_measurement_shows_what_prefetching_hides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(["--turns", "12", "--calls", "4", "--time-scale", "0.2", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    for words in ("FIRST AUDIO PLAYED, median", "its limit", "upstream calls per turn", "stand-in"):
        assert words in printed.out
    assert "24 of 24 turns" in printed.err

    figures = json.loads(path.read_text())
    off, prefetched = figures["arms"][OFF], figures["arms"][AT_FINAL]
    assert off["turns"] == prefetched["turns"] == 12
    assert off["calls_per_turn"] == prefetched["calls_per_turn"] == 1.0
    assert prefetched["exposed_mean"] < off["exposed_mean"]
    assert prefetched["limit_mean"] < off["limit_mean"]
    assert off["limit_mean"] <= off["exposed_mean"]

    draws = {
        arm: {
            turn["question"]: turn["embedding"] for turn in figures["turns"] if turn["arm"] == arm
        }
        for arm in (OFF, AT_FINAL)
    }
    assert draws[OFF] == draws[AT_FINAL]
    assert len(draws[OFF]) == 12


def test_live_measures_whatever_the_environment_leads_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalOpenAI(delays=Delays.constant(0.1)) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert main(["--live", "--turns", "2", "--calls", "2", "--time-scale", "0.1"]) == 0
        asked = [server.times_asked(question) for question in Plan(turns=2).questions()]
    assert asked == [2, 2], "once for each arm"
    assert "the real OpenAI API" in capsys.readouterr().out


def test_the_summary_counts_right() -> None:
    turns = [
        Turn(arm, f"question {n}", first_audio + n, exposed, head_start, 0.7)
        for arm, first_audio, exposed, head_start in (
            (OFF, 3.0, 0.7, 0.0),
            (AT_FINAL, 2.0, 0.2, 0.5),
        )
        for n in range(3)
    ]
    result = Result(Plan(turns=3), tuple(turns), {OFF: 3, AT_FINAL: 6})
    summary = report.summarise(result, AT_FINAL)
    assert summary.first_audio_median == 3.0
    assert summary.first_audio_p95 == pytest.approx(3.9)
    assert summary.exposed_mean == pytest.approx(0.2)
    assert summary.limit_mean == pytest.approx(0.2)
    assert summary.calls_per_turn == 2.0
    assert "3.00 s instead of 4.00 s" in report.sentence(result)


@pytest.mark.parametrize(
    "arguments", [["--turns", "0"], ["--turns", "9999"], ["--calls", "0"], ["--live"]]
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        main(arguments)
