"""Bytes on their way back: ranged reads, decoded and verified into one map, by threads of the calling process.

The caller waits meanwhile, so threads do not compete with it for the GIL as they would beside a training loop. Memory
is the wanted tensors once, plus one request and one block for each thread.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.checkpoints.rereading import Wrong, certain, mismatch, missing, read_into, reread_range, wrong_size
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.pages import anonymous_map
from asyncckpt.engine.ranges import Block, FetchPlan, Piece, Request, plan_fetch
from asyncckpt.format.box import Box
from asyncckpt.format.digest import digest
from asyncckpt.format.frames import decode_block
from asyncckpt.format.index import Index
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.format.stored import IndexedShard
from asyncckpt.store.base import Store

REMOTE_THREADS = 32
"""Connections side by side: one brings 90 MB/s from S3, and each request first waits some 30 ms."""

Progress = Callable[[int, int], None]
"""Called on the calling thread, about ten times a second, with plain bytes done and in total."""
Provider = Callable[[int], memoryview]
"""Makes the target: writable memory of at least so many bytes."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """`tensors`: path to its plain bytes, verified; views of `memory`, but for given places. `requested_bytes`: read from the store."""

    tensors: Mapping[str, memoryview]
    requested_bytes: int
    memory: memoryview


def fetch(
    store: Store,
    index: Index,
    paths: Iterable[str],
    *,
    into: Provider | None = None,
    places: Mapping[str, memoryview] | None = None,
    boxes: Mapping[str, Box] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Read, decode and verify the tensors at `paths`; nothing else is downloaded. Aliases share one view.

    `places`: memory for some of them, by the path of a tensor that is no alias; on an error it holds anything.
    `boxes`: what alone is wanted of some of them, as offsets and sizes; the view then holds that box in row-major order.
    Every piece that a digest covers is verified before the tensor is returned, also where only some of it is wanted.
    `threads`: None takes what the store gains from. The first error ends the others and is raised; no thread is left behind.
    What cannot be right is read again until it is certain (see `rereading`). Then raises `MissingShardError`, `DigestMismatchError` or
    `CorruptCheckpointError` with the shard's key; or a `StoreError` where it changes from reading to reading.
    """
    names = list(dict.fromkeys(paths))
    places = places or {}
    plan = plan_fetch(index, names, places, boxes)
    with claimed(store, index, names):
        memory = (into or anonymous_map)(plan.target_bytes)
    target = _Target(memory, {plan.tensors[path][0]: places[path] for path in places})
    count = min(threads or default_threads(store), len(plan.requests))
    _Fetch(store, plan, target, progress).run(count)
    tensors = {}
    for name in names:
        start, size = plan.tensors[index.aliases.get(name, name)]
        tensors[name] = target.at(start, size)
    return Fetched(tensors, plan.requested_bytes, memory)


@contextmanager
def claimed(store: Store, index: Index, paths: Iterable[str]) -> Iterator[None]:
    """Memory for these tensors is taken inside, on nothing but the word of the index. None of it is touched before bytes arrive.

    If this machine refuses it, the objects are asked for their sizes: `CorruptCheckpointError` if one is shorter than the index says,
    `CheckpointError` if only memory is short.
    """
    try:
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError) as error:
        tensors = [index.tensors[path] for path in dict.fromkeys(index.aliases.get(path, path) for path in paths)]
        for number in sorted({chunk.shard for tensor in tensors for chunk in tensor.chunks}):
            check_size(store, index.shards[number])
        size_bytes = sum(tensor.raw_bytes for tensor in tensors)
        raise errors.CheckpointError(
            f"this machine refuses memory for {size_bytes} bytes of tensors: read a part of the checkpoint, or use a larger machine"
        ) from error


def check_size(store: Store, shard: IndexedShard) -> None:
    """`CorruptCheckpointError` unless the object has the size that the index states."""

    def look(place: Store) -> Wrong | None:
        entry = place.head(shard.key)
        if entry is None:
            return missing(shard.key)
        if entry.stored_bytes == shard.stored_bytes:
            return None
        text = f"the object has {entry.stored_bytes} bytes, the index states {shard.stored_bytes}"
        return wrong_size(errors.CorruptCheckpointError(text), shard.stored_bytes.__eq__)

    certain(store, shard.key, look)


def default_threads(store: Store) -> int:
    """Requests side by side: 32 where connections are the limit, the usable cores where the processor is."""
    return REMOTE_THREADS if store.min_part_bytes > 1 else usable_cores()


class Scratch:
    """Reused memory of one thread.

    A map, not malloc's: freed megabytes stay in the arena of a thread that is gone, and no restore need meet that arena again.
    """

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, size_bytes: int) -> memoryview:
        """So many bytes, writable; what was in them stays, or not."""
        if len(self._memory) < size_bytes:
            self._memory = anonymous_map(size_bytes)
        return self._memory[:size_bytes]


class _Target:
    """What a plan lays out: one map, and behind it some tensors that have places of their own. `places`: by their first offset."""

    def __init__(self, whole: memoryview, places: Mapping[int, memoryview]) -> None:
        self._whole = whole
        self._starts = sorted(places)
        self._places = [places[start] for start in self._starts]

    def at(self, start: int, size_bytes: int) -> memoryview:
        """So many bytes; they never reach from one place into another."""
        before = bisect_right(self._starts, start)
        place, begin = (self._places[before - 1], self._starts[before - 1]) if before else (self._whole, 0)
        return place[start - begin : start - begin + size_bytes]


class _Fetch:
    """One fetch under way: threads take requests in order until none is left or one failed."""

    def __init__(self, store: Store, plan: FetchPlan, target: _Target, progress: Progress | None) -> None:
        self._store = store
        self._plan = plan
        self._target = target
        self._progress = progress
        self._lock = threading.Lock()
        # more decoders than cores would only take the GIL and the caches from each other
        self._decoding = threading.BoundedSemaphore(usable_cores())
        self._crew = Crew(plan.requests, self._worker)
        self._done_bytes = 0
        self._wanted_bytes = plan.wanted_bytes

    def run(self, count: int) -> None:
        self._crew.run(count, self._report)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes, self._wanted_bytes)

    def _worker(self) -> Callable[[Request], None]:
        stored, plain = Scratch(), Scratch()

        def serve(request: Request) -> None:
            try:
                self._serve(request, stored, plain)
            except errors.CheckpointError as error:
                error.at(key=request.key)
                raise

        return serve

    def _serve(self, request: Request, stored: Scratch, plain: Scratch) -> None:
        if request.direct:
            data = self._target.at(request.blocks[0].pieces[0].start, request.stored_bytes)
            self._read(request, data)
        else:
            data = stored.take(request.stored_bytes)
            self._read(request, data)
        blocks = iter(request.blocks)
        while wrong := self._land(request, blocks, data, plain):
            block, error = wrong
            self._land_again(request, block, _stored(request, block, data), plain, error)

    def _read(self, request: Request, target: memoryview) -> None:
        def look(store: Store) -> Wrong | None:
            return read_into(store, request.key, request.offset, target)

        certain(self._store, request.key, look, stopped=self._is_stopped)

    def _land(
        self, request: Request, blocks: Iterator[Block], data: memoryview, plain: Scratch
    ) -> tuple[Block, errors.CheckpointError] | None:
        """Bring the next blocks of what was read where they belong, up to one that cannot be right: that one, and why.

        Those behind it wait until it is certain: a small object may claim to hold terabytes, and each block that is decoded takes memory.
        """
        with nullcontext() if request.direct else self._decoding:
            for block in blocks:
                if self._crew.failed:
                    break
                try:
                    self._take(request, block, self._decode(block, _stored(request, block, data), plain))
                except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
                    return block, error
        return None

    def _land_again(
        self, request: Request, block: Block, data: memoryview, plain: Scratch, error: errors.CheckpointError
    ) -> None:
        """Read one block again until it is certain. Nobody else's decoding waits for that."""

        def land(stored: memoryview) -> None:
            with self._decoding:
                self._take(request, block, self._decode(block, stored, plain))

        offset = block.stored.stored_offset
        reread_range(self._store, request.key, offset, data, land, error=error, stopped=self._is_stopped)

    def _is_stopped(self) -> bool:
        return self._crew.failed

    def _decode(self, block: Block, data: memoryview, plain: Scratch) -> memoryview:
        """The plain bytes of a block: where they belong already, or in scratch memory."""
        stored = block.stored
        if not stored.frames:
            return data
        out = self._target.at(block.pieces[0].start, stored.raw_bytes) if block.whole else plain.take(stored.raw_bytes)
        decode_block(stored.split(data), stored.plane_bytes, stored.raw_bytes, out)
        return out

    def _take(self, request: Request, block: Block, plain: memoryview) -> None:
        """Verify each piece of a block, then put it where it belongs, unless it is there."""
        for piece in block.pieces:
            data = plain[piece.offset : piece.offset + piece.raw_bytes]
            self._verify(request, piece, data)
            placing = self._plan.slots[piece.slot].placing
            if placing is not None:
                placing.put(piece.number * BLOCK_BYTES, data, self._target.at(placing.start, placing.window_bytes))
            elif not (block.whole and (block.stored.frames or request.direct)):
                self._target.at(piece.start, piece.raw_bytes)[:] = data
        with self._lock:
            self._done_bytes += sum(piece.raw_bytes for piece in block.pieces)

    def _verify(self, request: Request, piece: Piece, data: memoryview) -> None:
        """Hold one piece, just read by this request, against its digest."""
        tensor, chunk = self._plan.slots[piece.slot][:2]
        found, stated = digest(data), chunk.digest(piece.number)
        if found != stated:
            raise mismatch(f"the bytes of tensor {tensor.path!r}", found, stated.hex()).at(key=request.key)


def _stored(request: Request, block: Block, data: memoryview) -> memoryview:
    """A block's stored bytes in what a request read."""
    start = block.stored.stored_offset - request.offset
    return data[start : start + block.stored.stored_bytes]
