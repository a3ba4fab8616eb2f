"""Which stored ranges hold the wanted tensors, and where their bytes go. Pure: nothing is read here.

A block is what decodes alone. Blocks that lie close together in a shard travel in one request; a request is small enough
that many connections work side by side. Blocks that nobody asked for are not requested.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, starmap

from asyncckpt import errors
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.index import Index, blocks_of
from asyncckpt.format.plan import BLOCK_BYTES
from asyncckpt.format.stored import IndexedChunk, IndexedTensor, StoredBlock

REQUEST_BYTES = 8 * 2**20
"""Most stored bytes of one request, unless a single block has more."""
GAP_BYTES = 64 * 2**10
"""Unwanted bytes between two blocks that are cheaper to read than another request."""
ALIGN_BYTES = 64
"""Every tensor begins at such a boundary of the target."""
_DIRECT_BYTES = 2**20  # stored as they are and at least this many: read straight into the target

_Wanted = tuple[IndexedTensor, IndexedChunk, int]  # the last: its slot


@dataclass(slots=True)
class Slot:
    """Where one chunk goes: `target[start:start + raw_bytes]`, and what it must hash to."""

    path: str
    key: str
    start: int
    raw_bytes: int
    digest: bytes
    missing_bytes: int


@dataclass(slots=True)
class Block:
    """`pieces`: rows of (offset in the block, slot, offset in the target, bytes). `plane_bytes` 0: stored as it is."""

    raw_offset: int
    raw_bytes: int
    plane_bytes: int
    stored_offset: int
    frames: tuple[int, ...]  # stored bytes of each, one behind the other
    stored_bytes: int
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the block is one run of the target, so that it decodes straight into it."""
        return len(self.pieces) == 1 and self.pieces[0][3] == self.raw_bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One ranged read and the blocks in it."""

    key: str
    offset: int
    stored_bytes: int
    blocks: tuple[Block, ...]

    @property
    def direct(self) -> bool:
        """Whether the bytes are read into the target without a copy: what is one run there as it is here."""
        return all(map(_as_stored, self.blocks)) and all(starmap(_follows, pairwise(self.blocks)))


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """`tensors`: path to (offset in the target, bytes). `target_bytes`: of those that have no memory of their own, which stand first."""

    requests: tuple[Request, ...]
    slots: tuple[Slot, ...]
    tensors: dict[str, tuple[int, int]]
    target_bytes: int

    @property
    def wanted_bytes(self) -> int:
        """Plain bytes of the wanted tensors."""
        return sum(size for _, size in self.tensors.values())

    @property
    def requested_bytes(self) -> int:
        """Stored bytes that will be read."""
        return sum(request.stored_bytes for request in self.requests)


def plan_fetch(index: Index, paths: Iterable[str], own: Container[str] = ()) -> FetchPlan:
    """Lay the tensors out and find their ranges. An alias is planned once, with the tensor it stands for.

    Those in `own` stand behind the others with a gap before each, so that nothing reaches from one into the next.

    `RecordError` for a path that the index does not name, or whose chunks and frames do not fit together.
    """
    slots: list[Slot] = []
    places: dict[str, tuple[int, int]] = {}
    by_shard: dict[int, list[_Wanted]] = {}
    end = 0
    target_bytes = 0
    # neighbours there are neighbours here
    for tensor in sorted(_named(index, paths), key=lambda tensor: (tensor.path in own, *_stored_at(tensor))):
        path = tensor.path
        start = end = -(-end // ALIGN_BYTES) * ALIGN_BYTES + (ALIGN_BYTES if path in own else 0)
        for chunk in check_runs(tensor):
            by_shard.setdefault(chunk.shard, []).append((tensor, chunk, len(slots)))
            slots.append(Slot(path, index.shards[chunk.shard].key, end, chunk.raw_bytes, chunk.digest, chunk.raw_bytes))
            end += chunk.raw_bytes
        places[path] = (start, end - start)
        target_bytes = target_bytes if path in own else end
    requests: list[Request] = []
    for number, chunks in sorted(by_shard.items()):
        chunks.sort(key=lambda row: row[1].raw_offset)
        shard = index.shards[number]
        requests += _merge(shard.key, _framed(index, chunks, slots) if shard.frames else _plain(chunks, slots))
    return FetchPlan(tuple(requests), tuple(slots), places, target_bytes)


def _named(index: Index, paths: Iterable[str]) -> Iterator[IndexedTensor]:
    for path in dict.fromkeys(index.aliases.get(path, path) for path in paths):
        if path not in index.tensors:
            raise errors.RecordError(f"the index has no tensor {path!r}")
        yield index.tensors[path]


def _stored_at(tensor: IndexedTensor) -> tuple[int, int]:
    return tensor.chunks[0].shard, tensor.chunks[0].raw_offset


def check_runs(tensor: IndexedTensor) -> Sequence[IndexedChunk]:
    """The chunks of a tensor in the order of its bytes; `RecordError` unless they follow each other, each one run."""
    chunks = tensor.chunks if len(tensor.chunks) == 1 else sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
    end = 0
    for chunk in chunks:
        _check_place(tensor, chunk, end)
        end += chunk.raw_bytes
    return chunks


def _check_place(tensor: IndexedTensor, chunk: IndexedChunk, offset_bytes: int) -> None:
    """A chunk must be one run of its tensor that begins at `offset_bytes`."""
    if len(tensor.chunks) == 1 and chunk.sizes == tensor.shape:
        return
    start, begun = 0, False
    for offset, size, extent in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True):
        start = start * extent + offset
        if begun and size != extent:
            raise errors.RecordError(f"a chunk of {tensor.path} is not one run of its elements", key=tensor.path)
        begun = begun or size != 1
    if start * DTYPES[tensor.dtype].element_bytes != offset_bytes:
        raise errors.RecordError(f"the chunks of {tensor.path} leave a hole or overlap", key=tensor.path)


def _framed(index: Index, chunks: Sequence[_Wanted], slots: Sequence[Slot]) -> Iterator[Block]:
    """The compressed blocks that hold the chunks, in stored order; a block shared by several chunks comes once."""
    last: Block | None = None
    last_end = 0
    for tensor, chunk, number in chunks:
        if last is not None and chunk.raw_offset + chunk.raw_bytes <= last_end:  # 20,000 small ones share a few blocks
            last.pieces.append((chunk.raw_offset - last.raw_offset, number, slots[number].start, chunk.raw_bytes))
            continue
        for stored in blocks_of(index, tensor, chunk):
            if last is None or last.stored_offset != stored.stored_offset:
                if last is not None:
                    yield last
                last = _block(index.shards[chunk.shard].key, stored)
                last_end = stored.raw_offset + stored.raw_bytes
            first = max(stored.raw_offset, chunk.raw_offset)
            end = min(stored.raw_offset + stored.raw_bytes, chunk.raw_offset + chunk.raw_bytes)
            target = slots[number].start + first - chunk.raw_offset
            last.pieces.append((first - stored.raw_offset, number, target, end - first))
    if last is not None:
        yield last


def _block(key: str, stored: StoredBlock) -> Block:
    if stored.stored_bytes > 2 * BLOCK_BYTES or stored.raw_bytes > BLOCK_BYTES:  # or a forged table asks for any memory
        raise errors.ResourceLimitError(f"a block stored in {stored.stored_bytes} bytes is above the limit", key=key)
    frames = tuple(row[3] for row in stored.frames)
    return Block(
        stored.raw_offset, stored.raw_bytes, stored.plane_bytes, stored.stored_offset, frames, stored.stored_bytes
    )


def _plain(chunks: Sequence[_Wanted], slots: Sequence[Slot]) -> Iterator[Block]:
    """Blocks of a shard that is stored as it is."""
    for _, chunk, number in chunks:
        for done in range(0, chunk.raw_bytes, REQUEST_BYTES):
            size = min(REQUEST_BYTES, chunk.raw_bytes - done)
            piece = (0, number, slots[number].start + done, size)
            start = chunk.raw_offset + done
            yield Block(start, size, 0, start, (size,), size, [piece])


def _as_stored(block: Block) -> bool:
    return block.plane_bytes == 0 and block.whole


def _follows(before: Block, block: Block) -> bool:
    """Is it the next one, in the object and in the target?"""
    return (
        before.stored_offset + before.stored_bytes == block.stored_offset
        and before.pieces[0][2] + before.raw_bytes == block.pieces[0][2]
    )


def _merge(key: str, blocks: Iterable[Block]) -> Iterator[Request]:
    waiting: list[Block] = []
    start = end = 0
    large = False  # waits one that is read alone, unless others join its run?
    direct = False  # are all that wait one run, read straight into the target?
    for block in blocks:
        far = block.stored_offset - end > GAP_BYTES or block.stored_offset + block.stored_bytes - start > REQUEST_BYTES
        is_large = block.plane_bytes == 0 and block.stored_bytes >= _DIRECT_BYTES
        goes_on = direct and _as_stored(block) and _follows(waiting[-1], block)
        if waiting and (far or ((is_large or large) and not goes_on)):
            yield Request(key, start, end - start, tuple(waiting))
            waiting = []
        if not waiting:
            start, large, direct = block.stored_offset, False, True
            goes_on = _as_stored(block)
        waiting.append(block)
        large, direct = large or is_large, direct and goes_on
        end = block.stored_offset + block.stored_bytes
    if waiting:
        yield Request(key, start, end - start, tuple(waiting))
