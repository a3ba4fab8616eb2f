"""How the bytes of a chunk that is no run of what is wanted get there: piece by piece, each with a few strided copies."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asyncckpt.format.box import Box, intersect, parts

_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


@dataclass(frozen=True, slots=True)
class Placing:
    """`chunk`: the box of the tensor that is stored; `window`: the box that is wanted, which begins at `start` of the target."""

    chunk: Box
    window: Box
    element_bytes: int
    start: int

    @property
    def window_bytes(self) -> int:
        """Of all that is wanted of the tensor."""
        return math.prod(self.window[1]) * self.element_bytes

    def touches(self, offset: int, raw_bytes: int) -> bool:
        """Whether some of these bytes of the chunk are wanted."""
        return any(True for _ in self._hits(offset, raw_bytes))

    def put(self, offset: int, data: memoryview, window: memoryview) -> None:
        """Copy what is wanted of the chunk's bytes from `offset` on into the window's memory."""
        kind = _WORDS[self.element_bytes]
        target = np.frombuffer(window, kind).reshape(self.window[1])
        source = np.frombuffer(data, kind)
        for position, box, hit in self._hits(offset, len(data)):
            held = source[position : position + math.prod(box[1])].reshape(box[1])
            target[_slices(hit, self.window)] = held[_slices(hit, box)]

    def _hits(self, offset: int, raw_bytes: int) -> Iterator[tuple[int, Box, Box]]:
        """Boxes of the tensor that these bytes are made of, with what is wanted of each; the first number: where it begins, in elements."""
        first, position = offset // self.element_bytes, 0
        for begins, sizes in parts(self.chunk[1], first, first + raw_bytes // self.element_bytes):
            box = tuple(map(sum, zip(begins, self.chunk[0], strict=True))), sizes
            hit = intersect(box, self.window)
            if hit is not None:
                yield position, box, hit
            position += math.prod(sizes)


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where the one box lies in the other."""
    rows = zip(*inner, outer[0], strict=True)
    return tuple(slice(begin - base, begin - base + size) for begin, size, base in rows)
