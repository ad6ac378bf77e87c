"""The one fork hook: what holds locks, threads or connections starts anew in a forked child."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class StartsAnew(Protocol):
    """What cannot go on in a forked child as it was."""

    def reset_after_fork(self) -> None:
        """Start anew: other threads do not exist here, and their locks are never released."""


def register(thing: StartsAnew) -> None:
    """Have `thing` start anew in every forked child. Keeps it no longer alive than others do."""
    _things.add(thing)


def _start_anew() -> None:
    for thing in list(_things):
        thing.reset_after_fork()


_things: Final[weakref.WeakSet[StartsAnew]] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
