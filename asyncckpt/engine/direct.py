"""Tensors read straight to where they belong, without a copy of the state in between.

For objects that are stored as they are (codec `none`) and cheap to read twice: once to verify them, before the first value
changes, and once more into place, where they are verified again as they land. So no second state stands in memory.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.fetch import Progress, Scratch, read_shard
from asyncckpt.engine.ranges import check_runs
from asyncckpt.format.digest import Hasher
from asyncckpt.format.index import Index
from asyncckpt.store.base import Store

MIN_BYTES = 2**20
"""Smaller tensors are cheaper to read side by side, in few requests."""
_PIECE_BYTES = 2**20  # read, then digested while it is in the cache


@dataclass(frozen=True, slots=True)
class _Run:
    """A chunk: one run of its tensor, and of its object."""

    path: str
    key: str
    offset: int
    raw_bytes: int
    digest: bytes
    start: int  # in the tensor


def direct_paths(store: Store, index: Index, paths: Iterable[str]) -> list[str]:
    """Which of these tensors `verify` and `fill` can serve."""
    if not store.rereads:
        return []
    return [
        path
        for path in paths
        if path in index.tensors
        and index.tensors[path].raw_bytes >= MIN_BYTES
        and not any(index.shards[chunk.shard].frames for chunk in index.tensors[path].chunks)
    ]


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
        self._runs = [run for path in paths for run in _runs(index, path)]
        self._total_bytes = sum(run.raw_bytes for run in self._runs)
        self._crew = Crew(sorted(self._runs, key=lambda run: -run.raw_bytes), self._worker)  # no large one last

    def run(self) -> None:
        self._crew.run(min(usable_cores(), len(self._runs)), self._report)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def _worker(self) -> Callable[[_Run], None]:
        scratch = Scratch().take(_PIECE_BYTES)

        def serve(run: _Run) -> None:
            try:
                self._serve(run, scratch)
            except errors.CheckpointError as error:
                error.at(key=run.key)
                raise

        return serve

    def _serve(self, run: _Run, scratch: memoryview) -> None:
        hasher = Hasher()
        place = None if self._places is None else self._places[run.path][run.start : run.start + run.raw_bytes]
        for done in range(0, run.raw_bytes, _PIECE_BYTES):
            if self._crew.failed:
                return
            size = min(_PIECE_BYTES, run.raw_bytes - done)
            piece = scratch[:size] if place is None else place[done : done + size]
            read_shard(self._store, run.key, run.offset + done, piece)
            hasher.update(piece)
            with self._lock:
                self._done_bytes += size
        if hasher.digest() != run.digest:
            if place is None:
                raise errors.DigestMismatchError(f"the bytes of tensor {run.path!r} differ from their digest")
            raise errors.DigestMismatchError(f"the bytes of tensor {run.path!r} changed while they were restored")


def _runs(index: Index, path: str) -> list[_Run]:
    tensor = index.tensors[path]
    runs, start = [], 0
    for chunk in check_runs(tensor):
        key = index.shards[chunk.shard].key
        runs.append(_Run(path, key, chunk.raw_offset, chunk.raw_bytes, chunk.digest, start))
        start += chunk.raw_bytes
    return runs
