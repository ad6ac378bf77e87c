"""Which vectors are worth keeping: providers have answered with NaN, zeros, or nothing at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SURE: Final = 8
"""After so many vectors of one length, no more of them make it any surer."""


def is_sound(vector: Sequence[float]) -> bool:
    """Tell whether a vector has numbers, all of them finite and not all of them zero."""
    try:
        if not any(vector):  # stops at the first number that is not zero
            return False
        # What is not finite stays so in a sum, but large numbers may have an infinite one.
        return math.isfinite(sum(vector)) or all(map(math.isfinite, vector))
    except (TypeError, ValueError, OverflowError):  # not numbers, or not such as fit a float
        return False


class _Lengths(NamedTuple):
    usual: int
    seen: int  # vectors of the usual length, as far as that makes it surer
    other: int
    in_a_row: int  # the last vectors that all had this other length


class SoundVectors:
    """Tells which of a model's vectors are sound, and as long as the model's others.

    A model does not say how long its vectors are, so the length is learnt from them. A length is
    given up for another that came as often, and once more, without one of the old between.

    Threads may share it: what they see is one tuple, and if two replace it at once, one vector is
    not counted.
    """

    def __init__(self) -> None:
        self._lengths = _Lengths(0, 0, 0, 0)

    def accept(self, vector: Sequence[float]) -> bool:
        """Tell whether `vector` may be kept, and learn from its length."""
        if not is_sound(vector):
            return False
        length = len(vector)
        usual, seen, other, in_a_row = self._lengths
        if length == usual or not seen:
            if seen < SURE or in_a_row:
                self._lengths = _Lengths(length, min(seen + 1, SURE), 0, 0)
            return True
        in_a_row = in_a_row + 1 if length == other else 1
        if in_a_row <= seen:
            self._lengths = _Lengths(usual, seen, length, in_a_row)
            return False
        self._lengths = _Lengths(length, in_a_row, 0, 0)
        return True
