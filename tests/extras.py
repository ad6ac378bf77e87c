"""Tests that need an extra of their own say so, and are skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import os

import pytest

REQUIRED = bool(os.environ.get("EXTRAS_REQUIRED"))
"""Set by the make target of an extra: what is missing is an error there."""


def needs(*modules: str, target: str) -> pytest.MarkDecorator:
    """Skip a test where a library is missing that `make target` installs."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing) and not REQUIRED,
        reason=f"{', '.join(missing)} not installed: make {target}",
    )
