"""The shelf: which flights are kept, for how long, and in what order they leave."""

from __future__ import annotations

from prefetch_embeddings._flights.flight import Flight, State
from prefetch_embeddings._flights.shelf import Shelf
from tests.core.parts import a_flight


def kept(shelf: Shelf, key: str, now: float = 0.0) -> Flight[str]:
    """Add a flight that becomes ready, for which nobody has to leave."""
    flight = a_flight(key)
    shelf.by_key[flight.key] = flight
    flight.state = State.DONE
    flight.finished_at = now
    assert shelf.keep(flight, now) == []
    return flight


def test_flights_stand_under_their_keys_in_the_order_of_their_coming() -> None:
    shelf = Shelf(10.0, 8)
    a, b = a_flight("a"), a_flight("b")
    shelf.by_key[a.key] = a
    shelf.by_key[b.key] = b
    assert shelf.by_key.get("a") is a
    assert shelf.by_key.get("c") is None
    assert shelf.flights() == [a, b]
    assert shelf.ready() == []


def test_a_ready_flight_is_kept_for_its_time() -> None:
    shelf = Shelf(10.0, 8)
    first = kept(shelf, "first", 1.0)
    second = kept(shelf, "second", 3.0)
    third = kept(shelf, "third", 9.0)
    assert (first.expires_at, second.expires_at) == (11.0, 13.0)
    assert shelf.ready() == [first, second, third]
    assert shelf.expired(10.9) == []
    assert shelf.expired(13.0) == [first, second]
    for flight in (first, second):
        shelf.remove(flight)
    assert shelf.flights() == shelf.ready() == [third]
    assert shelf.by_key.get("first") is None


def test_keeping_one_lets_go_of_the_old() -> None:
    shelf = Shelf(10.0, 8)
    old = kept(shelf, "old")
    new = a_flight("new")
    shelf.by_key[new.key] = new
    assert shelf.keep(new, 10.0) == [old]
    assert shelf.ready() == [old, new], "whoever lets it go counts it, too"


def test_one_that_a_query_waits_for_arrives_as_one_that_has_served() -> None:
    shelf = Shelf(10.0, 2)
    waited_for, other, new = (a_flight(key) for key in "abc")
    waited_for.first_query_at = 5.0
    for flight in (waited_for, other, new):
        shelf.by_key[flight.key] = flight
        leaving = shelf.keep(flight, 0.0)
    assert leaving == [waited_for]


def test_of_too_many_those_that_served_leave_first_by_their_last_use() -> None:
    shelf = Shelf(10.0, 4)
    waiting, again, once, young = (kept(shelf, key) for key in ("w", "a", "o", "y"))
    for flight in (again, once, young, again):
        shelf.use(flight)
    left = []
    for key in "12345":
        flight = a_flight(key)
        shelf.by_key[flight.key] = flight
        leaving = shelf.keep(flight, 0.0)
        for each in leaving:
            shelf.remove(each)
        left += leaving
    assert [each.key for each in left] == ["o", "y", "a", "w", "1"]
    assert waiting in left
    assert [each.key for each in shelf.ready()] == ["2", "3", "4", "5"]


def test_what_is_removed_leaves_its_place_and_no_others() -> None:
    shelf = Shelf(10.0, 8)
    old = kept(shelf, "q")
    shelf.use(old)
    shelf.remove(old)
    assert shelf.by_key.get("q") is None
    new = a_flight("q")
    shelf.by_key[new.key] = new
    shelf.remove(old)
    assert shelf.by_key.get("q") is new
    assert new.held is True
    assert shelf.ready() == []
    assert not shelf._served, "it would be let go of for another"


def test_a_torn_step_is_mended() -> None:
    shelf = Shelf(10.0, 8)
    second, first, third = (
        kept(shelf, key, at) for key, at in (("2", 2.0), ("1", 1.0), ("3", 3.0))
    )
    under_way = a_flight("under way")
    shelf.by_key[under_way.key] = under_way
    for flight in (third, first, second):
        shelf.use(flight)
    failed = a_flight("failed")
    shelf.by_key[failed.key] = failed
    failed.state = State.FAILED  # and it was not yet removed
    second.expires_at = 0.0  # done, and not yet kept
    del shelf._arrived[second]
    third.held = False  # half removed: it still stands under its key
    shelf.mend()
    assert shelf.ready() == [first, second]
    assert second.expires_at == 12.0
    assert list(shelf._served) == [first, second]
    assert shelf.by_key.get("3") is None
    assert failed.held is False
    assert shelf.by_key.get("failed") is None
    assert shelf.by_key.get("under way") is under_way


def test_what_has_left_serves_no_more_after_a_torn_step() -> None:
    shelf = Shelf(10.0, 8)
    flight = kept(shelf, "q")
    shelf.use(flight)
    del shelf.by_key["q"]  # torn in the midst of a removal
    shelf.mend()
    assert shelf.ready() == []
    assert not shelf._served
