"""`Mailbox`: one thing after the other, without anybody waiting for anybody."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class Mailbox:
    """Carries out what is posted, in its order and never two at once.

    Who posts carries out all that is there, unless somebody is at it; then that one does it before
    it leaves. So nobody ever waits, and a call that interrupts another one of the same thread (a
    finaliser, a signal handler, a listener) is carried out right after it.
    """

    def __init__(self) -> None:
        self._posted: Final[deque[tuple[Callable[[Any], None], Any]]] = deque()
        # Only ever tried, never waited for: it cannot deadlock with what it interrupts.
        self._at_work: Final = threading.Lock()

    def post(self, carry_out: Callable[[Any], None], what: Any = None) -> None:
        """Have `carry_out(what)` called: now, or by whoever is at work, before it leaves.

        What it raises goes to whoever carries it out; what comes after it stays for the next.
        """
        self._posted.append((carry_out, what))
        while self._posted and self._at_work.acquire(blocking=False):
            try:
                self._carry_out_all()
            finally:
                self._at_work.release()

    def _carry_out_all(self) -> None:
        while True:
            try:
                carry_out, what = self._posted.popleft()
            except IndexError:
                return
            carry_out(what)
