"""Runs all measurements and prints their table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    connections,
    exposed,
    hit_path,
    many_turns,
    memory,
    misses,
    picture,
    prefetch_cost,
    redis_tier,
    tail,
)
from benchmarks.table import Row, render

PACKAGES = (
    "prefetch-embeddings",
    "async-lru",
    "cachetools",
    "httpx2",
    "langchain-classic",
    "langchain-core",
    "langchain-openai",
    "openai",
    "redis",
    "redisvl",
)

MEASUREMENTS: list[Callable[[], list[Row]]] = [
    hit_path.measure,
    misses.measure,
    prefetch_cost.measure,
    prefetch_cost.measure_scaling,
    exposed.measure,
    exposed.measure_one_call,
    many_turns.measure,
    redis_tier.measure,
    redis_tier.measure_single_flight,
    redis_tier.measure_trouble,
    tail.measure,
    connections.measure,
    memory.measure,
]


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--picture", type=Path, help="draw the rows into this PNG, too")
    parser.add_argument("--only", help="run the measurements whose module has this in its name")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for measure in MEASUREMENTS:
        name = f"{measure.__module__}.{measure.__name__}"
        if arguments.only and arguments.only not in name:
            continue
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += measure()
    versions = {name: version(name) for name in PACKAGES}
    print(render(rows))
    print()
    print(f"Python {platform.python_version()}; "
          + ", ".join(f"{name} {number}" for name, number in versions.items()))  # fmt: skip
    if arguments.picture:
        picture.draw(rows, arguments.picture)
    if arguments.json:
        report = {
            "python": platform.python_version(),
            "versions": versions,
            "rows": [{**dataclasses.asdict(row), "met": row.met} for row in rows],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
