"""When a flight is due another call, and how many of those there may be."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

from prefetch_embeddings import Hedge
from prefetch_embeddings._flights.flight import Flight, Run
from prefetch_embeddings._flights.ledger import Durations
from prefetch_embeddings._flights.patience import (
    LEAST_DURATIONS,
    LEAST_LIMIT,
    MOST_SAVED,
    UNMEASURED_LIMIT,
    Budget,
    Patience,
)
from tests.core.parts import a_flight


def measured(count: int, seconds: float) -> Durations:
    durations = Durations()
    for _ in range(count):
        durations.add(seconds)
    return durations


class Impatience(Patience):
    """One that counts how often it has called for a look."""

    def __init__(self, hedge: Hedge | None, durations: Durations) -> None:
        self.calls = 0
        super().__init__(hedge, durations, self._call)

    def _call(self) -> None:
        self.calls += 1


def called(at: float, runs: int = 1) -> Flight[str]:
    flight = a_flight()
    flight.called_at = at
    flight.runs = tuple(Run(flight, at, None, for_query=False) for _ in range(runs))
    return flight


# --- Hedge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "give either after or quantile"),
        ({"after": 1.0, "quantile": 0.5}, "give either after or quantile"),
        ({"after": 0.0}, "after must be more than 0 seconds, not 0.0"),
        ({"after": -1.0}, "after must be more than 0 seconds, not -1.0"),
        ({"after": math.nan}, "after must be more than 0 seconds, not nan"),
        ({"quantile": 0.0}, "quantile must lie between 0 and 1, not 0.0"),
        ({"quantile": 1.0}, "quantile must lie between 0 and 1, not 1.0"),
        ({"after": 1.0, "budget": 0.0}, "budget must be more than 0 and at most 1, not 0.0"),
        ({"after": 1.0, "budget": 1.5}, "budget must be more than 0 and at most 1, not 1.5"),
    ],
)
def test_a_hedge_that_makes_no_sense(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Hedge(**facts)


def test_a_hedge_at_its_limits() -> None:
    assert Hedge(after=0.001, budget=1.0).budget == 1.0
    assert Hedge(quantile=0.5).budget == 0.05


# --- Budget --------------------------------------------------------------------------------------


def test_the_first_extra_call_is_lent() -> None:
    budget = Budget(0.5)
    assert budget.take() is True
    assert budget.take() is False
    budget.pay_in()
    budget.pay_in()  # the loan is paid back
    assert budget.take() is False
    budget.pay_in()
    assert budget.take() is False
    budget.pay_in()
    assert budget.take() is True
    assert budget.take() is False


def test_twenty_twentieths_are_a_whole() -> None:
    budget = Budget(0.05)
    assert budget.take() is True
    for _ in range(20):
        budget.pay_in()
    for _ in range(20):
        assert budget.take() is False
        budget.pay_in()
    assert budget.take() is True


def test_only_so_many_are_saved_up() -> None:
    budget = Budget(1.0)
    for _ in range(100):
        budget.pay_in()
    taken = 0
    while budget.take():
        taken += 1
    assert taken == MOST_SAVED


# --- Limits --------------------------------------------------------------------------------------


def test_a_call_is_overdue_beyond_what_calls_take() -> None:
    durations = measured(LEAST_DURATIONS - 1, 4.0)
    patience = Impatience(None, durations)
    assert patience.limit == UNMEASURED_LIMIT
    assert patience.overdue_at(called(100.0)) == 100.0 + UNMEASURED_LIMIT
    durations.add(4.0)
    assert patience.limit == 8.0
    assert patience.overdue_at(called(100.0)) == 108.0
    assert Impatience(None, measured(LEAST_DURATIONS, 0.1)).limit == LEAST_LIMIT


def test_the_limit_goes_by_the_95th_of_a_hundred() -> None:
    durations = Durations()
    for number in range(1, 101):
        durations.add(float(number))
    assert Impatience(None, durations).limit == 2 * 96.0


def test_without_a_hedge_a_flight_is_due_when_it_is_overdue() -> None:
    patience = Impatience(None, Durations())
    assert patience.hedges is False
    assert patience.due_at(called(100.0)) == 103.0
    assert patience.take_hedge() is False
    patience.pay_in()


def test_a_hedge_is_due_before() -> None:
    patience = Impatience(Hedge(after=0.5, budget=1.0), Durations())
    assert patience.hedges is True
    flight = called(100.0)
    assert patience.due_at(flight) == 100.5
    assert patience.due_at(called(100.0, runs=2)) == 103.0, "a second hedge"
    flight.hedge_denied = True
    assert patience.due_at(flight) == 103.0
    assert Impatience(Hedge(after=9.0), Durations()).due_at(called(100.0)) == 103.0
    assert patience.take_hedge() is True
    assert patience.take_hedge() is False
    patience.pay_in()
    patience.pay_in()
    assert patience.take_hedge() is True


def test_a_quantile_needs_so_many_durations() -> None:
    durations = measured(LEAST_DURATIONS - 1, 4.0)
    patience = Impatience(Hedge(quantile=0.5), durations)
    assert patience.due_at(called(100.0)) == 103.0
    durations.add(4.0)
    assert patience.due_at(called(100.0)) == 104.0
    for _ in range(20):
        durations.add(5.0)
    assert patience.due_at(called(100.0)) == 105.0, "not by the quantile that was asked for"


# --- The heap ------------------------------------------------------------------------------------


def test_flights_come_out_when_they_may_be_due() -> None:
    patience = Impatience(None, Durations())
    late, early, same = called(102.0), called(100.0), called(100.0)
    assert patience.plan_look() is None
    for flight in (late, early, same, early):
        patience.watch(flight)
        assert flight.watched is True
    assert patience.next_due(102.9) is None
    assert patience.next_due(103.0) is early
    assert (early.watched, same.watched) == (False, True)
    assert patience.next_due(103.0) is same, "those of one time in their order"
    assert patience.next_due(104.9) is None
    assert patience.next_due(200.0) is late
    assert patience.next_due(200.0) is None


def test_one_that_nobody_else_knows_is_not_kept_alive() -> None:
    patience = Impatience(None, Durations())
    patience.watch(called(100.0))
    kept = called(101.0)
    patience.watch(kept)
    gc.collect()
    assert patience.next_due(200.0) is kept


def test_a_look_is_called_for_if_a_flight_is_due_before_it() -> None:
    patience = Impatience(None, Durations())
    flights = [called(at) for at in (100.0, 102.0, 99.0, 98.0, 500.0)]
    patience.watch(flights[0])
    patience.watch(flights[0])
    assert patience.calls == 1
    assert patience.plan_look() == patience.next_look_at == 103.0
    patience.watch(flights[1])
    patience.watch(called(100.0))
    assert patience.calls == 1, "the look that is planned comes before"
    patience.watch(flights[2])
    assert patience.calls == 2
    assert patience.plan_look() == 102.0
    patience.cancel_look()
    assert patience.next_look_at == math.inf
    patience.watch(flights[4])
    assert patience.calls == 3, "after a cancelled look the next to wait has one planned"
    while patience.next_due(900.0) is not None:
        pass
    assert patience.plan_look() is None
    assert patience.next_look_at == math.inf
