"""Checksums of a body, in the words that S3 takes in headers; the one file that imports google_crc32c.

Always headers: a trailer makes the body chunked (0.23 s of CPU a GB more), and some stores refuse it.
"""

import base64
import hashlib
import zlib
from collections.abc import Sequence
from typing import Literal

import google_crc32c
import numpy as np

from asyncckpt.store.base import Buffer, Buffers, byte_views

Crc = Literal["crc32c", "crc32"]
Algorithm = Crc | Literal["md5"]
HEADERS: dict[Algorithm, str] = {"crc32c": "ChecksumCRC32C", "crc32": "ChecksumCRC32", "md5": "ContentMD5"}
"""The parameter of botocore that becomes the header."""
IN_HARDWARE = google_crc32c.implementation == "c"
"""Whether CRC32C costs next to nothing here. Without its C library the package computes in Python."""
_PIECE_BYTES = 2**20  # of one call, which holds the GIL


class Summed(list[Buffer]):
    """Buffers of one body, with the CRC of all that were appended: what has just been written is summed in half the time."""

    def __init__(self, algorithm: Crc) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.value = 0

    def append(self, buffer: Buffer) -> None:
        self.value = _extended(self.algorithm, self.value, byte_views([buffer]))
        super().append(buffer)


def checksum(algorithm: Algorithm, data: Buffers) -> str:
    """Of the joined buffers, without joining them."""
    if algorithm == "md5":
        found = hashlib.md5(usedforsecurity=False)
        for view in byte_views(data):
            found.update(view)
        return base64.b64encode(found.digest()).decode()
    if isinstance(data, Summed) and data.algorithm == algorithm:
        value = data.value
    else:
        value = _extended(algorithm, 0, byte_views(data))
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _extended(algorithm: Crc, value: int, views: Sequence[memoryview]) -> int:
    """A CRC, gone on over more bytes."""
    for view in views:
        for start in range(0, view.nbytes, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            if algorithm == "crc32":
                value = zlib.crc32(piece, value)
            else:  # its C code takes no view of memory that may change, an array over the same memory it does
                value = google_crc32c.extend(value, np.frombuffer(piece, np.uint8))
    return value


def etag_of(md5: str) -> str:
    """What a store that calls an object by its MD5 answers for this one."""
    return base64.b64decode(md5).hex()
