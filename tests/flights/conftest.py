"""Lets go what a test holds, however it ends: a failed one then takes no other with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import helpers

if seconds := os.environ.get("TEST_PATIENCE"):  # to be told of what hangs before long
    helpers.PATIENCE = float(seconds)

from tests.flights import outside


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        yield
    finally:
        outside.let_all_go()
