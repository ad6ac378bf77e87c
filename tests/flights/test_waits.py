"""Rings of waits, of any length, are refused; whatever is noted is taken off again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prefetch_embeddings._flights import reentry as waits
from prefetch_embeddings._flights.flight import Flight
from prefetch_embeddings._flights.reentry import begin_wait, end_wait, running_for

Flights = list[Flight[None]]


@contextmanager
def waiting_for(flight: Flight[None], *, mine: bool = False) -> Iterator[None]:
    current = begin_wait(flight, mine=mine)
    try:
        yield
    finally:
        if current is not None:
            end_wait(current, flight)


def edges(flights: Flights) -> dict[Flight[None], list[Flight[None]]]:
    return {flight: flight.waits_for for flight in flights if flight.waits_for}


@pytest.fixture
def flights() -> Iterator[Flights]:
    made: Flights = [Flight(str(i), str(i), None, 0.0, object(), False) for i in range(5)]
    yield made
    assert waits.running.get() is None
    assert not any(flight.waits_for for flight in made), "a wait was never taken off"


def test_code_that_runs_for_nobody_may_wait_for_anything(flights: Flights) -> None:
    with waiting_for(flights[0]):
        assert edges(flights) == {}


def test_a_flight_may_not_wait_for_itself(flights: Flights) -> None:
    with (
        running_for(flights[:1]),
        pytest.raises(RuntimeError, match=r"^the model asked for a text .* its own call returns$"),
    ):
        begin_wait(flights[0], mine=False)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_ring_may_not_close(flights: Flights, length: int) -> None:
    ring = flights[:length]
    for waiter, flight in itertools.pairwise(ring):
        waiter.waits_for.append(flight)  # as another thread does that runs it
    with running_for(ring[-1:]):
        for flight in ring:
            with pytest.raises(RuntimeError):
                begin_wait(flight, mine=False)
        with waiting_for(ring[0], mine=True):  # whoever runs it himself waits for nobody
            pass
    for waiter, flight in itertools.pairwise(ring):
        end_wait(waiter, flight)
        waits.run_has_ended(waiter)
    with running_for(ring[-1:]), waiting_for(ring[0]):
        pass


def test_a_fork_in_the_waits_is_followed_on_all_its_ways(flights: Flights) -> None:
    a, b, c, d, e = flights
    with running_for((a, b, c)):  # b and c wait for a
        assert waits.running.get() is a
        with waiting_for(d), waiting_for(e), waiting_for(d):
            assert edges(flights) == {a: [d, e, d], b: [a], c: [a]}
            waits.running.set(e)
            for flight in (a, b, c, e):
                with pytest.raises(RuntimeError):
                    begin_wait(flight, mine=False)
            with waiting_for(d):
                pass
            waits.run_has_ended(e)
            waits.running.set(d)
            with pytest.raises(RuntimeError):
                begin_wait(c, mine=False)
            waits.run_has_ended(d)
            waits.running.set(a)


def test_where_two_ways_lead_to_one_flight_it_is_looked_at_once(flights: Flights) -> None:
    a, b, c, d, e = flights
    for waiter, awaited in {a: [b, c], b: [d], c: [d], d: [b]}.items():
        waiter.waits_for.extend(awaited)
    assert not waits._reaches(a, e)
    assert waits._reaches(a, d)
    for waiter in flights:
        waits.run_has_ended(waiter)


def test_one_of_several_waits_is_taken_off_alone(flights: Flights) -> None:
    with running_for(flights[:1]), waiting_for(flights[1]):
        with waiting_for(flights[2]):
            pass
        assert edges(flights) == {flights[0]: [flights[1]]}


def test_a_wait_that_is_refused_is_taken_off_at_once(flights: Flights) -> None:
    with running_for(flights[:1]):
        with pytest.raises(RuntimeError):
            begin_wait(flights[0], mine=False)
        assert not flights[0].waits_for


def test_flights_that_run_together_wait_for_each_other_no_longer_than_that(
    flights: Flights,
) -> None:
    with running_for(flights[:2]), running_for(flights[2:]):
        assert waits.running.get() is flights[2]
    assert edges(flights) == {}
    with running_for(flights[:1]):
        assert edges(flights) == {}


def test_what_a_run_never_took_off_goes_with_it(flights: Flights) -> None:
    with running_for(flights[:1]):
        begin_wait(flights[1], mine=False)  # a coroutine that the collector destroys
    assert edges(flights) == {}


def test_a_wait_that_is_taken_off_after_a_fork_does_no_harm(flights: Flights) -> None:
    end_wait(flights[0], flights[1])
    assert edges(flights) == {}
