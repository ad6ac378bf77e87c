"""What names and values look like, byte for byte: a fleet of several versions shares them."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest

from prefetch_embeddings._redis import codec
from prefetch_embeddings._redis.codec import CorruptValueError

KEY = "0" * 32
PLAIN = codec.Codec()


def value(kind: bytes, dimensions: int, floats: bytes, magic: bytes = b"PEv\x01") -> bytes:
    """Return a value whose checksum is right, whatever it says."""
    header = struct.pack("<4sc3xI", magic, kind, dimensions)
    checksum = zlib.crc32(KEY.encode() + header + floats)
    return header + struct.pack("<I", checksum) + floats


def test_a_digest_is_of_the_parts_each_after_its_length() -> None:
    space = codec.space("model", 256, "query")
    assert space == b"5:model3:2565:query"
    expected = hashlib.blake2b(b"5:model3:2565:query6:gr\xc3\xbc\xc3\x9f", digest_size=16)
    assert PLAIN.digest(space, "grüß") == expected.hexdigest()
    assert codec.space("m", None, "document") == b"1:m0:8:document"


def test_a_lone_surrogate_has_a_digest() -> None:
    space = codec.space("model", None, "query")
    assert len(PLAIN.digest(space, "\ud800")) == 32


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (None, "too short for a header"),
        (value(b"x", 0, b""), "another number type"),
        (b"", "too short for a header"),
        (value(b"f", 0, b"")[:-1], "too short for a header"),
        (value(b"f", 1, bytes(4), magic=b"PEv\x02"), "another format"),
        (value(b"f", 1, bytes(8)), "length does not match the header"),
        (value(b"d", 1, bytes(4)), "length does not match the header"),
        (value(b"x", 4, bytes(4)), "another number type"),
        (value(b"f", 1, bytes(4))[:-1] + b"\1", "checksum does not match"),
    ],
)
def test_what_does_not_check_says_why(stored: bytes, why: str) -> None:
    with pytest.raises(CorruptValueError, match=f"^{why}$"):
        PLAIN.decode(stored, KEY)


def test_a_right_checksum_is_accepted() -> None:
    assert PLAIN.decode(value(b"f", 2, struct.pack("<2f", 0.5, -1.0)), KEY) == [0.5, -1.0]
    assert PLAIN.decode(value(b"f", 0, b""), KEY) == []
