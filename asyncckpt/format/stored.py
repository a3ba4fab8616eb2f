"""What an index says is stored, and which bytes of which object a reader must fetch for it."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.format.plan import LARGE_BYTES, Layout

Offsets = npt.NDArray[np.int64]


class IndexedChunk(NamedTuple):
    """A box of a tensor. `raw_offset`: in its shard's safetensors stream; `digests`: BLAKE3 of each piece of its plain bytes, joined."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    raw_offset: int
    raw_bytes: int
    digests: bytes

    def digest(self, piece: int) -> bytes:
        """Of the plain bytes from `piece * BLOCK_BYTES` on."""
        return self.digests[piece * DIGEST_BYTES : (piece + 1) * DIGEST_BYTES]


class IndexedTensor(NamedTuple):
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


class FrameTable:
    """The zstd frames of a shard, in order: where each begins, and as the last entry where the last one ends.

    `raw`: in the safetensors stream; `stored`: in the object. 16 bytes a frame: an index names a million of them.
    """

    __slots__ = ("raw", "stored")

    def __init__(self, raw_bytes: Offsets, stored_bytes: Offsets) -> None:
        self.raw = _sums(raw_bytes)
        self.stored = _sums(stored_bytes)

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]]) -> "FrameTable":
        """From raw and stored bytes of each frame."""
        sizes = np.array(list(rows), np.int64).reshape(-1, 2)
        return cls(sizes[:, 0], sizes[:, 1])

    def rows(self) -> list[tuple[int, int]]:
        """Raw and stored bytes of each frame."""
        return list(zip(np.diff(self.raw).tolist(), np.diff(self.stored).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.raw) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameTable):
            return NotImplemented
        return np.array_equal(self.raw, other.raw) and np.array_equal(self.stored, other.stored)

    __hash__ = None  # type: ignore[assignment]


def _sums(sizes: Offsets) -> Offsets:
    sums = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=sums[1:])
    return sums


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """A stored object. `frames`: without holes from its first byte to its last; none under codec `none`.

    `header_digest`: BLAKE3 of the safetensors header with its length and padding, all bytes before the data.
    """

    key: str
    raw_bytes: int
    stored_bytes: int
    frames: FrameTable
    header_digest: bytes


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """What is fetched and decoded as one. `frames`: stored bytes of each, one per plane, side by side; none under codec `none`."""

    stored_offset: int
    stored_bytes: int
    frames: tuple[int, ...]
    raw_offset: int
    raw_bytes: int
    plane_bytes: int

    def split(self, data: memoryview) -> list[memoryview]:
        """The frames out of the block's stored bytes."""
        found, start = [], 0
        for size in self.frames:
            found.append(data[start : start + size])
            start += size
        return found


class BlockFinder:
    """The blocks of one shard. Lists of its own while it lives: a look at a NumPy array costs ten times one at a list."""

    def __init__(self, shard: IndexedShard) -> None:
        self._framed = len(shard.frames) > 0
        self._raw: list[int] = shard.frames.raw.tolist() if self._framed else []
        self._stored: list[int] = shard.frames.stored.tolist() if self._framed else []

    def blocks(self, tensor: IndexedTensor, chunk: IndexedChunk) -> list[StoredBlock]:
        """The blocks that hold a chunk, one a piece, in order. A small chunk's block may hold others too: compare the raw offsets.

        `CorruptCheckpointError` if the frames are not cut as the format says.
        """
        start, end, planes = chunk.raw_offset, chunk.raw_offset + chunk.raw_bytes, tensor.plane_bytes
        if start == end:
            return []
        if not self._framed:
            edges = [*range(start, end, BLOCK_BYTES), end]
            return [StoredBlock(begin, stop - begin, (), begin, stop - begin, 1) for begin, stop in pairwise(edges)]
        frame = bisect_right(self._raw, start) - 1
        if planes == 1 and chunk.raw_bytes < LARGE_BYTES:
            if frame < 1 or end > self._raw[frame + 1]:  # the first frame is the header
                raise CorruptCheckpointError("a small chunk that is not whole in one frame", key=tensor.path)
            return [self._block(frame, 1)]
        found = []
        for begin in range(start, end, BLOCK_BYTES):
            size = min(BLOCK_BYTES, end - begin)
            edges = self._raw[frame : frame + planes + 1]
            if size % planes or edges != [begin + number * (size // planes) for number in range(planes + 1)]:
                what = "planes of a block" if planes > 1 else "block of a large chunk"
                raise CorruptCheckpointError(f"frames that are no {what}", key=tensor.path)
            found.append(self._block(frame, planes))
            frame += planes
        return found

    def _block(self, frame: int, planes: int) -> StoredBlock:
        edges = self._stored[frame : frame + planes + 1]
        frames = tuple(after - before for before, after in pairwise(edges))
        raw = self._raw[frame]
        return StoredBlock(edges[0], edges[-1] - edges[0], frames, raw, self._raw[frame + planes] - raw, planes)
