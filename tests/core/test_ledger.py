"""The ledger: what is counted when, how long calls take, and which prefetches nobody used."""

from __future__ import annotations

from typing import Any

import pytest

from prefetch_embeddings import PrefetchStats
from prefetch_embeddings._flights.flight import End, Flight, Run, State
from prefetch_embeddings._flights.ledger import (
    DURATIONS_KEPT,
    UNKNOWN_DURATION,
    UNUSED_KEPT,
    Durations,
    Ledger,
)
from tests.core.parts import CONTEXT, Someone, a_flight


def done(flight: Flight[str]) -> Flight[str]:
    flight.state = State.DONE
    return flight


# --- Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "counted"),
    [
        (End.SERVED, {"prefetch_used": 1, "hidden_seconds": 1.5}),
        (End.RECOVERED, {"prefetch_used": 1, "query_recovered": 2, "hidden_seconds": 1.5}),
        (End.FAILED, {"query_failed": 2}),
        (End.GOES_ON, {}),
        (End.GONE, {}),
    ],
)
@pytest.mark.parametrize("text", ["q", "q?"])
def test_a_query_is_counted_by_how_it_parts(end: End, counted: dict[str, Any], text: str) -> None:
    ledger = Ledger()
    flight = done(a_flight())
    visits = [Someone("q", text) for _ in range(2)]
    flight.waiters.update(dict.fromkeys(visits))
    for visit in visits:
        ledger.parted(flight, visit, 2.5, end, 1.5)
        assert visit not in flight.waiters
    served = end is End.SERVED or end is End.RECOVERED
    matched = 2 if served and text != "q" else 0
    assert ledger.counts.snapshot() == PrefetchStats(
        exposed_seconds=5.0, query_matched=matched, **counted
    )
    assert flight.served is served


@pytest.mark.parametrize("why", ["by a query", "not done", "held", "served", "waited for", ""])
def test_with_its_last_waiter_a_prefetch_is_wasted_if_nobody_can_get_it(why: str) -> None:
    ledger = Ledger()
    for _ in range(2):
        flight = a_flight(by_prefetch=why != "by a query")
        flight.state = State.RUNNING if why == "not done" else State.DONE
        flight.held = why == "held"
        flight.served = why == "served"
        visit = Someone()
        flight.waiters[visit] = None
        if why == "waited for":
            flight.waiters[Someone()] = None
        ledger.parted(flight, visit, 0.0, End.GONE, 0.0)
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_wasted=0 if why else 2)


@pytest.mark.parametrize("why", ["by a query", "not done", "gone", "served", "waited for", ""])
def test_a_prefetch_that_leaves_the_map_unserved_is_wasted_once(why: str) -> None:
    ledger = Ledger()
    for _ in range(2):
        flight = a_flight(by_prefetch=why != "by a query")
        flight.state = State.RUNNING if why == "not done" else State.DONE
        flight.served = why == "served"
        flight.held = why != "gone"
        if why == "waited for":
            flight.waiters[Someone()] = None
        ledger.left_map(flight)
        ledger.left_map(flight)
        assert flight.held is False
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_wasted=0 if why else 2)


def test_each_prefetch_that_is_used_is_counted() -> None:
    ledger = Ledger()
    for _ in range(2):
        flight, visit = done(a_flight()), Someone("q", "q")
        flight.waiters[visit] = None
        ledger.parted(flight, visit, 0.0, End.SERVED, 2.0)
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_used=2, hidden_seconds=4.0)
    ledger.durations.add(1.0)
    assert len(ledger.durations) == 1


def test_what_part_of_a_duration_was_hidden() -> None:
    ledger = Ledger()
    hidden = []
    for came in (None, 103.0, 99.0, 200.0):
        flight = a_flight()
        flight.started_at, flight.finished_at, flight.first_query_at = 101.0, 105.0, came
        hidden.append(ledger.hidden(flight))
    assert hidden == [4.0, 2.0, 0.0, 4.0]


def test_the_first_query_that_finds_a_prefetch_ready_has_used_it() -> None:
    ledger = Ledger()
    for by_prefetch in (True, True, False):
        flight = a_flight(by_prefetch=by_prefetch)
        ledger.served_at_once(flight, 2.0)
        assert flight.served is True
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_used=2, hidden_seconds=4.0)


@pytest.mark.parametrize("why", ["by a query", "held", "served", "waited for", ""])
def test_the_end_of_a_flight(why: str) -> None:
    ledger = Ledger()
    for number in range(2):
        flight = a_flight(by_prefetch=why != "by a query")
        flight.context, flight.options = CONTEXT, "options"
        flight.runs = (Run(flight, 0.0, None, for_query=False),)
        flight.held = why == "held"
        flight.served = why == "served"
        if why == "waited for":
            flight.waiters[Someone()] = None
        ledger.ended(flight, State.DONE, 5.0 + number)
        assert (flight.state, flight.ended, flight.finished_at) == (State.DONE, True, 5.0 + number)
        assert [flight.context, flight.options, *flight.runs] == [None, None]
    assert ledger.counts.snapshot() == PrefetchStats(
        prefetch_succeeded=0 if why == "by a query" else 2, prefetch_wasted=0 if why else 2
    )


def test_how_prefetches_end() -> None:
    ledger = Ledger()
    for attempt in (0, 0, 1, 2):
        flight = a_flight()
        flight.attempt = attempt
        ledger.ended(flight, State.FAILED, 1.0)
        assert flight.state is State.FAILED
    ledger.ended(a_flight(by_prefetch=False), State.FAILED, 1.0)
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_withdrawn=2, prefetch_failed=2)


# --- Unused prefetches ---------------------------------------------------------------------------


def asked(key: str, at: float = 0.0) -> Flight[str]:
    flight = a_flight(key)
    flight.asked_at = at
    return flight


def test_what_leaves_unused_is_remembered() -> None:
    ledger = Ledger()
    ledger.remember_if_unused(asked("a", 3.0))
    served = asked("served")
    served.served = True
    waited_for = asked("waited for")
    waited_for.waiters[Someone()] = None
    claimed = asked("claimed")
    claimed.for_query = True
    for flight in (served, waited_for, claimed, a_flight("by a query", by_prefetch=False)):
        ledger.remember_if_unused(flight)
    assert ledger.unused([]) == [("a", "a", 3.0)]
    assert ledger.unused([served, waited_for, asked("b", 4.0), claimed]) == [
        ("a", "a", 3.0),
        ("b", "b", 4.0),
        ("claimed", "claimed", 0.0),
    ]


def test_only_so_many_are_remembered_the_last_ones() -> None:
    ledger = Ledger()
    for number in range(UNUSED_KEPT + 10):
        ledger.remember_if_unused(asked(str(number)))
    keys = [each.key for each in ledger.unused([asked("held")])]
    assert keys == [*map(str, range(11, UNUSED_KEPT + 10)), "held"]
    assert len(ledger._unused) == UNUSED_KEPT, "what was lost is kept without bound"
    ledger.forget("20")
    ledger.remember_if_unused(asked("more"))
    ledger.remember_if_unused(asked("and more"))
    keys = [str(each.key) for each in ledger.unused([])]
    assert "20" not in keys
    assert len(keys) == len(ledger._unused) == UNUSED_KEPT
    ledger.forget_all()
    assert ledger.unused([]) == []


# --- Durations -----------------------------------------------------------------------------------


def measured(*seconds: float) -> Durations:
    durations = Durations()
    for each in seconds:
        durations.add(each)
    return durations


def test_quantiles() -> None:
    durations = measured(4.0, 2.0, 3.0, 1.0)
    assert len(durations) == 4
    assert [durations.quantile(q) for q in (0.0, 0.25, 0.5, 0.74, 0.75, 1.0)] == [
        *(1.0, 2.0, 3.0, 3.0, 4.0, 4.0)
    ]


def test_the_last_durations_count() -> None:
    durations = measured(*[9.0] * 10, *[1.0] * DURATIONS_KEPT)
    assert len(durations) == DURATIONS_KEPT
    assert durations.quantile(1.0) == 1.0


def test_the_median_of_what_is_left() -> None:
    durations = measured(3.0, 1.0, 2.0)
    assert durations.remaining(0.0) == 2.0
    assert durations.remaining(0.5) == 1.5
    assert durations.remaining(1.0) == 2.0, "that which lasted as long tells nothing"
    assert durations.remaining(2.5) == 0.5
    assert measured(1.0, 2.0, 3.0, 4.0, 5.0).remaining(1.0) == 3.0
    assert durations.remaining(3.0) == 3.0, "a straggler lasts as long again"
    assert durations.remaining(7.0) == 7.0
    assert measured(1.0, 2.0, 3.0, 4.0).remaining(0.0) == 3.0


def test_what_is_left_before_anything_was_measured() -> None:
    durations = Durations()
    assert durations.remaining(0.0) == UNKNOWN_DURATION
    assert durations.remaining(0.5) == pytest.approx(UNKNOWN_DURATION - 0.5)
    assert durations.remaining(9.0) == 0.0


def test_of_many_durations_the_last_few_are_put_in_order_later() -> None:
    durations = measured(*[1.0] * 64)
    assert durations.quantile(1.0) == 1.0
    durations.add(2.0)
    durations.add(2.0)
    assert durations.quantile(1.0) == 1.0, "it sorts for every query"
    durations.add(2.0)
    assert durations.quantile(1.0) == 2.0
    durations.add(3.0)
    assert durations.quantile(1.0) == 2.0, "it counts what is in order already"
