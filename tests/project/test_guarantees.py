"""`docs/guarantees.md` lists every guarantee once, each with tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guarantees.md"
GUARANTEES = 24


def _sections() -> list[tuple[int, list[str]]]:
    """Return the number of each guarantee, and where its links lead."""
    parts = re.split(r"^## (\d+)\. .*$", PAGE.read_text("utf-8"), flags=re.M)[1:]
    numbers, bodies = parts[::2], parts[1::2]
    return [
        (int(number), re.findall(r"\]\((.*?)\)", body))
        for number, body in zip(numbers, bodies, strict=True)
    ]


def test_every_number_is_there_once_and_in_order() -> None:
    assert [number for number, _ in _sections()] == list(range(1, GUARANTEES + 1))


def test_each_names_files_of_tests_that_are_there() -> None:
    for number, links in _sections():
        assert links, f"guarantee {number} names no test"
        for link in links:
            path = (PAGE.parent / link).resolve()
            assert path.is_file(), f"guarantee {number} names {link}, which is not there"
            is_test = path.is_relative_to(ROOT / "tests") and path.name.startswith("test_")
            assert is_test, f"{link} is no test"
