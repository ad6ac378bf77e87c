"""Vectors as bytes, and the digests that name them: pure, no Redis.

A value is a header and the floats, little-endian:

    0  magic, `b"PEv"`
    3  format version: 1, or 2 with a secret
    4  number type: `f` (32 bits) or `d` (64 bits)
    5  three zero bytes
    8  dimensions, unsigned 32 bits
    12 checksum of the key's digest, the header so far and the floats

The checksum covers the digest so that a value under another key does not check either. Without a
secret it is a CRC-32: it finds accidents. With one it is a keyed BLAKE2b of 16 bytes: nobody who
does not know the secret can make a value that checks.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Role = Literal["query", "document"]

MAGIC: Final = b"PEv\x01"
KEYED_MAGIC: Final = b"PEv\x02"
_HEADER: Final = struct.Struct("<4sc3xI")
_CHECKSUM: Final = struct.Struct("<I")
_KEYED_CHECKSUM_SIZE: Final = 16
_ITEM_SIZES: Final = {b"f": 4, b"d": 8}
_SWAP: Final = sys.byteorder == "big"


class CorruptValueError(ValueError):
    """The bytes are not a vector that this version wrote under this digest."""


def space(model_id: str, dimensions: int | None, role: Role) -> bytes:
    """Return what all texts share whose vectors may be compared, for `digest`.

    Args:
        model_id: What identifies the model.
        dimensions: The length that the model was asked for, where it was.
        role: What the texts are embedded as.
    """
    size = "" if dimensions is None else str(dimensions)
    return b"".join(_length_prefixed(part) for part in (model_id, size, role))


def _length_prefixed(part: str) -> bytes:
    encoded = part.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(encoded), encoded)


def snapshot(vector: Iterable[float]) -> array[float]:
    """Return the numbers of `vector` as they are now, 8 bytes each.

    Raises:
        TypeError: Something in it is not a number.
        OverflowError: An integer in it does not fit a float.
    """
    return array("d", vector)


def is_sound(vector: array[float]) -> bool:
    """Return whether it is a vector to keep: not empty, all numbers finite, not zeros alone."""
    return any(vector) and all(map(math.isfinite, vector))


class Codec:
    """Digests texts and encodes vectors, with a secret or without.

    Args:
        secret: Who does not know it can neither guess a text from its digest nor make a value that
            is accepted. None: digests and checksums that everybody can compute.
    """

    def __init__(self, secret: str | bytes | None = None) -> None:
        self._key = b""
        if secret is not None:
            encoded = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
            self._key = hashlib.blake2b(encoded, digest_size=32, person=b"prefetch-emb").digest()
        self._magic = KEYED_MAGIC if self._key else MAGIC
        size = _KEYED_CHECKSUM_SIZE if self._key else _CHECKSUM.size
        self._floats_at = _HEADER.size + size

    def digest(self, of_space: bytes, text: str) -> str:
        """Return the 32 hexadecimal digits that decide whether two vectors are the same.

        Each part of what is hashed is preceded by its length, so that no two questions run
        together.

        Args:
            of_space: What `space` returned.
            text: Any `str`, lone surrogates included.
        """
        parts = of_space + _length_prefixed(text)
        return hashlib.blake2b(parts, digest_size=16, key=self._key).hexdigest()

    def encode(self, doubles: array[float], key_digest: str) -> bytes:
        """Return the value for `doubles`: 32 bits a float where every bit survives that."""
        numbers = array("f", doubles)
        kind = b"f"
        # Compared as bytes: -0.0 equals 0.0 and NaN equals nothing, yet all must come back.
        if array("d", numbers).tobytes() != doubles.tobytes():
            numbers, kind = array("d", doubles), b"d"
        if _SWAP:
            numbers.byteswap()
        header = _HEADER.pack(self._magic, kind, len(doubles))
        floats = numbers.tobytes()
        return b"".join((header, self._checksum(key_digest, header, floats), floats))

    def decode(self, value: bytes, key_digest: str) -> list[float]:
        """Return the vector that `encode` made `value` of, as a new list.

        Raises:
            CorruptValueError: Truncated, of another format or number type, not of the dimensions
                it claims, damaged, written under another digest or with another secret.
        """
        if not isinstance(value, bytes) or len(value) < self._floats_at:
            raise CorruptValueError("too short for a header")
        header = value[: _HEADER.size]
        magic, kind, dimensions = _HEADER.unpack(header)
        if magic != self._magic:
            raise CorruptValueError("another format")
        if kind not in _ITEM_SIZES:
            raise CorruptValueError("another number type")
        if len(value) != self._floats_at + dimensions * _ITEM_SIZES[kind]:
            raise CorruptValueError("length does not match the header")
        floats = memoryview(value)[self._floats_at :]
        checksum = value[_HEADER.size : self._floats_at]
        expected = self._checksum(key_digest, header, floats)
        if not hmac.compare_digest(checksum, expected):
            raise CorruptValueError("checksum does not match")
        numbers: array[float] = array(kind.decode())
        numbers.frombytes(floats)
        if _SWAP:
            numbers.byteswap()
        return numbers.tolist()

    def _checksum(self, key_digest: str, header: bytes, floats: bytes | memoryview) -> bytes:
        if not self._key:
            return _CHECKSUM.pack(
                zlib.crc32(floats, zlib.crc32(header, zlib.crc32(key_digest.encode())))
            )
        keyed = hashlib.blake2b(
            key_digest.encode() + header, digest_size=_KEYED_CHECKSUM_SIZE, key=self._key
        )
        keyed.update(floats)
        return keyed.digest()
