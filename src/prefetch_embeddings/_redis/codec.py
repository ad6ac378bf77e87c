"""Vectors as bytes, and the digests that name them: pure functions, no Redis.

A value is a header of 16 bytes and the floats, little-endian:

    0  magic, `b"PEv"`
    3  format version, 1
    4  number type: `f` (32 bits) or `d` (64 bits)
    5  three zero bytes
    8  dimensions, unsigned 32 bits
    12 CRC-32 of the key's digest, the header so far and the floats

The checksum covers the digest so that a value under another key does not check either.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Role = Literal["query", "document"]

MAGIC: Final = b"PEv\x01"
_HEADER: Final = struct.Struct("<4sc3xI")
_CHECKSUM: Final = struct.Struct("<I")
_FLOATS_AT: Final = _HEADER.size + _CHECKSUM.size
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


def digest(of_space: bytes, text: str) -> str:
    """Return the 32 hexadecimal digits that decide whether two vectors are the same.

    Each part of what is hashed is preceded by its length, so that no two questions run together.

    Args:
        of_space: What `space` returned.
        text: Any `str`, lone surrogates included.
    """
    return hashlib.blake2b(of_space + _length_prefixed(text), digest_size=16).hexdigest()


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


def encode(doubles: array[float], key_digest: str) -> bytes:
    """Return the value that stands for `doubles`: 32 bits a float where every bit survives that."""
    numbers = array("f", doubles)
    kind = b"f"
    # Compared as bytes: -0.0 equals 0.0 and NaN equals nothing, yet all must come back.
    if array("d", numbers).tobytes() != doubles.tobytes():
        numbers, kind = array("d", doubles), b"d"
    if _SWAP:
        numbers.byteswap()
    header = _HEADER.pack(MAGIC, kind, len(doubles))
    floats = numbers.tobytes()
    return b"".join((header, _CHECKSUM.pack(_checksum(key_digest, header, floats)), floats))


def decode(value: bytes, key_digest: str) -> list[float]:
    """Return the vector that `encode` made `value` of, as a new list.

    Raises:
        CorruptValueError: Truncated, of another format or number type, not of the dimensions it
            claims, damaged, or written under another digest.
    """
    if not isinstance(value, bytes) or len(value) < _FLOATS_AT:
        raise CorruptValueError("too short for a header")
    header = value[: _HEADER.size]
    magic, kind, dimensions = _HEADER.unpack(header)
    if magic != MAGIC:
        raise CorruptValueError("another format")
    if kind not in _ITEM_SIZES:
        raise CorruptValueError("another number type")
    if len(value) != _FLOATS_AT + dimensions * _ITEM_SIZES[kind]:
        raise CorruptValueError("length does not match the header")
    floats = memoryview(value)[_FLOATS_AT:]
    if _CHECKSUM.unpack_from(value, _HEADER.size)[0] != _checksum(key_digest, header, floats):
        raise CorruptValueError("checksum does not match")
    numbers: array[float] = array(kind.decode())
    numbers.frombytes(floats)
    if _SWAP:
        numbers.byteswap()
    return numbers.tolist()


def _checksum(key_digest: str, header: bytes, floats: bytes | memoryview) -> int:
    return zlib.crc32(floats, zlib.crc32(header, zlib.crc32(key_digest.encode())))
