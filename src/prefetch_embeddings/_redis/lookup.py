"""What is asked of Redis, in which order, and what the answers mean; it does no I/O.

A lookup is written once, for threads and for coroutines: it yields requests, is sent what came of
them, and returns what it found.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from prefetch_embeddings._redis import codec, lease
from prefetch_embeddings._redis.codec import CorruptValueError, Role
from prefetch_embeddings._redis.jobs import Refusal
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings._redis.writer import Write

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Generator, Iterable, Sequence

    from prefetch_embeddings._redis.codec import Codec
    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.lease import Lease
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.writer import Writer
    from prefetch_embeddings.existing import ExistingCache

PIPELINE: Final = 128
"""Commands of one request, so that a large batch keeps what came in time."""

OWNERS: Final = 2
"""So many owners are waited for, one after the other: with one that dies there is one more call."""

POLL_SECONDS: Final = 0.05
"""How long a waiter pauses that cannot have itself woken."""

OTHER_LENGTHS: Final = 3
"""So many vectors in a row, of one length that is not the model's, are of the model's length."""

KEPT_FORGOTTEN: Final = 4096
"""Forgotten texts that are remembered, by their keys: no call under way brings them back."""


class Slot(NamedTuple):
    """Where the vector of one text belongs."""

    text: str
    role: Role
    digest: str
    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """Commands whose answers are needed.

    Attributes:
        commands: What is sent.
        keys: Of each command, the key that says where it goes.
        charged: Whether it is paid for out of the time that Redis may cost the call. Otherwise it
            may take that time once more, and costs nothing if it is answered.
        late: What is done with answers that come after the caller has left.
    """

    commands: Sequence[Command]
    keys: Sequence[str | bytes]
    charged: bool = True
    late: Callable[[list[Any]], None] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """A command that blocks for `seconds`; answered by the seconds that have passed."""

    command: Command
    key: str
    seconds: float


class NoReply:
    """What a lookup gets in an answer's place if Redis was not asked, or brought nothing."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


SKIPPED: Final = NoReply(Kind.SKIPPED)
FAILED: Final = NoReply(Kind.MISS)


class Found(NamedTuple):
    """What a lookup for one text came to: a vector, or else perhaps the right to make the call."""

    vector: list[float] | None
    lease: Lease | None = None


NOTHING: Final = Found(None)

Request: TypeAlias = Ask | Wait
if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Request, Any, Found]
    BatchSteps: TypeAlias = Generator[Request, Any, dict[Slot, list[float]]]


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


class Lookups:
    """Looks for vectors on a shelf, in older caches, and with other processes that are at it.

    Args:
        shelf: Where vectors belong.
        recorder: Counts.
        read_through: Older caches.
        lease_seconds: How long an owner may take; None: no single flight.
        longest_block: The longest that a command may block.
    """

    def __init__(
        self,
        shelf: Shelf,
        recorder: RedisRecorder,
        *,
        read_through: Sequence[ExistingCache],
        lease_seconds: float | None,
        longest_block: float,
    ) -> None:
        self._shelf = shelf
        self._writer = shelf.writer
        self._recorder = recorder
        self._read_through = read_through
        self._lease_seconds = lease_seconds
        self._longest_block = longest_block

    def one(self, slot: Slot) -> Steps:
        """Find one vector, or else the right to make the call."""
        vector = self._writer.find(slot.key)
        if vector is not None:
            self._recorder.count(Kind.HIT)
            return Found(vector)
        [reply] = yield Ask([("GET", slot.key)], [slot.key])
        if isinstance(reply, NoReply):
            self._recorder.count(reply.kind)
            return NOTHING
        vector, corrupt = self._shelf.judge(slot, reply)
        found = NOTHING if vector is None else Found(vector)
        if vector is None:
            older = yield from self._older([slot])
            if older:
                found = Found(older[slot])
            elif self._lease_seconds is not None:
                found = yield from self._join(slot, self._lease_seconds, ignore_value=corrupt)
        self._recorder.count(Kind.MISS if found.vector is None else Kind.HIT)
        return found

    def many(self, slots: Sequence[Slot]) -> BatchSteps:
        """Find those vectors that are there."""
        slots = list(dict.fromkeys(slots))
        vectors = {}
        for slot in slots:
            if (vector := self._writer.find(slot.key)) is not None:
                vectors[slot] = vector
        unknown = [slot for slot in slots if slot not in vectors]
        answered: list[Slot] = []
        skipped = 0
        for start in range(0, len(unknown), PIPELINE):
            some = unknown[start : start + PIPELINE]
            # Not one MGET: in a cluster its keys must share a slot, and for a key that holds
            # something else than a string it says the same as for one that holds nothing.
            replies = yield Ask([("GET", slot.key) for slot in some], [slot.key for slot in some])
            for slot, reply in zip(some, replies, strict=True):
                if isinstance(reply, NoReply):
                    skipped += reply.kind is Kind.SKIPPED
                    continue
                answered.append(slot)
                vector, _ = self._shelf.judge(slot, reply)
                if vector is not None:
                    vectors[slot] = vector
        missing = [slot for slot in answered if slot not in vectors]
        vectors.update((yield from self._older(missing)))
        self._recorder.count(Kind.HIT, len(vectors))
        self._recorder.count(Kind.SKIPPED, skipped)
        self._recorder.count(Kind.MISS, len(slots) - len(vectors) - skipped)
        return vectors

    def older_keys(self, slot: Slot) -> list[str | bytes]:
        """Return the keys under which older caches may have the text."""
        commands = (self._command(cache, slot) for cache in self._read_through)
        return [_key_of(command) for command in commands if command]

    def _older(self, slots: Sequence[Slot]) -> BatchSteps:
        """Find what older caches have, and copy it forward."""
        vectors: dict[Slot, list[float]] = {}
        for cache in self._read_through:
            asked = {slot: self._command(cache, slot) for slot in slots if slot not in vectors}
            askable = [(slot, command) for slot, command in asked.items() if command]
            for start in range(0, len(askable), PIPELINE):
                some = askable[start : start + PIPELINE]
                commands = [command for _, command in some]
                replies = yield Ask(commands, [_key_of(command) for command in commands])
                for (slot, _), entry in zip(some, replies, strict=True):
                    if isinstance(entry, NoReply):
                        continue
                    vector = self._shelf.carry_over(cache, slot, entry)
                    if vector is not None:
                        vectors[slot] = vector
        self._recorder.count(Kind.CARRIED_OVER, len(vectors))
        return vectors

    @staticmethod
    def _command(cache: ExistingCache, slot: Slot) -> Command | None:
        if slot.role not in cache.roles:
            return None
        try:
            return cache.command(slot.text)
        except Exception:  # noqa: BLE001 - a key encoder of the user's, and a text it can't take
            return None

    # -- one call in the fleet

    def _join(self, slot: Slot, lease_seconds: float, *, ignore_value: bool) -> Steps:
        """Take the lease, or wait for whoever has it.

        An owner that dies costs the fleet one more call: whoever is first to notice takes the
        lease, and the others wait for that one. Nobody waits for a third: those who ask while calls
        keep failing would wait for ever.
        """
        token = lease.new_token()

        def late(replies: list[Any]) -> None:
            """Give up a lease that was taken for a caller who has left."""
            state = lease.joined(slot.key, token, replies[0])
            if isinstance(state, lease.Lease):
                self._shelf.give_up(slot, state)

        def join(*, charged: bool) -> Ask:
            command = lease.join(slot.key, token, lease_seconds, ignore_value=ignore_value)
            return Ask([command], [slot.key], charged=charged, late=late)

        state = self._joined(slot, token, (yield join(charged=True)))
        if isinstance(state, lease.OtherOwner):
            self._recorder.count(Kind.WAITED)
        for _ in range(OWNERS):
            if not isinstance(state, lease.OtherOwner):
                break
            owner, left = state, lease_seconds + self._longest_block
            while left > 0 and isinstance(state, lease.OtherOwner) and state.token == owner.token:
                blocked = min(left, self._longest_block)
                left -= yield Wait(owner.wait(blocked), slot.key, blocked)
                state = self._joined(slot, token, (yield join(charged=False)))
        return state if isinstance(state, Found) else NOTHING

    def _joined(self, slot: Slot, token: str, replies: Sequence[Any]) -> Found | lease.OtherOwner:
        reply = replies[0]
        if isinstance(reply, (NoReply, Refusal)):
            return NOTHING
        state = lease.joined(slot.key, token, reply)
        if isinstance(state, lease.Lease):
            return Found(None, state)
        if isinstance(state, bytes):
            return Found(self._shelf.judge(slot, state)[0])
        return state or NOTHING


def _key_of(command: Command) -> str | bytes:
    key = command[1]
    return key if isinstance(key, (str, bytes)) else str(key)
