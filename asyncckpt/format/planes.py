"""Byte planes: byte 0 of every element, then byte 1, and so on. Signs and exponents end up side by side and compress.

Shift-and-cast runs at memory speed where a strided copy does not: 10 to 20 GB/s against 4 for 2 and 4 byte elements.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_PIECE = 1 << 16  # elements; input and outputs of a piece stay in the L2 cache
ELEMENT_BYTES = (2, 4, 8)
_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def split(src: Bytes, element_bytes: int, out: Bytes) -> None:
    """Write the planes of `src` into `out`, of the same length: a multiple of `element_bytes` (2, 4 or 8)."""
    words = src.view(_WORDS[element_bytes])
    planes = out.reshape(element_bytes, len(words))
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE]
        stop = start + len(piece)
        planes[0, start:stop] = piece
        for byte in range(1, element_bytes):
            np.right_shift(piece, 8 * byte, out=planes[byte, start:stop], casting="unsafe")


def merge(planes: Bytes, element_bytes: int, out: Bytes) -> None:
    """Mirror of `split`."""
    count = len(out) // element_bytes
    table = planes.reshape(element_bytes, count)
    if element_bytes == 8 or out.ctypes.data % element_bytes:
        elements = out.reshape(count, element_bytes)
        for byte in range(element_bytes):
            elements[:, byte] = table[byte]
        return
    words = out.view(_WORDS[element_bytes])
    shifted = np.empty(min(_PIECE, count), words.dtype)
    for start in range(0, count, _PIECE):
        piece = words[start : start + _PIECE]
        stop = start + len(piece)
        part = shifted[: len(piece)]
        piece[...] = table[0, start:stop]
        for byte in range(1, element_bytes):
            np.left_shift(table[byte, start:stop], 8 * byte, out=part, dtype=words.dtype)
            np.bitwise_or(piece, part, out=piece)
