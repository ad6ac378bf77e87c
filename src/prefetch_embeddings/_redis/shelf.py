"""Where the vectors of one model belong in Redis, and which are fit to be kept there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis import codec
from prefetch_embeddings._redis.codec import CorruptValueError, Role
from prefetch_embeddings._redis.jobs import Refusal
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings._redis.requests import NoReply, Slot
from prefetch_embeddings._redis.writer import Write

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Sequence

    from prefetch_embeddings._redis.codec import Codec
    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.writer import Writer
    from prefetch_embeddings.existing import ExistingCache

OTHER_LENGTHS: Final = 3
"""So many vectors in a row, of one length that is not the model's, are of the model's length."""

KEPT_FORGOTTEN: Final = 4096
"""Forgotten texts that are remembered, by their keys: no call under way brings them back."""


class Shelf:
    """Where vectors of one model belong in Redis, and which are fit to be kept there.

    Args:
        codec: Digests texts and encodes vectors.
        prefix: What every key starts with.
        model_id: What identifies the vector space.
        dimensions: The length that the model was asked for, where it was.
        writer: Brings vectors to Redis.
        recorder: Counts.
    """

    def __init__(
        self,
        codec_: Codec,
        *,
        prefix: str,
        model_id: str,
        dimensions: int | None,
        writer: Writer,
        recorder: RedisRecorder,
    ) -> None:
        self.codec: Final = codec_
        self._prefix = prefix
        self._spaces: dict[Role, bytes] = {
            "query": codec.space(model_id, dimensions, "query"),
            "document": codec.space(model_id, dimensions, "document"),
        }
        self.writer: Final = writer
        self._recorder = recorder
        self._length = dimensions
        self._other_lengths: list[int] = []  # of the last vectors, one after the other
        self._forgets = 0
        self._forgotten: dict[str, int] = {}  # key -> which forgetting it was

    def slot(self, role: Role, text: str) -> Slot:
        """Return where the vector of `text` belongs."""
        digest = self.codec.digest(self._spaces[role], text)
        return Slot(text, role, digest, f"{self._prefix}:{role}:{digest}")

    # -- vectors in

    @property
    def moment(self) -> int:
        """Now, as far as forgetting goes: what was asked for before is not kept after."""
        return self._forgets

    def forget(self, slots: Iterable[Slot]) -> None:
        """Keep nothing of what is under way for these."""
        self._forgets += 1
        for slot in slots:
            self._forgotten.pop(slot.key, None)
            self._forgotten[slot.key] = self._forgets
            self.writer.drop(slot.key)
        while len(self._forgotten) > KEPT_FORGOTTEN:
            self._forgotten.pop(next(iter(self._forgotten)), None)

    def keep(
        self, slot: Slot, vector: Sequence[float], moment: int, held: Lease | None = None
    ) -> list[float]:
        """Have the model's `vector` stored behind the reply, if it is sound.

        Returns:
            A copy for the caller; what is no vector at all, as it is.
        """
        try:
            stored = codec.snapshot(vector)
        except (TypeError, ValueError, OverflowError):  # none of our business
            self.give_up(slot, held)
            return vector  # type: ignore[return-value]
        if self._is_sound(stored) and self._forgotten.get(slot.key, 0) <= moment:
            self._put(slot, stored, held)
        else:
            self.give_up(slot, held)
        return stored.tolist()

    def _is_sound(self, vector: array[float]) -> bool:
        """Return whether `vector` is fit to be kept.

        The model's length is the one that it was asked for, or that its first sound vector had.
        Where that was the odd one, several others of one length in a row show it.
        """
        if not codec.is_sound(vector):
            return False
        length = len(vector)
        if self._length is None:
            self._length = length
        if length == self._length:
            self._other_lengths = []
            return True
        self._other_lengths = [*self._other_lengths, length][-OTHER_LENGTHS:]
        if self._other_lengths == [length] * OTHER_LENGTHS:
            self._length = length
            return True
        return False

    def _put(self, slot: Slot, vector: array[float] | None, held: Lease | None = None) -> None:
        self.writer.put(Write(slot.key, slot.digest, vector, held))

    def give_up(self, slot: Slot, held: Lease | None) -> None:
        """Let others make the call that `held` is for."""
        if held is not None:
            self._put(slot, None, held)

    def carry_over(self, cache: ExistingCache, slot: Slot, entry: Any) -> list[float] | None:
        """Return what an older cache has, and have it stored under our own key."""
        if isinstance(entry, Refusal) and not entry.is_of_type:
            return None
        try:
            if isinstance(entry, Refusal):
                raise CorruptValueError("an entry of another type")
            vector = cache.vector(slot.text, entry)
            if vector is None:
                return None
            stored = codec.snapshot(vector)
            if not codec.is_sound(stored):
                raise CorruptValueError("no vector to keep")
        except Exception:  # noqa: BLE001 - also one that its reader did not expect
            self._recorder.count(Kind.CORRUPT)
            return None
        self._put(slot, stored)
        return vector

    # -- vectors out

    def judge(self, slot: Slot, value: Any) -> tuple[list[float] | None, bool]:
        """Return the vector in `value`, and whether there is a value but it does not check."""
        if value is None or isinstance(value, NoReply):
            return None, False
        if isinstance(value, Refusal) and not value.is_of_type:
            return None, False
        try:
            vector = self.codec.decode(value, slot.digest)
            if self._length is not None and len(vector) != self._length:
                raise CorruptValueError("another dimension than the model's")
        except CorruptValueError:
            self._recorder.count(Kind.CORRUPT)
            return None, True
        return vector, False
