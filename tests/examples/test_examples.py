"""The examples run, and show what they claim to show."""

import json
import os
import statistics
import subprocess
import sys
import urllib.request
import uuid
from contextlib import suppress
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import openai
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from examples.knowledge_base import PASSAGES, QUESTIONS
from examples.local_openai import Delays, LocalOpenAI
from examples.voice_bot import knowledge, plots, report
from examples.voice_bot.__main__ import main, serve_metrics
from examples.voice_bot.arms import (
    ARMS,
    AT_FINAL,
    EMBEDDING,
    FLOOR,
    FROM_PARTIALS,
    OFF,
    PLAIN_TASK,
)
from examples.voice_bot.experiment import Plan, Result, Span, Turn
from examples.voice_bot.transcripts import listen_to
from prefetch_embeddings.replay import read, replay

ROOT = Path(__file__).parents[2]


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


def test_every_passage_and_question_has_its_knowledge_base() -> None:
    passages = [text for kb in knowledge.MODELS for text in knowledge.passages_of(kb)]
    assert sorted(passages) == sorted(passage.text for passage in PASSAGES)
    asked = {kb: [q for q in knowledge.questions() if q.kb == kb] for kb in knowledge.MODELS}
    assert all(len(questions) >= 20 for questions in asked.values())
    assert len(set(knowledge.MODELS.values())) == 2, "two embedding models"


# The partial transcripts.


def test_partial_transcripts_are_shaped_like_the_log() -> None:
    every = [listen_to(question.text, seed=seed) for seed in range(10) for question in QUESTIONS]
    for heard in every:
        times = [0.0, *(at for at, _ in heard.partials), heard.final_at]
        assert all(earlier < later for earlier, later in pairwise(times))
        assert all(before != after for (_, before), (_, after) in pairwise(heard.partials))
        assert all(text.split() for _, text in heard.partials)
        assert heard.final_at >= heard.spoken
    settled = [heard for heard in every if heard.partials[-1][1] == heard.question]
    assert len(settled) / len(every) == pytest.approx(0.61, abs=0.04)
    leads = [heard.final_at - heard.partials[-1][0] for heard in settled]
    assert statistics.median(leads) == pytest.approx(1.1, abs=0.1)


def test_partial_transcripts_are_the_same_for_a_seed() -> None:
    assert listen_to("is it open", seed=1) == listen_to("is it open", seed=1)
    assert listen_to("is it open", seed=1) != listen_to("is it open", seed=2)


@pytest.mark.parametrize("question", ["why", "why now"])
def test_short_questions_are_heard_too(question: str) -> None:
    for seed in range(50):
        heard = listen_to(question, seed=seed)
        assert heard.question == question
        assert all(text for _, text in heard.partials)


# The measurement.


def test_the_measurement_shows_what_prefetching_hides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    arguments = ["--turns", "12", "--calls", "6", "--time-scale", "0.25", "--output", str(folder)]
    assert main([*arguments, "--always-filler"]) == 0
    printed = capsys.readouterr()
    for words in (*ARMS, "first audio", "stand-in", "searches", "in every turn"):
        assert words in printed.out
    assert "72 of 72 turns" in printed.err
    for picture in ("first_audio.png", "turn.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")

    figures = json.loads((folder / "figures.json").read_text("utf-8"))
    arms = figures["arms"]
    assert {arm["turns"] for arm in arms.values()} == {12}
    for name in (OFF, EMBEDDING, PLAIN_TASK, AT_FINAL):
        assert (arms[name]["model_calls"], arms[name]["searches"]) == (1.0, 1.0)
    assert arms[FROM_PARTIALS]["model_calls"] >= 1.0
    assert (arms[FLOOR]["model_calls"], arms[FLOOR]["searches"]) == (0.0, 0.0)
    assert arms[FLOOR]["limit_mean"] == 0.0
    assert arms[AT_FINAL]["limit_mean"] < arms[EMBEDDING]["limit_mean"] < arms[OFF]["limit_mean"]
    assert arms[OFF]["limit_mean"] <= arms[OFF]["exposed_mean"]
    assert arms[FROM_PARTIALS]["foretold"] > 0 == arms[AT_FINAL]["foretold"]
    assert {arm["fillers"] for arm in arms.values()} == {1.0}

    draws = {
        arm: {t["question"]: t["embedding"] for t in figures["turns"] if t["arm"] == arm}
        for arm in ARMS
    }
    assert len(draws[OFF]) == 12
    assert draws[OFF] == draws[EMBEDDING] == draws[PLAIN_TASK] == draws[AT_FINAL]

    page = (folder / "metrics.txt").read_text("utf-8")
    met = {
        (arm, kind): sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "prefetch_embeddings_query_duration_seconds_count"
            and sample.labels["name"].startswith(f"{arm}, ")
            and sample.labels["kind"] == kind
        )
        for arm in ARMS
        for kind in ("embedding", "retrieval")
    }
    assert met[EMBEDDING, "embedding"] == 12
    assert met[AT_FINAL, "retrieval"] == met[FROM_PARTIALS, "retrieval"] == 12
    assert met[OFF, "embedding"] == met[PLAIN_TASK, "retrieval"] == met[FLOOR, "retrieval"] == 0


def test_the_filler_is_played_where_it_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    assert main(["--turns", "3", "--calls", "3", "--time-scale", "0.2", "--log", str(log)]) == 0
    lines, bad = read(log.read_text("utf-8").splitlines())
    assert not bad
    off, at_final, *_ = replay(lines, lambda line: line.seconds or 0.0)
    assert (off.turns, at_final.turns) == (3, 3)
    assert at_final.exposed_mean < off.exposed_mean
    printed = capsys.readouterr().out
    assert "or more is expected" in printed
    assert "exactly 1 call to the model and 1 search per turn: 1.00 and 1.00" in printed
    rows = {line[:24].strip(): line for line in printed.splitlines()}
    assert "100%" in rows[OFF]
    assert " 0%" in rows[FLOOR]


def test_metrics_are_served_for_as_long_as_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"turns_{uuid.uuid4().hex}"
    registry = CollectorRegistry()
    Counter(name, "Turns.", registry=registry).inc()
    with serve_metrics(registry, 0):
        address = capsys.readouterr().out.removeprefix("Metrics: ").strip()
        with urllib.request.urlopen(address) as page:
            assert f"{name}_total 1.0" in page.read().decode()
    # Whoever has taken the port since then does not know that name.
    with suppress(OSError, HTTPException), urllib.request.urlopen(address, timeout=10) as page:
        assert name not in page.read().decode()
    with serve_metrics(registry, None):
        assert not capsys.readouterr().out


def test_anybodys_openai_model_and_questions_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("# mine\n\nhow are you\nwhat now\nhow  are you\n", "utf-8")
    with LocalOpenAI(delays=Delays.constant(0.1)) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        arguments = ["--model", "text-embedding-ada-002", "--questions", str(questions)]
        assert main([*arguments, "--time-scale", "0.1"]) == 0
        asked = [server.times_asked(question) for question in ("how are you", "what now")]
    assert all(times >= 4 for times in asked), "once for each arm with retrieval"
    printed = capsys.readouterr().out
    assert "text-embedding-ada-002, the real API" in printed
    assert "2 cold questions" in printed


def test_live_is_short_for_a_model_of_openais(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalOpenAI() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert main(["--live", "--turns", "1", "--time-scale", "0.1"]) == 0
    assert "text-embedding-3-small, the real API" in capsys.readouterr().out


def fake_model() -> DeterministicFakeEmbedding:
    """What a user's own module may hold."""
    return DeterministicFakeEmbedding(size=8)


FAKE_MODEL = fake_model()


@pytest.mark.parametrize("name", ["fake_model", "FAKE_MODEL"])
def test_anybodys_own_embeddings_are_measured(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"{__name__}:{name}"
    arguments = ["--model", spec, "--turns", "2", "--time-scale", "0.1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"Embeddings: {spec}" in printed
    assert "where a wait of" in printed


def _turn(arm: str, number: int) -> Turn:
    first_audio, exposed, head_start = (3.0, 0.7, 0.0) if arm == OFF else (2.0, 0.2, 0.5)
    return Turn(
        arm=arm,
        question=f"question {number}",
        first_audio=first_audio + number,
        filler=Span(0.2, 1.0),
        query=Span(1.0, 1.0 + exposed),
        calls=(Span(1.0 - head_start, 1.7 - head_start),),
        guesses=(Span(-0.5, 0.2),) if arm == FROM_PARTIALS else (),
        head_start=head_start,
        lead=0.0,
        embedding=0.5,
        after_embedding=0.2,
    )


@pytest.fixture
def result() -> Result:
    turns = tuple(_turn(arm, number) for arm in ARMS for number in range(3))
    calls = dict(zip(ARMS, (3, 3, 3, 6, 12, 0), strict=True))
    return Result(Plan(turns=3), turns, calls, dict.fromkeys(ARMS, 3), b"")


def test_the_summary_counts_right(result: Result) -> None:
    summary = report.summarise(result, AT_FINAL)
    assert summary.first_audio_median == 3.0
    assert summary.first_audio_p95 == pytest.approx(3.9)
    assert summary.first_audio_p99 == pytest.approx(3.98)
    assert summary.exposed_mean == pytest.approx(0.2)
    assert summary.limit_mean == pytest.approx(0.2)
    assert (summary.model_calls, summary.searches, summary.fillers) == (2.0, 1.0, 1.0)
    assert "3.00 s instead of 4.00 s" in report.sentence(result)


def test_what_is_missed_is_said(result: Result) -> None:
    floor, once, at_final, partials = report.bars(result)
    assert floor.startswith("ok")
    assert once.startswith("MISS"), "there were two calls per turn"
    assert at_final.startswith("ok")
    assert partials.startswith("ok")


def test_the_pictures_take_any_arms(result: Result, tmp_path: Path) -> None:
    for arms in (ARMS, [OFF], [OFF, FLOOR]):
        plots.save(plots.distributions(result, arms), tmp_path / "distributions.png")
        plots.save(plots.timeline(result, arms), tmp_path / "timeline.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--turns", "0"],
        ["--turns", "9999"],
        ["--calls", "0"],
        ["--time-scale", "0"],
        ["--live"],
        ["--model", "text-embedding-3-small"],
        ["--model", "no.such.module:model"],
        ["--model", "examples.voice_bot:nothing"],
        ["--questions", "no-such-file.txt"],
        ["--questions", os.devnull],
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        main(arguments)
