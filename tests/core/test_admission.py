"""Places in the background, its queue, and the pause while calls keep failing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prefetch_embeddings._flights.admission import FAILURES, PROBE_SECONDS, Admission, can_be_mended
from prefetch_embeddings._flights.flight import Flight, State
from tests.core.parts import a_flight


class StatusError(Exception):
    def __init__(self, status_code: object) -> None:
        self.status_code = status_code


@pytest.mark.parametrize("status", [400, 401, 403, 404, 407, 410, 422, 424, 426, 428, 430, 499])
def test_another_try_mends_no_request_that_is_wrong(status: int) -> None:
    assert can_be_mended(StatusError(status)) is False


@pytest.mark.parametrize("status", [None, "no number", 399, 408, 409, 425, 429, 500, 503])
def test_another_try_may_mend_the_rest(status: object) -> None:
    assert can_be_mended(StatusError(status)) is True
    assert can_be_mended(OSError()) is True


def test_an_error_that_does_not_tell_its_status_may_be_mended() -> None:
    class SecretiveError(Exception):
        @property
        def status_code(self) -> int:
            raise ValueError

    assert can_be_mended(SecretiveError()) is True


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_interrupts_is_not_tried_again(error: type[BaseException]) -> None:
    assert can_be_mended(error()) is False


# --- Places --------------------------------------------------------------------------------------


def test_those_who_queue_and_those_who_work_share_the_places_of_threads() -> None:
    admission = Admission(2, 1, 1)
    assert admission.places_taken == 0
    tokens = [admission.begin()]
    admission.take_place(a_flight("a"))
    assert admission.lets_in(0.0) is True
    second = a_flight("b")
    admission.take_place(second)
    assert admission.lets_in(0.0) is False
    assert admission.lets_onto_loop(0.0) is True
    admission.done(tokens[0])
    assert admission.lets_in(0.0) is True
    admission.done(tokens[0])  # twice is no harm
    admission.take_place(a_flight("c"))
    assert admission.lets_in(0.0) is False
    admission.give_back(second)
    admission.give_back(second)
    assert admission.lets_in(0.0) is True
    assert admission.places_taken == 2


def test_flights_on_loops_have_places_of_their_own(loop: asyncio.AbstractEventLoop) -> None:
    admission = Admission(1, 1, 2)
    a, b = a_flight("a", home=loop), a_flight("b", home=loop)
    admission.take_place(a)
    assert admission.lets_onto_loop(0.0) is True
    admission.take_place(b)
    assert admission.lets_onto_loop(0.0) is False
    assert set(admission.on_loops()) == {a, b}
    assert admission.places_taken == 2
    assert admission.lets_in(0.0) is True
    admission.give_back(a)
    assert admission.lets_onto_loop(0.0) is True
    assert admission.on_loops() == [b]


def test_each_job_in_a_worker_has_a_place() -> None:
    admission = Admission(1, 1, 1)
    first, second = admission.begin(), admission.begin()
    assert first is not second
    assert admission.lets_in(0.0) is False
    admission.done(first)
    assert admission.lets_in(0.0) is True


# --- The queue -----------------------------------------------------------------------------------


def test_jobs_leave_the_queue_in_their_order_with_those_that_share_their_call() -> None:
    admission = Admission(9, 1, 1)
    a, b, c, d = (a_flight(key) for key in "abcd")
    assert admission.next_job() == ()
    for flight in (a, b, c, d):
        admission.take_place(flight)
    admission.enqueue(a)
    admission.enqueue(b, c, d)
    assert admission.jobs_waiting == 2
    admission.give_back(c)  # a query has claimed it
    assert admission.jobs_waiting == 2
    assert admission.next_job() == (a,)
    assert admission.jobs_waiting == 1
    assert admission.next_job() == (b, d)
    assert admission.jobs_waiting == 0
    assert admission.next_job() == ()
    assert admission.places_taken == 3, "who claims them gives their places back"


# --- After a torn step ---------------------------------------------------------------------------


def test_exactly_those_get_a_place_who_should_have_one(loop: asyncio.AbstractEventLoop) -> None:
    admission = Admission(9, 9, 9)

    def flight(key: str, state: State, **facts: Any) -> Flight[str]:
        made = a_flight(key, **facts)
        made.state = state
        return made

    lost = flight("lost", State.QUEUED)
    waits = flight("waits", State.QUEUED)
    gone = flight("gone", State.QUEUED)
    runs = flight("runs", State.RUNNING)
    on_loop = flight("on loop", State.RUNNING, home=loop)
    asked_on_loop = flight("asked on loop", State.RUNNING, home=loop)
    asked_on_loop.for_query = True
    asked = flight("asked", State.QUEUED, by_prefetch=False)
    claimed = flight("claimed", State.QUEUED)
    claimed.for_query = True
    for each in (waits, gone, runs, asked_on_loop):
        admission.take_place(each)
    admission.enqueue(waits)
    admission.enqueue(gone)
    admission.mend([lost, waits, runs, on_loop, asked_on_loop, asked, claimed])
    assert admission.on_loops() == [on_loop]
    assert admission.places_taken == 3
    assert [admission.next_job() for _ in range(3)] == [(waits,), (lost,), ()]


# --- The pause -----------------------------------------------------------------------------------


def test_prefetching_pauses_after_so_many_failures_in_a_row() -> None:
    admission = Admission(1, 1, 1)
    admission.called_at = 5.0
    for _ in range(FAILURES - 1):
        assert admission.note_failure() is False
        assert admission.paused is False
        assert admission.may_speculate(5.0) is True
    assert admission.note_success() is False
    for _ in range(FAILURES - 1):
        assert admission.note_failure() is False
    assert admission.note_failure() is True
    assert admission.paused is True
    assert admission.note_failure() is False, "it is said once"
    assert admission.may_speculate(5.0) is False
    assert admission.note_success() is True
    assert admission.paused is False
    assert admission.note_failure() is False


def test_in_a_pause_one_may_try_when_nobody_has_called_for_a_while() -> None:
    admission = Admission(1, 1, 1)
    for _ in range(FAILURES):
        admission.note_failure()
    assert admission.may_speculate(0.0) is True, "nobody ever called"
    admission.called_at = 5.0
    assert admission.may_speculate(5.0 + PROBE_SECONDS - 0.01) is False
    assert admission.may_speculate(5.0 + PROBE_SECONDS) is True
    probe, other = a_flight("probe"), a_flight("other")
    admission.note_probe(probe, 6.0)
    assert admission.may_speculate(6.0) is False, "two probes"
    assert admission.may_run(probe) is True
    assert admission.may_run(other) is False
    admission.note_success()
    assert admission.may_run(other) is True
    for _ in range(FAILURES):
        admission.note_failure()
    assert admission.may_run(probe) is False, "the probe of an earlier pause"


def test_in_a_pause_nobody_is_let_in_but_a_probe() -> None:
    admission = Admission(1, 1, 1)
    admission.called_at = 5.0
    assert (admission.lets_in(5.0), admission.lets_onto_loop(5.0)) == (True, True)
    for _ in range(FAILURES):
        admission.note_failure()
    assert (admission.lets_in(5.5), admission.lets_onto_loop(5.5)) == (False, False)
    assert (admission.lets_in(6.0), admission.lets_onto_loop(6.0)) == (True, True)
    for _ in range(2):
        admission.take_place(a_flight(object()))
    assert admission.lets_in(6.0) is False


def test_outside_of_a_pause_there_are_no_probes() -> None:
    admission = Admission(1, 1, 1)
    admission.note_probe(a_flight(), 5.0)
    for _ in range(FAILURES):
        admission.note_failure()
    assert admission.may_speculate(5.0) is True, "it counted as a call"
    assert admission.may_run(a_flight()) is False
