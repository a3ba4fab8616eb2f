"""What an index says is stored, and which bytes of which object a reader must fetch for it."""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.plan import Layout

Row = tuple[int, int, int, int]
"""One frame: raw_offset, raw_bytes, stored_offset, stored_bytes."""


@dataclass(frozen=True, slots=True)
class IndexedChunk:
    """A box of a tensor. `raw_offset`: in its shard's safetensors stream; `digest`: BLAKE3 of its plain bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    raw_offset: int
    raw_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class IndexedTensor:
    """A stored tensor. `group`: position in `Index.groups`; `path`: what users see."""

    group: int
    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    chunks: tuple[IndexedChunk, ...]

    @property
    def plane_bytes(self) -> int:
        """Planes of a block: the element size in layout `planes`, else 1."""
        return DTYPES[self.dtype].element_bytes if self.layout == "planes" else 1

    @property
    def raw_bytes(self) -> int:
        """Of all its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].element_bytes


@dataclass(frozen=True)
class IndexedShard:
    """A stored object. `frames`: its rows, without holes from its first byte to its last; none under codec `none`.

    `header_digest`: BLAKE3 of the safetensors header with its length and padding, all bytes before the data.
    """

    key: str
    raw_bytes: int
    stored_bytes: int
    frames: tuple[Row, ...]
    header_digest: bytes

    @cached_property
    def _raw_offsets(self) -> list[int]:
        return [row[0] for row in self.frames]

    def stored_range(self, raw_start: int, raw_end: int) -> tuple[int, int, tuple[Row, ...]]:
        """Where the bytes `[raw_start, raw_end)` are stored: offset, bytes, and the rows of all frames they touch."""
        if raw_start >= raw_end or not self.frames:
            return raw_start, max(raw_end - raw_start, 0), ()
        first = bisect_right(self._raw_offsets, raw_start) - 1
        rows = self.frames[first : bisect_left(self._raw_offsets, raw_end)]
        return rows[0][2], rows[-1][2] + rows[-1][3] - rows[0][2], rows


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """What is fetched and decoded as one. `frames`: its rows, one per plane; none under codec `none`: the bytes as they are."""

    stored_offset: int
    stored_bytes: int
    frames: tuple[Row, ...]
    raw_offset: int
    raw_bytes: int
    plane_bytes: int

    def split(self, data: memoryview) -> list[memoryview]:
        """The frames out of the block's stored bytes."""
        starts = [row[2] - self.stored_offset for row in self.frames]
        return [data[start : start + row[3]] for start, row in zip(starts, self.frames, strict=True)]
