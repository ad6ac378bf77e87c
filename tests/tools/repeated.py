"""Runs all tests again and again under load: `python -m tests.tools.repeated --times 20`.

Several runs go on at once, twice as many as there are processors, so that each is the others' load.
Their threads switch after every microsecond. What fails is printed, and makes the command fail.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

SWITCH_INTERVAL: Final = "1e-6"
"""Seconds after which a thread has to let others run; Python's own is 0.005."""


def run(arguments: list[str]) -> tuple[bool, str]:
    """Run the tests once; return whether they passed, and what pytest printed."""
    with tempfile.TemporaryDirectory(prefix="repeated-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "SWITCH_INTERVAL": SWITCH_INTERVAL,
                "HYPOTHESIS_STORAGE_DIRECTORY": folder,  # no run learns from another
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    return done.returncode == 0, done.stdout.strip()


def main() -> int:
    processors = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="runs in all")
    parser.add_argument("--at-once", type=int, default=2 * processors, help="runs at a time")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    began = time.monotonic()
    passed = 0
    with ThreadPoolExecutor(options.at_once) as at_once:
        runs = [at_once.submit(run, options.pytest) for _ in range(options.times)]
        for number, ended in enumerate(as_completed(runs), start=1):
            good, printed = ended.result()
            passed += good
            seconds, load = time.monotonic() - began, os.getloadavg()[0]
            words = printed.rpartition("\n")[2] if good else f"FAILED\n{printed}"
            print(f"{number}, after {seconds:.0f} s, load {load:.1f}: {words}", flush=True)
    print(f"{passed} of {options.times} runs passed, {options.at_once} at a time")
    return 0 if passed == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
