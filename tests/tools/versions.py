"""Run the library's own tests with other versions of Python, and with the oldest dependencies.

    python -m tests.tools.versions                     every Python there is, and the oldest of all
    python -m tests.tools.versions --only lowest       one environment
    python -m tests.tools.versions --python /opt/3.14/bin/python3.14
    python -m tests.tools.versions --write             also put the table into docs/versions.md

Each environment is made anew from `pyproject.toml`: with the newest versions that its bounds allow,
or, named `lowest`, with the oldest ones. Nothing is listed by hand. Tests that need more than the
extra `test-core` are skipped there, and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/versions.md"
NAMES: Final = ("3.11", "3.12", "3.13", "3.14", "3.13t", "3.14t")
SHOWN: Final = ("langchain-core", "langchain-openai", "openai", "redis", "cachetools", "pydantic")
TESTS: Final = (
    "tests/background",
    "tests/dropin",
    "tests/flights",
    "tests/instrumentation",
    "tests/langchain",
    "tests/redis_tier",
    "tests/runtimes",
    "tests/speech",
)
SKIPPED_HERE: Final = ("tests/flights/test_interrupted.py",)  # it takes minutes


@dataclass(frozen=True)
class Environment:
    """A Python, and whether it gets the oldest dependencies that the bounds allow."""

    name: str
    python: str
    lowest: bool


@dataclass(frozen=True)
class Outcome:
    """What an environment has, and how the tests went there."""

    environment: str
    python: str
    versions: dict[str, str]
    counts: dict[str, int]

    @property
    def failed(self) -> bool:
        """Whether a test failed, or none ran."""
        counts = self.counts
        return bool(counts.get("failed") or counts.get("error")) or not counts.get("passed")


def interpreters(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (version, path) of each supported Python that starts: those given, PATH, pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*given, *(shutil.which(f"python{name}") for name in NAMES)]
    candidates += [str(path / "bin/python") for path in sorted(pyenv.glob("3.*"))]
    found: set[str] = set()
    for path in filter(None, candidates):
        name = _version(path)
        if name in NAMES and name not in found:
            found.add(name)
            yield name, path


def _version(path: str) -> str | None:
    script = (
        "import sys, sysconfig; free = sysconfig.get_config_var('Py_GIL_DISABLED');"
        "print('%d.%d' % sys.version_info[:2] + ('t' if free else ''))"
    )
    done = subprocess.run([path, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def environments(given: Sequence[str]) -> list[Environment]:
    """Return the environments to test in, the oldest first."""
    found = sorted(interpreters(given), key=lambda pair: NAMES.index(pair[0]))
    oldest = found[0][1]
    return [
        Environment("lowest", oldest, lowest=True),
        *(Environment(name, path, lowest=False) for name, path in found),
    ]


def make(environment: Environment, folder: Path) -> Path:
    """Make the environment in `folder`; return its Python."""
    uv = [sys.executable, "-m", "uv"]
    _run([*uv, "venv", "--quiet", "--python", environment.python, str(folder)])
    python = folder / "bin/python"
    resolution = ["--resolution", "lowest-direct"] if environment.lowest else []
    _run([*uv, "pip", "install", "--quiet", "--python", str(python), *resolution,
          "--editable", ".[test-core]"])  # fmt: skip
    return python


def test(environment: Environment, arguments: Sequence[str]) -> Outcome:
    """Make the environment and run the tests in it."""
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        python = make(environment, Path(folder) / "environment")
        versions = json.loads(_run([str(python), "-c", _VERSIONS, *SHOWN]))
        report = Path(folder) / "report.txt"
        with report.open("w") as output:
            subprocess.run(
                [
                    *(str(python), "-m", "pytest", "--reduced", "-p", "no:cacheprovider"),
                    "--continue-on-collection-errors",
                    *(f"--ignore={path}" for path in SKIPPED_HERE),
                    *(arguments or [path for path in TESTS if (ROOT / path).exists()]),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
                check=False,
            )
        lines = report.read_text().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR ", "SKIPPED")):
            print(f"  {line}", flush=True)
    counts = {what.rstrip("s"): int(n) for n, what in re.findall(r"(\d+) (\w+)", lines[-1])}
    if not counts.get("passed"):
        print(*lines[-30:], sep="\n", flush=True)
    return Outcome(environment.name, versions.pop("python"), versions, counts)


_VERSIONS: Final = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))
"""


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    heads = ["environment", "Python", *SHOWN, "passed", "skipped", "failed"]
    rows = [heads, ["---"] * len(heads)]
    for outcome in outcomes:
        counts = outcome.counts
        failed = counts.get("failed", 0) + counts.get("error", 0)
        rows.append(
            [
                *(outcome.environment, outcome.python),
                *(outcome.versions[name] for name in SHOWN),
                *(str(number) for number in (counts.get("passed", 0), counts.get("skipped", 0))),
                str(failed),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(page: Path, text: str) -> None:
    """Put a table between the marks of a page."""
    old = page.read_text("utf-8")
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    head, _, rest = old.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}{text}\n{end}{tail}", "utf-8")


def main() -> int:
    """Test in each environment; 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(description="Run the tests with other versions.")
    parser.add_argument("--only", action="append", metavar="NAME", help="lowest, 3.12, …")
    parser.add_argument("--python", action="append", default=[], help="a Python to try, too")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    parser.add_argument("tests", nargs="*", help="instead of all that matter")
    arguments = parser.parse_args()
    outcomes = []
    for environment in environments(arguments.python):
        if arguments.only and environment.name not in arguments.only:
            continue
        print(f"{environment.name}: {environment.python}", flush=True)
        outcomes.append(test(environment, arguments.tests))
        print(f"  {outcomes[-1].counts}", flush=True)
    print(table(outcomes))
    if arguments.write:
        write(PAGE, table(outcomes))
    return any(outcome.failed for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
