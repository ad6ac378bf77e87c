"""Rings of waits, of any length, are refused; whatever is noted is taken off again."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

import pytest

from prefetch_embeddings._flights import reentry as waits
from prefetch_embeddings._flights.flight import Flight
from prefetch_embeddings._flights.reentry import running_together, waiting_for

Flights = list[Flight[None]]


@pytest.fixture
def flights() -> Iterator[Flights]:
    yield [Flight(str(i), str(i), None, 0.0, object(), by_prefetch=False) for i in range(5)]
    assert waits.running.get() is None
    waits._settle()
    assert not waits._waits_for, "a wait was never taken off"


def test_code_that_runs_for_nobody_may_wait_for_anything(flights: Flights) -> None:
    with waiting_for(flights[0], mine=False):
        assert not waits._waits_for


def test_a_flight_may_not_wait_for_itself(flights: Flights) -> None:
    with (
        running_together(flights[:1]),
        pytest.raises(
            RuntimeError,
            match=r"^the model asked for a text .* its own call returns$",
        ),
        waiting_for(flights[0], mine=False),
    ):
        pass


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_ring_may_not_close(flights: Flights, length: int) -> None:
    ring = flights[:length]
    edges = []
    for waiter, flight in itertools.pairwise(ring):
        with running_together((waiter,)):
            edge = waiting_for(flight, mine=False)
            edge.__enter__()
            edges.append(edge)
    with running_together((ring[-1],)):
        for flight in ring:
            with pytest.raises(RuntimeError), waiting_for(flight, mine=False):
                pass
        with waiting_for(ring[0], mine=True):  # whoever runs it himself waits for nobody
            pass
    for edge in edges:
        edge.__exit__(None, None, None)
    with running_together((ring[-1],)), waiting_for(ring[0], mine=False):
        pass


def test_a_fork_in_the_waits_is_followed_on_all_its_ways(flights: Flights) -> None:
    a, b, c, d, e = flights
    with running_together((a, b, c)):  # b and c wait for a
        assert waits.running.get() is a
        with waiting_for(d, mine=False), waiting_for(e, mine=False), waiting_for(d, mine=False):
            assert waits._waits_for == {a: [d, e, d], b: [a], c: [a]}
            waits.running.set(e)
            for flight in (a, b, c, e):
                with pytest.raises(RuntimeError), waiting_for(flight, mine=False):
                    pass
            with waiting_for(d, mine=False):
                pass
            waits.running.set(d)
            with pytest.raises(RuntimeError), waiting_for(c, mine=False):
                pass
            waits.running.set(a)


def test_where_two_ways_lead_to_one_flight_it_is_looked_at_once(flights: Flights) -> None:
    a, b, c, d, e = flights
    for waiter, flight in ((a, b), (a, c), (b, d), (c, d), (d, b)):
        waits._add(waiter, flight)
    assert not waits._reaches(a, e)
    assert waits._reaches(a, d)
    for waiter, flight in ((a, b), (a, c), (b, d), (c, d), (d, b)):
        waits._remove(waiter, flight)


def test_a_destroyed_coroutines_wait_is_taken_off_with_the_next(flights: Flights) -> None:
    def waiter() -> Generator[None]:
        with waiting_for(flights[1], mine=False):
            yield

    with running_together(flights[:1]):
        suspended = waiter()
        next(suspended)
        assert waits._waits_for == {flights[0]: [flights[1]]}
        with waits._lock:  # the thread that destroys it may hold it
            suspended.close()
        assert waits._waits_for == {flights[0]: [flights[1]]}
        with waiting_for(flights[2], mine=False):
            assert waits._waits_for == {flights[0]: [flights[2]]}
    assert not waits._waits_for


def test_one_of_several_waits_is_taken_off_alone(flights: Flights) -> None:
    with running_together(flights[:1]), waiting_for(flights[1], mine=False):
        with waiting_for(flights[2], mine=False):
            pass
        assert waits._waits_for == {flights[0]: [flights[1]]}


def test_a_wait_that_ends_by_an_error_is_taken_off_at_once(flights: Flights) -> None:
    with running_together(flights[:1]):
        with pytest.raises(OSError), waiting_for(flights[1], mine=False):  # noqa: PT011
            raise OSError
        assert not waits._waits_for


def test_flights_that_run_together_wait_for_each_other_no_longer_than_that(
    flights: Flights,
) -> None:
    with running_together(flights[:2]), running_together(flights[2:]):
        assert waits.running.get() is flights[2]
    assert not waits._waits_for
    with running_together(flights[:1]):
        assert not waits._waits_for


def test_a_forked_child_forgets(flights: Flights) -> None:
    with running_together(flights[:2]):
        waits._ended.append((flights[0], flights[1]))
        lock = waits._lock
        waits.reset_after_fork()
        assert not waits._waits_for
        assert not waits._ended
        assert waits._lock is not lock
