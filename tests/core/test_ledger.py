"""The ledger: what is counted when, how long calls take, and which prefetches nobody used."""

from __future__ import annotations

import pytest

from prefetch_embeddings import PrefetchStats
from prefetch_embeddings._flights.flight import End, Flight, Met, State
from prefetch_embeddings._flights.ledger import (
    DURATIONS_KEPT,
    UNKNOWN_DURATION,
    UNUSED_KEPT,
    Durations,
    Ledger,
)
from tests.core.parts import NOTHING, Someone, a_flight


def done(flight: Flight[str]) -> Flight[str]:
    flight.state = State.DONE
    return flight


def twice(ledger: Ledger, act: object, *args: object) -> PrefetchStats:
    """Do something two times; return the counts."""
    for _ in range(2):
        act(*args)  # type: ignore[operator]
    return ledger.counts.snapshot()


# --- Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("met", Met)
def test_a_query_is_counted_by_what_it_met(met: Met) -> None:
    ledger = Ledger()
    assert twice(ledger, ledger.met, met) == PrefetchStats(**{f"query_{met.value}": 2})


@pytest.mark.parametrize(
    ("end", "counted"),
    [
        (End.SERVED, {"prefetch_used": 1}),
        (End.RECOVERED, {"prefetch_used": 1, "query_recovered": 2}),
        (End.FAILED, {"query_failed": 2}),
        (End.GOES_ON, {}),
        (End.GONE, {}),
    ],
)
def test_a_query_is_counted_by_how_it_parts(end: End, counted: dict[str, int]) -> None:
    ledger = Ledger()
    flight = done(a_flight())
    expected = PrefetchStats(exposed_seconds=5.0, **counted)
    assert twice(ledger, ledger.parted, flight, "q", 2.5, end) == expected
    assert flight.served is (end is End.SERVED or end is End.RECOVERED)


@pytest.mark.parametrize("end", [End.SERVED, End.RECOVERED])
def test_who_gets_the_value_of_another_text_is_matched(end: End) -> None:
    ledger = Ledger()
    stats = twice(ledger, ledger.parted, done(a_flight()), "q?", 0.0, end)
    assert stats.query_matched == 2
    failed = twice(ledger, ledger.parted, done(a_flight()), "q?", 0.0, End.FAILED)
    assert failed.query_matched == 2


def test_a_prefetch_is_used_once_and_hides_the_time_that_nobody_waited() -> None:
    ledger = Ledger()
    for came in (None, 103.0, 99.0, 200.0):
        flight = done(a_flight())
        flight.started_at, flight.finished_at, flight.first_query_at = 101.0, 105.0, came
        ledger.served(flight)
        ledger.served(flight)
    # Of four seconds each: all, the first two, none, and all.
    assert ledger.counts.snapshot() == PrefetchStats(prefetch_used=4, hidden_seconds=10.0)


def test_a_flight_of_a_query_is_no_used_prefetch() -> None:
    ledger = Ledger()
    flight = done(a_flight(by_prefetch=False))
    flight.started_at, flight.finished_at = 101.0, 105.0
    ledger.served(flight)
    assert flight.served is True
    assert ledger.counts.snapshot() == NOTHING


def test_how_prefetches_end() -> None:
    ledger = Ledger()
    never_ran, ran = a_flight(), a_flight()
    never_ran.state = ran.state = State.FAILED
    ran.attempt = 1
    assert twice(ledger, ledger.ended, never_ran) == PrefetchStats(prefetch_withdrawn=2)
    ledger = Ledger()
    assert twice(ledger, ledger.ended, ran) == PrefetchStats(prefetch_failed=2)
    ledger = Ledger()
    assert twice(ledger, ledger.ended, done(ran)) == PrefetchStats(prefetch_succeeded=2)
    ledger = Ledger()
    assert twice(ledger, ledger.ended, done(a_flight(by_prefetch=False))) == NOTHING


@pytest.mark.parametrize("why", ["by a query", "not done", "held", "served", "waited for", ""])
def test_a_prefetch_is_wasted_if_nobody_got_it_and_nobody_can(why: str) -> None:
    ledger = Ledger()
    flight = done(a_flight(by_prefetch=why != "by a query"))
    flight.held = why == "held"
    flight.served = why == "served"
    if why == "not done":
        flight.state = State.FAILED
    if why == "waited for":
        flight.waiters[Someone()] = None
    wasted = twice(ledger, ledger.count_if_wasted, flight).prefetch_wasted
    assert wasted == (0 if why else 2)


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
