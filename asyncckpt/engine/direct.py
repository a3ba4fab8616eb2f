"""Tensors read straight to where they belong, without a copy of the state in between.

For objects that are stored as they are (codec `none`) and cheap to read twice: once to verify them, before the first value
changes, and once more into place, where they are verified again as they land. So no second state stands in memory.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.checkpoints.rereading import Wrong, certain, mismatch, read_into, refused
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.fetch import Progress, Scratch
from asyncckpt.engine.ranges import slots_of, whole_of
from asyncckpt.format.digest import Hasher
from asyncckpt.format.index import Index
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.store.base import Store

MIN_BYTES = 2**20
"""Smaller tensors are cheaper to read side by side, in few requests."""
_READ_BYTES = 2**20  # then digested while it is in the cache


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one digest covers: one run of its tensor, and of its object."""

    path: str
    key: str
    offset: int
    raw_bytes: int
    digest: bytes
    start: int  # in the tensor


def direct_paths(store: Store, index: Index, paths: Iterable[str]) -> list[str]:
    """Which of these tensors `verify` and `fill` can serve: those whose chunks are runs of them."""
    if not store.rereads:
        return []
    return [path for path in paths if path in index.tensors and _is_direct(index, path)]


def _is_direct(index: Index, path: str) -> bool:
    tensor = index.tensors[path]
    if tensor.raw_bytes < MIN_BYTES or any(len(index.shards[chunk.shard].frames) for chunk in tensor.chunks):
        return False
    return all(slot.placing is None for slot in slots_of(tensor, whole_of(tensor)))


def verify(store: Store, index: Index, paths: Iterable[str], *, progress: Progress | None = None) -> None:
    """Read every byte of these tensors and hold it against its digest; keep nothing."""
    _Reading(store, index, paths, None, progress).run()


def fill(store: Store, index: Index, places: Mapping[str, memoryview], *, progress: Progress | None = None) -> None:
    """Read tensors into their places, and verify each again where it lies then.

    `CorruptCheckpointError` if an object has changed since `verify`; the places then hold some of it.
    """
    _Reading(store, index, places, places, progress).run()


class _Reading:
    """One pass over some tensors, on as many threads as there are cores."""

    def __init__(
        self,
        store: Store,
        index: Index,
        paths: Iterable[str],
        places: Mapping[str, memoryview] | None,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._places = places
        self._progress = progress
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._pieces = [piece for path in paths for piece in _pieces(index, path)]
        self._total_bytes = sum(piece.raw_bytes for piece in self._pieces)
        self._crew = Crew(self._pieces, self._worker)

    def run(self) -> None:
        self._crew.run(min(usable_cores(), len(self._pieces)), self._report)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def _worker(self) -> Callable[[_Piece], None]:
        scratch = Scratch().take(_READ_BYTES)

        def serve(piece: _Piece) -> None:
            try:
                self._serve(piece, scratch)
            except errors.CheckpointError as error:
                error.at(key=piece.key)
                raise

        return serve

    def _serve(self, piece: _Piece, scratch: memoryview) -> None:
        def look(store: Store) -> Wrong | None:
            return self._look(store, piece, scratch)

        certain(self._store, piece.key, look, stopped=self._is_stopped)
        with self._lock:
            self._done_bytes += piece.raw_bytes

    def _look(self, store: Store, piece: _Piece, scratch: memoryview) -> Wrong | None:
        """One reading; what is wrong with it."""
        hasher = Hasher()
        place = None if self._places is None else self._places[piece.path][piece.start : piece.start + piece.raw_bytes]
        for done in range(0, piece.raw_bytes, _READ_BYTES):
            if self._crew.failed:
                return None
            size = min(_READ_BYTES, piece.raw_bytes - done)
            target = scratch[:size] if place is None else place[done : done + size]
            if wrong := read_into(store, piece.key, piece.offset + done, target):
                return wrong
            hasher.update(target)
        found = hasher.digest()
        if found == piece.digest:
            return None
        what = f"the bytes of tensor {piece.path!r}"
        error = mismatch(
            what if place is None else f"{what}, which changed while they were restored,", found, piece.digest.hex()
        )
        return refused(error, piece.offset, piece.raw_bytes, found)

    def _is_stopped(self) -> bool:
        return self._crew.failed


def _pieces(index: Index, path: str) -> Iterator[_Piece]:
    tensor = index.tensors[path]
    for _, chunk, start, _ in slots_of(tensor, whole_of(tensor)):
        key = index.shards[chunk.shard].key
        for number, done in enumerate(range(0, chunk.raw_bytes, BLOCK_BYTES)):
            size = min(BLOCK_BYTES, chunk.raw_bytes - done)
            yield _Piece(path, key, chunk.raw_offset + done, size, chunk.digest(number), start + done)
