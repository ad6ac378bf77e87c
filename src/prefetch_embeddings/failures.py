"""One failure, raised to many callers: each gets an exception, and a traceback, of its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def own_copy(error: Exception, traceback: TracebackType | None) -> Exception:
    """Return a copy of `error` to raise.

    Raising an exception adds to the traceback it carries. Raised to many callers, one object would
    collect all their frames (and hold them). A copy starts from `traceback`, where the model
    failed, and adds only the frames of its own caller.

    Args:
        error: The exception that the model raised.
        traceback: Its traceback when the flight failed.
    """
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001 - constructors may want more than `args`
        twin = error
    if twin is error or type(twin) is not type(error) or twin.args != error.args:
        try:
            twin = type(error).__new__(type(error), *error.args)
            twin.__dict__.update(error.__dict__)
        except Exception:  # noqa: BLE001 - classes that cannot even be made bare
            twin = error
    twin.__cause__ = error.__cause__
    twin.__context__ = error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(traceback)
