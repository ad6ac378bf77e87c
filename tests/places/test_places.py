"""A search anywhere finds the prefetched question: one call of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.extras import needs
from tests.places.asking import KINDS, MOMENTS, Kind, Moment, calls
from tests.places.places import PLACES, Place


@pytest.mark.filterwarnings("ignore")  # the places' own
@pytest.mark.enable_socket
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, id=place.name, marks=needs(*place.modules, target="places"))
        for place in PLACES
    ],
)
async def test_a_search_finds_the_prefetch(
    place: Place, kind: Kind, moment: Moment, tmp_path: Path
) -> None:
    if place.impossible:
        pytest.skip("the sqlite3 of this Python loads no extensions")
    made = await calls(place, kind, moment, tmp_path)
    if made is None:
        pytest.skip("this place has no such search")
    assert made == 1
