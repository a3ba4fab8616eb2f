"""Bytes on their way back: ranged reads, decoded and verified into one map, by threads of the calling process.

The caller waits meanwhile, so threads do not compete with it for the GIL as they would beside a training loop. Memory
is the wanted tensors once, plus one request and one block for each thread.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.pages import anonymous_map
from asyncckpt.engine.ranges import Block, FetchPlan, Request, Slot, plan_fetch
from asyncckpt.format.digest import digest
from asyncckpt.format.frames import decode_block
from asyncckpt.format.index import Index
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
    threads: int | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Read, decode and verify the tensors at `paths`; nothing else is downloaded. Aliases share one view.

    `places`: memory for some of them, by the path of a tensor that is no alias; on an error it holds anything.
    `threads`: None takes what the store gains from. The first error ends the others and is raised; no thread is left behind.
    Raises `MissingShardError`, `DigestMismatchError` or `CorruptCheckpointError` with the shard's key.
    """
    names = list(dict.fromkeys(paths))
    places = places or {}
    plan = plan_fetch(index, names, places)
    memory = (into or anonymous_map)(plan.target_bytes)
    target = _Target(memory, {plan.tensors[path][0]: places[path] for path in places})
    count = min(threads or default_threads(store), len(plan.requests))
    _Fetch(store, plan, target, progress).run(count)
    tensors = {}
    for name in names:
        start, size = plan.tensors[index.aliases.get(name, name)]
        tensors[name] = target.at(start, size)
    return Fetched(tensors, plan.requested_bytes, memory)


def default_threads(store: Store) -> int:
    """Requests side by side: 32 where connections are the limit, the usable cores where the processor is."""
    return REMOTE_THREADS if store.min_part_bytes > 1 else usable_cores()


def read_shard(store: Store, key: str, offset: int, target: memoryview) -> None:
    """Fill `target` from a shard; one that is not there is a `MissingShardError`."""
    try:
        store.get_into(key, offset, target)
    except errors.ObjectNotFoundError as error:
        raise errors.MissingShardError("an object that the index names is gone", key=key) from error


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
        for slot in self._plan.slots:
            if not slot.raw_bytes:
                self._verify(slot)
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
            start = request.blocks[0].pieces[0][2]
            self._read(request, self._target.at(start, request.stored_bytes))
            for block in request.blocks:
                self._landed(block)
            return
        data = stored.take(request.stored_bytes)
        self._read(request, data)
        with self._decoding:
            for block in request.blocks:
                if self._crew.failed:
                    return
                self._decode(block, data[block.stored_offset - request.offset :], plain)
                self._landed(block)

    def _read(self, request: Request, target: memoryview) -> None:
        read_shard(self._store, request.key, request.offset, target)

    def _decode(self, block: Block, data: memoryview, plain: Scratch) -> None:
        if block.plane_bytes == 0:
            out = data
        else:
            whole = block.pieces[0][2]
            out = self._target.at(whole, block.raw_bytes) if block.whole else plain.take(block.raw_bytes)
            frames, start = [], 0
            for size in block.frames:
                frames.append(data[start : start + size])
                start += size
            decode_block(frames, block.plane_bytes, block.raw_bytes, out)
            if block.whole:
                return
        for offset, _, start, size in block.pieces:
            self._target.at(start, size)[:] = out[offset : offset + size]

    def _landed(self, block: Block) -> None:
        """Count the block's pieces; the thread that brings a chunk's last byte verifies the chunk."""
        complete = []
        with self._lock:
            for _, number, _, size in block.pieces:
                slot = self._plan.slots[number]
                slot.missing_bytes -= size
                if slot.missing_bytes == 0:
                    complete.append(slot)
        for slot in complete:
            self._verify(slot)
        with self._lock:
            self._done_bytes += sum(piece[3] for piece in block.pieces)

    def _verify(self, slot: Slot) -> None:
        if digest(self._target.at(slot.start, slot.raw_bytes)) != slot.digest:
            raise errors.DigestMismatchError(
                f"the bytes of tensor {slot.path!r} differ from their digest", key=slot.key
            )
