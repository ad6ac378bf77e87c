"""What one caller takes back is its own ask, never another caller's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefetch_embeddings import (
    PrefetchEvent,
    PrefetchOutcome,
    PrefetchStarted,
    UtterancePrefetcher,
)
from prefetch_embeddings.testing import ManualPrefetchingEmbeddings, ScriptedEmbeddings
from tests.flights.outside import places
from tests.helpers import Call, until

Manual = Callable[..., ManualPrefetchingEmbeddings]


def at_once(embeddings: ManualPrefetchingEmbeddings) -> UtterancePrefetcher:
    return UtterancePrefetcher(embeddings, debounce=0.0, min_words=1)


def test_what_is_superseded_alone_is_not_paid_for(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    speech = at_once(embeddings)
    free = places(embeddings)
    speech.on_partial("how much is")
    speech.on_partial("how much is it")
    embeddings.executor.run_all()
    assert model.calls_for("how much is") == 0
    assert embeddings.is_ready("how much is it")
    assert places(embeddings) == free


@pytest.mark.parametrize("who", ["before", "after", "both"])
@pytest.mark.parametrize("how", ["superseded", "reset"])
def test_another_callers_ask_stays(
    manual: Manual, model: ScriptedEmbeddings, who: str, how: str
) -> None:
    embeddings = manual(model)
    speech = at_once(embeddings)
    if who != "after":
        embeddings.prefetch("how much is")
    speech.on_partial("how much is")
    if who != "before":
        assert embeddings.prefetch("how much is") is PrefetchOutcome.IN_FLIGHT
    if how == "superseded":
        speech.on_partial("what about")
    else:
        speech.reset()
    embeddings.executor.run_all()
    assert embeddings.is_ready("how much is")


def test_two_calls_with_the_same_words(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    one, other = at_once(embeddings), at_once(embeddings)
    one.on_partial("how much is")
    other.on_partial("how much is")
    one.on_partial("how much is it for children")
    embeddings.executor.run_all()
    assert embeddings.is_ready("how much is"), "the other one still stands"
    assert model.calls_for("how much is") == 1


def test_both_take_theirs_back(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    one, other = at_once(embeddings), at_once(embeddings)
    one.on_partial("how much is")
    other.on_partial("how much is")
    one.reset()
    other.reset()
    embeddings.executor.run_all()
    assert model.calls_for("how much is") == 0


def test_an_ask_for_a_flight_that_is_gone_takes_back_no_other(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    """Forgotten and prefetched anew by somebody else in between: theirs is carried out."""
    embeddings = manual(model)
    speech = at_once(embeddings)
    speech.on_partial("how much is")
    embeddings.forget("how much is")
    embeddings.prefetch("how much is")
    speech.on_partial("what about")
    embeddings.executor.run_all()
    assert embeddings.is_ready("how much is")


@pytest.mark.parametrize("forgets", ["forget", "clear", "reset and forget"])
def test_in_the_very_moment_of_the_ask(
    manual: Manual, model: ScriptedEmbeddings, forgets: str
) -> None:
    """A listener plays the other caller, between the ask and whatever follows it."""
    played = False

    def listener(event: PrefetchEvent) -> None:
        nonlocal played
        if not isinstance(event, PrefetchStarted) or played:
            return
        played = True
        if forgets == "clear":
            embeddings.clear()
        else:
            embeddings.forget("how much is")
        assert embeddings.prefetch("how much is") is PrefetchOutcome.STARTED
        if forgets == "reset and forget":
            speech.reset()

    embeddings = manual(model, on_event=listener)
    speech = at_once(embeddings)
    speech.on_partial("how much is")
    speech.on_partial("what about")
    embeddings.executor.run_all()
    assert played
    assert embeddings.is_ready("how much is")


def test_who_waits_for_it_keeps_it(manual: Manual, model: ScriptedEmbeddings) -> None:
    embeddings = manual(model)
    speech = at_once(embeddings)
    speech.on_partial("how much is")
    waiter = Call(embeddings.wait_for_prefetch, "how much is", 30.0)
    until(lambda: waiter.thread.is_alive())
    waited = Call(until, lambda: not waiter.thread.is_alive())
    while not model.calls_for("how much is") and waiter.thread.is_alive():
        embeddings.executor.run_all()
    speech.reset()
    assert waiter.result()
    waited.result()


def test_the_next_utterance_takes_back_no_final_text(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    speech = at_once(embeddings)
    speech.on_partial("how much is it")
    speech.on_final("how much is it")
    speech.on_partial("the next utterance")
    speech.on_partial("the next utterance goes on")
    embeddings.executor.run_all()
    assert embeddings.is_ready("how much is it")
    assert model.calls_for("the next utterance") == 0


def test_finishing_after_it_was_forgotten_touches_nothing_newer(
    manual: Manual, model: ScriptedEmbeddings
) -> None:
    embeddings = manual(model)
    older, newer = model.hold("q"), model.hold("q")
    embeddings.prefetch("q")
    first = Call(embeddings.executor.run_next)
    older.wait_until_entered()
    embeddings.forget("q")
    assert embeddings.prefetch("q") is PrefetchOutcome.STARTED
    second = Call(embeddings.executor.run_next)
    newer.wait_until_entered()
    older.open()
    first.result()
    assert not embeddings.is_ready("q")
    assert embeddings.prefetch("q") is PrefetchOutcome.IN_FLIGHT
    newer.open()
    second.result()
    assert embeddings.is_ready("q")
    assert model.calls_for("q") == 2
