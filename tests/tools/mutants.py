"""Changes the core, line by line, and runs the tests on each: `python -m tests.tools.mutants`.

Works by mutmut, on a copy of the tree. What survives and is not listed as equivalent in
`tests/tools/MUTANTS.md` is shown, and makes the command fail. A few hundred take some minutes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = "src/prefetch_embeddings"

FLIGHTS: Final = tuple(
    f"tests/flights/test_{name}.py"
    for name in (
        *("backpressure", "cancellation", "claims", "close", "errors", "explicit_waits"),
        *("failed_prefetch", "hedging", "identity", "interrupted", "model_calls", "nobody_wants"),
        *("one_flight", "outage", "overdue", "own_asks", "prefetch_many", "reentrant", "waits"),
    )
)
"""What is seen from outside of the whole core."""

PARTS: Final = ("books", "map", "visits", "landing")

TESTS: Final[dict[str, list[str]]] = {
    **{
        f"_flights/{part}": [f"tests/core/test_{part}.py"]
        for part in ("admission", "ledger", "patience", "shelf", "steps")
    },
    **{f"_flights/{part}": [f"tests/core/test_{name}.py" for name in PARTS] for part in PARTS},
    **{
        f"_flights/{part}": [*FLIGHTS]
        for part in ("asking", "drivers", "in_threads", "joins", "on_loops", "overdue", "query")
    },
    "_flights/failures": ["tests/flights/test_errors.py"],
    "_flights/flight": [*(f"tests/core/test_{name}.py" for name in PARTS), *FLIGHTS],
    "_flights/prefetcher": [*FLIGHTS, "tests/flights/test_stats.py"],
    "_flights/reentry": [
        f"tests/flights/test_{name}.py" for name in ("waits", "errors", "claims", "model_calls")
    ],
    "_background/pool": ["tests/background/test_worker_pool.py"],
    "_background/timer": ["tests/background/test_timer.py"],
    "_redis/codec": ["tests/redis_tier/test_values.py", "tests/redis_tier/test_codec.py"],
    "_redis/lease": ["tests/redis_tier/test_leases.py"],
    "_redis/transports": ["tests/redis_tier/test_lanes.py"],
    "_redis/sessions": ["tests/redis_tier/test_lanes.py"],
    "_redis/lines": ["tests/redis_tier/test_lanes.py"],
    "_redis/breaker": ["tests/redis_tier/test_breaker.py"],
    "_redis/writer": ["tests/redis_tier/test_writer.py"],
}
"""The tests that are to notice a change, by module; those that are not there are left out."""

DECORATORS: Final = ("step", "look", "put_off", "property")
"""Those that do at the end of a function what they do at its head."""

SHORT_PATIENCE: Final = 5.0
"""Seconds that a test waits for what a mutant never brings about."""

ENDED: Final = ("killed", "timeout", "segfault", "suspicious", "caught by type check")


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    status: str
    diff: str  # the lines removed and added

    @property
    def function(self) -> str:
        """Where it is: `flights.FlightMap.forget`."""
        stem = re.sub(r"__mutmut_\d+$", "", self.name)
        stem = stem.replace("xǁ", "").replace("ǁ", ".")
        return re.sub(r"(^|\.)x_", r"\1", stem.removeprefix("prefetch_embeddings."))

    @property
    def entry(self) -> str:
        """How `MUTANTS.md` lists it."""
        return f"{self.function}\n{self.diff}"


def run(module: str, python: str, children: int, keep: Path | None) -> list[Mutant]:
    """Mutate one module in a copy of the tree; return all mutants."""
    tree = keep or Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        for part in ("src", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, ignore=ignore, dirs_exist_ok=True)
        for name in ("README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, tree / name)
        for path in (tree / "tests/helpers.py", tree / PACKAGE / "testing/_scripts.py"):
            text = path.read_text("utf-8")
            path.write_text(re.sub(r"(PATIENCE(: Final)?) = 30.0", rf"\1 = {SHORT_PATIENCE}", text))
        path = tree / PACKAGE / f"{module}.py"
        path.write_text(undecorated(path.read_text("utf-8")), "utf-8")
        tests = [test for test in TESTS[module] if (tree / test).exists()]
        settings = f"""
[tool.mutmut]
source_paths = ["src/"]
only_mutate = ["{PACKAGE}/{module}.py"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-o", "timeout=40"]
pytest_add_cli_args_test_selection = {tests!r}
also_copy = ["tests", "README.md", "CHANGELOG.md"]
"""
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        (tree / "pyproject.toml").write_text(project + settings, "utf-8")
        mutmut = [python, "-m", "mutmut"]
        subprocess.run([*mutmut, "run", "--max-children", str(children)], cwd=tree, check=False)
        listed = subprocess.run(
            [*mutmut, "results", "--all", "true"], cwd=tree, check=True, capture_output=True
        )
        mutants = []
        for line in listed.stdout.decode().splitlines():
            name, colon, status = line.strip().rpartition(": ")
            if not colon:
                continue
            diff = ""
            if status not in ENDED:
                show = subprocess.run(
                    [*mutmut, "show", name], cwd=tree, check=True, capture_output=True
                )
                diff = changed_lines(show.stdout.decode())
            mutants.append(Mutant(name, status, diff))
        if any(mutant.status == "not checked" for mutant in mutants):
            raise RuntimeError("mutmut could not run the tests, see above")
        return mutants
    finally:
        if keep is None:
            shutil.rmtree(tree)


def undecorated(source: str) -> str:
    """Return a module with `name = decorator(name)` after its functions in the place of decorators.

    Mutmut leaves decorated functions alone, and here every step is one.
    """
    lines = source.splitlines()
    after: dict[int, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            for decorator in reversed(node.decorator_list):
                name = ast.unparse(decorator)
                if name.split("(")[0] in DECORATORS:
                    lines[decorator.lineno - 1] = ""
                    indent = " " * node.col_offset
                    after[node.end_lineno] = f"{indent}{node.name} = {name}({node.name})"
    undone = []
    for number, line in enumerate(lines, 1):
        undone.append(line)
        if number in after:
            undone.append(after[number])
    return "\n".join(undone) + "\n"


def changed_lines(diff: str) -> str:
    """Return the lines of a diff that it takes out and puts in, without their indentation."""
    lines = []
    for line in diff.splitlines():
        if line.startswith(("+", "-")) and not line.startswith(("+++", "---")):
            lines.append(f"{line[0]} {line[1:].strip()}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=[*TESTS], help=", ".join(TESTS))
    parser.add_argument("--children", type=int, default=1, help="mutants tried at once")
    parser.add_argument("--python", default=sys.executable, help="of an environment with mutmut")
    parser.add_argument("--keep", type=Path, help="a directory for the copy; left there")
    options = parser.parse_args()
    known = (ROOT / "tests/tools/MUTANTS.md").read_text("utf-8")
    unexplained = 0
    for module in options.modules:
        mutants = run(module, options.python, options.children, options.keep)
        survivors = [mutant for mutant in mutants if mutant.status not in ENDED]
        equivalent = [mutant for mutant in survivors if mutant.entry in known]
        real = len(mutants) - len(equivalent)
        caught = len(mutants) - len(survivors)
        of_all = 100 * caught / max(1, len(mutants))
        of_real = 100 * caught / max(1, real)
        print(
            f"\n{module}: {len(mutants)} mutants, {caught} killed, {len(equivalent)} equivalent,"
            f" {real - caught} left: {of_real:.1f} % killed, {of_all:.1f} % of all"
        )
        for mutant in survivors:
            if mutant not in equivalent:
                unexplained += 1
                print(f"\n{mutant.status}: {mutant.entry}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
