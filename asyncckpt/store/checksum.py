"""Checksums of a body, in the words that S3 takes in headers; the one file that imports google_crc32c.

Always headers: a trailer makes the body chunked (0.23 s of CPU a GB more), and some stores refuse it.
"""

import base64
import hashlib
import zlib
from typing import Literal

import google_crc32c
import numpy as np

from asyncckpt.store.base import Buffers, byte_views

Algorithm = Literal["crc32c", "crc32", "md5"]
HEADERS: dict[Algorithm, str] = {"crc32c": "ChecksumCRC32C", "crc32": "ChecksumCRC32", "md5": "ContentMD5"}
"""The parameter of botocore that becomes the header."""
IN_HARDWARE = google_crc32c.implementation == "c"
"""Whether CRC32C costs next to nothing here. Without its C library the package computes in Python."""
_PIECE_BYTES = 2**20  # of one call, which holds the GIL


def checksum(algorithm: Algorithm, data: Buffers) -> str:
    """Of the joined buffers, without joining them."""
    views = byte_views(data)
    if algorithm == "md5":
        found = hashlib.md5(usedforsecurity=False)
        for view in views:
            found.update(view)
        return base64.b64encode(found.digest()).decode()
    value = 0
    for view in views:
        for start in range(0, view.nbytes, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            if algorithm == "crc32":
                value = zlib.crc32(piece, value)
            else:  # its C code takes no view of memory that may change, an array over the same memory it does
                value = google_crc32c.extend(value, np.frombuffer(piece, np.uint8))
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def etag_of(md5: str) -> str:
    """What a store that calls an object by its MD5 answers for this one."""
    return base64.b64decode(md5).hex()
