"""Print the table of places as Markdown; with `--write` put it into docs/places.md, too.

python -m tests.places
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.places.asking import KINDS, MOMENTS, calls
from tests.places.places import PLACES, Place
from tests.tools.versions import write

PAGE: Final = Path(__file__).parents[2] / "docs/places.md"


def rows() -> Iterator[list[str]]:
    """Yield the table's rows, the head first."""
    yield ["place", "versions", *(f"{kind}, {moment}" for kind in KINDS for moment in MOMENTS), ""]
    yield ["---"] * (3 + len(KINDS) * len(MOMENTS))
    for place in PLACES:
        shown = ", ".join(f"{name} {version(name)}" for name in place.shown)
        cells = [_cell(place, kind, moment) for kind in KINDS for moment in MOMENTS]
        yield [place.name, shown, *cells, "`symmetric=True`" if place.symmetric else ""]


def _cell(place: Place, kind: str, moment: str) -> str:
    if place.impossible:
        return "not on this Python"
    with tempfile.TemporaryDirectory() as folder:
        made = asyncio.run(calls(place, kind, moment, Path(folder)))  # type: ignore[arg-type]
    return "none" if made is None else f"{made} call{'s' if made != 1 else ''}"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # the places' own
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows())
    print(text)
    if "--write" in sys.argv:
        write(PAGE, text)


if __name__ == "__main__":
    main()
