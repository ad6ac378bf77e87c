"""A replay says what a preset would have brought, by the log's own times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefetch_embeddings import UtterancePrefetcher
from prefetch_embeddings.replay import (
    Line,
    LoggedSpeech,
    Outcome,
    TranscriptLog,
    advice,
    main,
    read,
    replay,
)
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings


def turn(
    call: str, start: float, *, final_after: float = 1.0, query_after: float = 1.2
) -> list[Line]:
    """One caller: two words, the whole question, the final transcript, the query."""
    return [
        Line(call, start, "speech_started"),
        Line(call, start + 0.4, "partial", "how much"),
        Line(call, start + 1.0, "partial", "how much is the tariff"),
        Line(call, start + 1.2, "speech_stopped"),
        Line(call, start + 1.2 + final_after, "final", "How much is the tariff?"),
        Line(call, start + 1.2 + query_after, "query", "How much is the tariff?", 0.9),
    ]


def by_name(lines: list[Line], seconds: float = 0.9) -> dict[str, Outcome]:
    outcomes = replay(lines, lambda line: seconds if line.seconds is None else line.seconds)
    return {each.name: each for each in outcomes}


def test_what_is_waited_is_the_work_less_the_head_start() -> None:
    outcomes = by_name(turn("a", 0.0))
    assert outcomes["off"].exposed == (0.9,)
    assert list(outcomes["at final"].exposed) == pytest.approx([0.7])  # 0.2 s before the query
    early = outcomes["for_many_partials"]  # 0.01 s after the stop: 1.19 s before the query
    assert early.exposed == (0.0,)
    assert early.lead_seconds == pytest.approx(0.99)
    assert (early.hits, early.finals, early.calls) == (1, 1, 1)


def test_without_signals_a_partial_must_stand() -> None:
    lines = [line for line in turn("a", 0.0) if not line.e.startswith("speech")]
    outcomes = by_name(lines)
    assert outcomes["for_many_partials"].lead_seconds == pytest.approx(0.95)  # 0.25 s after it
    assert outcomes["for_few_partials"].lead_seconds == pytest.approx(1.2)  # at once


def test_calls_that_overlap_have_a_prefetcher_each() -> None:
    lines = sorted([*turn("a", 0.0), *turn("b", 0.7)], key=lambda line: line.t)
    outcomes = by_name(lines)
    assert outcomes["off"].turns == 2
    assert outcomes["for_many_partials"].hits == 2


def test_the_same_question_is_there_again_for_a_while() -> None:
    outcomes = by_name([*turn("a", 0.0), *turn("b", 100.0), *turn("c", 500.0)])
    assert outcomes["off"].exposed == (0.9, 0.9, 0.9)
    assert outcomes["off"].calls == 3
    assert list(outcomes["at final"].exposed) == pytest.approx([0.7, 0.0, 0.7])
    assert outcomes["for_many_partials"].calls == 2


def test_a_log_without_queries_asks_at_the_final() -> None:
    lines = [line for line in turn("a", 0.0) if line.e != "query"]
    outcomes = by_name(lines, 1.5)
    assert outcomes["at final"].exposed == (1.5,)
    assert list(outcomes["for_many_partials"].exposed) == pytest.approx([0.51])


def test_a_call_that_ends_takes_its_guess_along() -> None:
    lines = [line for line in turn("a", 0.0) if line.e not in ("final", "query")]
    outcomes = by_name([*lines, Line("a", 1.25, "hang_up")])
    assert outcomes["for_many_partials"].finals == 0
    assert outcomes["for_many_partials"].calls == 1


def test_bad_lines_are_numbered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"call": 1, "t": 0.5, "e": "final", "text": "is it open"}
    wrong = [
        "no json",
        "[]",
        json.dumps({**good, "e": "nonsense"}),
        json.dumps({**good, "t": "soon"}),
        json.dumps({**good, "t": float("nan")}),
        json.dumps({"call": 1, "t": 0.5, "e": "partial"}),
        json.dumps({**good, "seconds": True}),
    ]
    lines, bad = read([json.dumps(good), "", *wrong])
    assert [line.text for line in lines] == ["is it open"]
    assert bad == list(range(3, 3 + len(wrong)))
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([*wrong, json.dumps(good)]), "utf-8")
    assert main([str(log)]) == 0
    printed = capsys.readouterr()
    assert "7 lines make no sense and do not count: 1, 2, 3, 4, 5, 6, 7" in printed.err
    assert "for_many_partials" in printed.out


@pytest.mark.parametrize("texts", [True, False])
def test_what_the_log_writes_is_what_is_read(tmp_path: Path, texts: bool) -> None:
    path, now = tmp_path / "log.jsonl", [0.0]
    log = TranscriptLog(path, texts=texts, clock=lambda: now[0])
    for line in turn("a", 10.0):
        now[0] = line.t + (line.seconds or 0.0)
        if line.e == "query":
            log.query(line.call, line.text, seconds=line.seconds)
        elif line.text:
            getattr(log, line.e)(line.call, line.text)
        else:
            getattr(log, line.e)(line.call)
    log.hang_up("a")
    log.close()
    assert ("tariff" in path.read_text("utf-8")) is texts
    lines, bad = read(path.read_text("utf-8").splitlines())
    assert not bad
    assert [line.t for line in lines[:-1]] == pytest.approx([line.t for line in turn("a", 10.0)])
    assert by_name(lines)["for_many_partials"].exposed == (0.0,)
    if texts:
        assert lines[:-1] == turn("a", 10.0)


@pytest.mark.parametrize("prefetches", [True, False])
def test_what_an_adapter_says_is_written_down_and_passed_on(
    tmp_path: Path, prefetches: bool
) -> None:
    path = tmp_path / "log.jsonl"
    with ManualPrefetchingEmbeddings(ScriptedEmbeddings()) as embeddings:
        speech = UtterancePrefetcher(embeddings) if prefetches else None
        log = TranscriptLog(path, clock=embeddings.time)
        logged = LoggedSpeech(speech, log, "a")
        logged.on_speech_started()
        logged.on_partial("is it open")
        logged.on_speech_stopped()
        embeddings.time.advance(1.0)
        logged.on_final("is it open")
        logged.reset()
        log.close()
        assert embeddings.stats().prefetch_started == int(prefetches)
    lines, bad = read(path.read_text("utf-8").splitlines())
    assert not bad
    assert [line.e for line in lines] == [
        *("speech_started", "partial", "speech_stopped", "final", "hang_up")
    ]


def test_durations_come_from_the_log_the_options_or_a_wrappers_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, stats = tmp_path / "log.jsonl", tmp_path / "stats.json"
    lines = [
        {"call": "a", "t": float(n), "e": "query", "text": f"q {n}"} for n in range(0, 400, 10)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    stats.write_text(
        json.dumps(
            {"prefetch_used": 2, "query_missed": 2, "hidden_seconds": 1.0, "exposed_seconds": 1.0}
        )
    )

    def waited(*arguments: str) -> float:
        assert main([str(path), *arguments]) == 0
        row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("off"))
        return float(row.split()[-4])

    assert waited() == 0.7
    assert waited("--seconds", "0.3") == 0.3
    assert waited("--stats", str(stats)) == 0.5
    assert 0.5 < waited("--p5", "0.39", "--p95", "1.16") < 1.0
    path.write_text("\n".join(json.dumps({**line, "seconds": 0.2}) for line in lines), "utf-8")
    assert waited() == 0.2


def test_the_advice_weighs_calls_against_waiting() -> None:
    def outcome(name: str, exposed: float, calls: int) -> Outcome:
        return Outcome(name, 10, calls, 5, 10, 5.0, (exposed,) * 10)

    off = outcome("off", 0.9, 10)
    said = advice([off, outcome("at final", 0.7, 10), outcome("for_many_partials", 0.1, 20)])
    assert said.startswith("Take 'for_many_partials': callers would have waited 0.10 s a turn")
    said = advice([off, outcome("at final", 0.11, 10), outcome("for_many_partials", 0.1, 50)])
    assert "'at final'" in said, "a hundredth of a second is not worth four calls"
    assert "next to nothing" in advice([off, outcome("at final", 0.9, 10)])
    assert "nothing to say" in advice(replay([], lambda _: 1.0))


def test_the_picture_is_drawn_on_request(tmp_path: Path) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "picture.png"
    log.write_text(json.dumps({"call": 1, "t": 0.5, "e": "final", "text": "is it open"}), "utf-8")
    assert main([str(log), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_log_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no/such.jsonl"])
    assert "no/such.jsonl" in capsys.readouterr().err
