"""The option `--reduced`: in a small environment, test modules that need more are skipped.

Without it a library that is missing is an error, so that no test is skipped unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

OURS = {"prefetch_embeddings", "tests", "examples", "benchmarks"}


class ModuleThatMayNeedMore(pytest.Module):
    """A test module that is skipped, with a reason, if a library that it imports is missing."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Return the module's tests."""
        try:
            return list(super().collect())
        except self.CollectError as error:
            cause = error.__cause__
            missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
            if missing is None or missing.partition(".")[0] in OURS:
                raise
        for name, module in list(sys.modules.items()):  # what was imported of it is no use
            if getattr(module, "__file__", None) == str(self.path):
                del sys.modules[name]
        pytest.skip(f"{missing} is not installed in this environment", allow_module_level=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--reduced", action="store_true", help="skip modules that need more than is installed"
    )


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> ModuleThatMayNeedMore | None:
    """Collect test modules by this rule, if it was asked for."""
    if not parent.config.getoption("reduced"):
        return None
    module: ModuleThatMayNeedMore = ModuleThatMayNeedMore.from_parent(parent, path=module_path)
    return module
