"""How long `import prefetch_embeddings` takes beside what a LangChain bot imports anyway.

`python -m tests.tools.import_time` prints it. Each run is a fresh process that imports
`langchain_core.embeddings` first and this package then; of all runs the shortest times count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import NamedTuple

_PROBE = """
import time
begun = time.perf_counter()
from langchain_core.embeddings import Embeddings
between = time.perf_counter()
import prefetch_embeddings
print(between - begun, time.perf_counter() - between)
"""


class ImportTimes(NamedTuple):
    """Seconds, each the shortest of several runs."""

    langchain_core: float
    added: float


def measure(runs: int) -> ImportTimes:
    """Import both in `runs` fresh processes."""
    times = [ImportTimes(*map(float, run_fresh(_PROBE).split())) for _ in range(runs)]
    return ImportTimes(
        min(each.langchain_core for each in times), min(each.added for each in times)
    )


def run_fresh(code: str) -> str:
    """Run `code` in a new process; return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    times = measure(parser.parse_args().runs)
    print(f"from langchain_core.embeddings import Embeddings  {times.langchain_core:.3f} s")
    print(f"import prefetch_embeddings, after that            {times.added:.3f} s")


if __name__ == "__main__":
    main()
