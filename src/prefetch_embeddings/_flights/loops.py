"""What can be asked of an event loop from anywhere: is it ours, does it still turn."""

from __future__ import annotations

import asyncio
from typing import Any


def is_dead(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell whether nothing comes of what the loop was to run: it has closed, or stopped."""
    return loop.is_closed() or not loop.is_running()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def current_task() -> asyncio.Task[Any] | None:
    """Return the task that runs in this thread, if one does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
