"""Which stored ranges hold the wanted tensors, and where their bytes go. Pure: nothing is read here.

A block is what decodes alone, and it holds pieces: what one digest covers. Blocks that lie close together in a shard travel in one
request; a request is small enough that many connections work side by side. Blocks that nobody asked for are not requested.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, starmap
from typing import NamedTuple

from asyncckpt import errors
from asyncckpt.engine.placing import Placing
from asyncckpt.format.box import Box, intersect, run_start
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.index import BlockFinder, Index, IndexedChunk, IndexedTensor, StoredBlock
from asyncckpt.format.limits import BLOCK_BYTES

REQUEST_BYTES = 8 * 2**20
"""Most stored bytes of one request, unless a single block has more."""
GAP_BYTES = 64 * 2**10
"""Unwanted bytes between two blocks that are cheaper to read than another request."""
ALIGN_BYTES = 64
"""Every tensor begins at such a boundary of the target."""
_DIRECT_BYTES = 2**20  # stored as they are and at least this many: read straight into the target


class Slot(NamedTuple):
    """A wanted chunk. `start`: where its bytes go in the target, one run there; or `placing` says where, and `start` nothing."""

    tensor: IndexedTensor
    chunk: IndexedChunk
    start: int
    placing: Placing | None


class Piece(NamedTuple):
    """What one digest covers. `offset`: in its block; `number`: among the pieces of its chunk; `start`: in the target, or -1."""

    offset: int
    raw_bytes: int
    slot: int
    number: int
    start: int


@dataclass(frozen=True, slots=True)
class Block:
    """`pieces`: those that are wanted of what the block holds."""

    stored: StoredBlock
    pieces: list[Piece] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the block is one run of the target, so that it decodes straight into it."""
        return len(self.pieces) == 1 and self.pieces[0].raw_bytes == self.stored.raw_bytes and self.pieces[0].start >= 0


@dataclass(frozen=True)
class Request:
    """One ranged read and the blocks in it."""

    key: str
    offset: int
    stored_bytes: int
    blocks: tuple[Block, ...]

    @cached_property  # asked for every block
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
        """Plain bytes of all pieces that are read."""
        return sum(piece.raw_bytes for request in self.requests for block in request.blocks for piece in block.pieces)

    @property
    def requested_bytes(self) -> int:
        """Stored bytes that will be read."""
        return sum(request.stored_bytes for request in self.requests)


def plan_fetch(
    index: Index, paths: Iterable[str], own: Container[str] = (), boxes: Mapping[str, Box] | None = None
) -> FetchPlan:
    """Lay the tensors out and find their ranges. An alias is planned once, with the tensor it stands for.

    Those in `own` stand behind the others with a gap before each, so that nothing reaches from one into the next. Of those in `boxes`,
    by the path of a tensor that is no alias, that box alone is wanted.

    `RecordError` for a path that the index does not name; `CorruptCheckpointError` if chunks and frames do not fit together.
    """
    slots: list[Slot] = []
    places: dict[str, tuple[int, int]] = {}
    by_shard: dict[int, list[int]] = {}
    end = 0
    target_bytes = 0
    # neighbours there are neighbours here
    for tensor in sorted(_named(index, paths), key=lambda tensor: (tensor.path in own, *_stored_at(tensor))):
        path = tensor.path
        start = -(-end // ALIGN_BYTES) * ALIGN_BYTES + (ALIGN_BYTES if path in own else 0)
        box = None if boxes is None else boxes.get(path)
        if box is None and len(tensor.chunks) == 1:  # most are
            found: Iterable[Slot] = (Slot(tensor, tensor.chunks[0], start, None),)
            end = start + tensor.chunks[0].raw_bytes
        else:
            window = whole_of(tensor) if box is None else _checked(tensor, box)
            found = slots_of(tensor, window, start)
            end = start + math.prod(window[1]) * DTYPES[tensor.dtype].element_bytes
        for slot in found:
            if slot.chunk.raw_bytes:
                by_shard.setdefault(slot.chunk.shard, []).append(len(slots))
                slots.append(slot)
        places[path] = (start, end - start)
        target_bytes = target_bytes if path in own else end
    requests: list[Request] = []
    for number, wanted in sorted(by_shard.items()):
        shard = index.shards[number]
        wanted.sort(key=lambda at: slots[at].chunk.raw_offset)
        requests += _merge(shard.key, _blocks(BlockFinder(shard), wanted, slots))
    return FetchPlan(tuple(requests), tuple(slots), places, target_bytes)


def _named(index: Index, paths: Iterable[str]) -> Iterator[IndexedTensor]:
    for path in dict.fromkeys(index.aliases.get(path, path) for path in paths):
        if path not in index.tensors:
            raise errors.RecordError(f"the index has no tensor {path!r}")
        yield index.tensors[path]


def _stored_at(tensor: IndexedTensor) -> tuple[int, int]:
    return tensor.chunks[0].shard, tensor.chunks[0].raw_offset


def whole_of(tensor: IndexedTensor) -> Box:
    """The box that is all of the tensor."""
    return (0,) * len(tensor.shape), tensor.shape


def _checked(tensor: IndexedTensor, box: Box) -> Box:
    if len(box[0]) != len(tensor.shape) or len(box[1]) != len(tensor.shape):
        raise ValueError(f"a box of {len(box[0])} dimensions of a tensor of {len(tensor.shape)}")
    for begin, size, extent in zip(*box, tensor.shape, strict=True):
        if begin < 0 or size < 0 or begin + size > extent:
            raise ValueError(f"the box {box} is not inside of a tensor of shape {tensor.shape}")
    return box


def slots_of(tensor: IndexedTensor, window: Box, start: int = 0) -> Iterator[Slot]:
    """The chunks that hold some of the window, whose bytes begin at `start` of the target."""
    if window == (tensor.chunks[0].offsets, tensor.chunks[0].sizes):
        yield Slot(tensor, tensor.chunks[0], start, None)
        return
    element_bytes = DTYPES[tensor.dtype].element_bytes
    for chunk in tensor.chunks:
        box = chunk.offsets, chunk.sizes
        hit = intersect(box, window)
        if hit is None:
            continue
        inside = tuple(at - begin for at, begin in zip(chunk.offsets, window[0], strict=True)), chunk.sizes
        run = run_start(inside, window[1]) if hit == box else None
        if run is None:
            yield Slot(tensor, chunk, -1, Placing(box, window, element_bytes, start))
        else:
            yield Slot(tensor, chunk, start + run * element_bytes, None)


def _blocks(finder: BlockFinder, wanted: Sequence[int], slots: Sequence[Slot]) -> Iterator[Block]:
    """The blocks that hold the chunks, in stored order, each once: small chunks share one, and two chunks may be the same bytes."""
    waiting: dict[int, Block] = {}  # by raw offset: the blocks of the last chunk
    end = 0  # of them
    for number in wanted:
        tensor, chunk, start, placing = slots[number]
        if chunk.raw_offset >= end:
            yield from (block for block in waiting.values() if block.pieces)
            waiting = {}
        elif chunk.raw_offset + chunk.raw_bytes <= end and len(waiting) == 1:  # 20,000 small ones share a few blocks
            (block,) = waiting.values()
            if placing is None:
                begin = chunk.raw_offset - block.stored.raw_offset
                block.pieces.append(Piece(begin, chunk.raw_bytes, number, 0, start))
                continue
            _add(block, number, chunk, start, placing)
            continue
        for stored in finder.blocks(tensor, chunk):
            block = waiting.setdefault(stored.raw_offset, Block(stored))
            _add(block, number, chunk, start, placing)
            end = max(end, stored.raw_offset + stored.raw_bytes)
    yield from (block for block in waiting.values() if block.pieces)


def _add(block: Block, slot: int, chunk: IndexedChunk, start: int, placing: Placing | None) -> None:
    """The piece of the chunk that this block holds, if anybody wants it."""
    begin = max(chunk.raw_offset, block.stored.raw_offset)
    stop = min(chunk.raw_offset + chunk.raw_bytes, block.stored.raw_offset + block.stored.raw_bytes)
    inside = begin - chunk.raw_offset
    if placing is not None and not placing.touches(inside, stop - begin):
        return
    where = -1 if placing is not None else start + inside
    piece = Piece(begin - block.stored.raw_offset, stop - begin, slot, inside // BLOCK_BYTES, where)
    block.pieces.append(piece)


def _as_stored(block: Block) -> bool:
    return not block.stored.frames and block.whole


def _follows(before: Block, block: Block) -> bool:
    """Is it the next one, in the object and in the target?"""
    return (
        before.stored.stored_offset + before.stored.stored_bytes == block.stored.stored_offset
        and before.pieces[0].start + before.stored.raw_bytes == block.pieces[0].start
    )


def _merge(key: str, blocks: Iterable[Block]) -> Iterator[Request]:
    waiting: list[Block] = []
    start = end = 0
    large = False  # waits one that is read alone, unless others join its run?
    direct = False  # are all that wait one run, read straight into the target?
    for block in blocks:
        offset, stop = block.stored.stored_offset, block.stored.stored_offset + block.stored.stored_bytes
        far = offset - end > GAP_BYTES or stop - start > REQUEST_BYTES
        is_large = not block.stored.frames and block.stored.stored_bytes >= _DIRECT_BYTES
        goes_on = direct and _as_stored(block) and _follows(waiting[-1], block)
        if waiting and (far or ((is_large or large) and not goes_on)):
            yield Request(key, start, end - start, tuple(waiting))
            waiting = []
        if not waiting:
            start, large, direct = offset, False, True
            goes_on = _as_stored(block)
        waiting.append(block)
        large, direct = large or is_large, direct and goes_on
        end = stop
    if waiting:
        yield Request(key, start, end - start, tuple(waiting))
