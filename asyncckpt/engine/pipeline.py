"""Encode a shard and put it: one encoder (the calling thread) beside a few upload threads.

Latency and slow connections hide behind each other and behind the encoder; the bytes between them are bounded.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from asyncckpt.engine.crew import start
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.format import keys
from asyncckpt.format.frames import encode_shard
from asyncckpt.format.plan import Plan, ShardPlan
from asyncckpt.store.base import Buffer, Progress, Store, Upload

IN_FLIGHT_BYTES = 256 * 2**20
"""Encoded bytes waiting for or under upload, shared by all workers of a Saver. Views of the arena take no memory and do not count."""
PART_BYTES = 16 * 2**20
"""Of one request, at most, and so what a connection carries at a time: larger ones would leave too few of them in flight."""
REMOTE_UPLOADS, LOCAL_UPLOADS = 16, 4
"""Upload threads of a worker, at most. A connection to S3 carries some 90 MB/s and each request first waits 30 ms; a folder gains nothing
from more writers than cores, but a network filesystem may."""
ALL_UPLOADS = 2 * REMOTE_UPLOADS
"""Of all workers of a Saver: on a thin uplink more connections would only take bytes from each other."""
_PART_SLACK = 9_500  # parts planned per object; S3 allows 10,000

Done = Callable[[ShardReceipt | None, BaseException | None], None]


def upload_threads(store: Store, workers: int) -> int:
    """How many requests one of so many workers has under way."""
    most = REMOTE_UPLOADS if store.min_part_bytes > 1 else LOCAL_UPLOADS
    return max(1, min(most, ALL_UPLOADS // workers))


def _even(raw_bytes: int, part_bytes: int) -> int:
    """Near `part_bytes`, so that no small rest stays: each request costs 0.8 ms of CPU, and an upload for a rest two more of them."""
    return raw_bytes // max(1, round(raw_bytes / part_bytes)) + 1


class ByteBudget:
    """Bytes that may be in flight; taking more waits."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._changed = threading.Condition()

    def take(self, count: int, *, unsent: int) -> None:
        """Wait until `count` bytes fit, or nothing is used but the taker's own `unsent` bytes, which would never come back."""
        with self._changed:
            while self._used > unsent and self._used + count > self._limit:
                self._changed.wait()
            self._used += count

    def give_back(self, count: int) -> None:
        """`count` bytes left memory."""
        with self._changed:
            self._used -= count
            self._changed.notify_all()


@dataclass(slots=True)
class _Part:
    number: int
    offset: int
    full_bytes: int
    data: list[Buffer]
    bytes: int = 0
    held_bytes: int = 0  # of memory of its own, counted in the budget


class _ShardPut:
    """The way of one shard's frames into the store: a single put, or parts once it grows past `part_bytes`."""

    def __init__(self, pipeline: "Pipeline", key: str, shard: ShardPlan, done: Done) -> None:
        self._pipeline = pipeline
        self._key = key
        self._shard = shard
        self._done = done
        self._part = self._begin_part(1, 0)
        self._upload: Upload | None = None
        self._starting = threading.Lock()
        self._lock = threading.Lock()
        self._open = 1  # the encoder itself, and every request in flight
        self._error: BaseException | None = None
        self._frames: list[tuple[int, int]] = []
        self._stored = 0
        self._encode_s = 0.0
        self._upload_s = 0.0

    def add(self, raw_bytes: int, data: Buffer) -> bool:
        """False if a request failed already: the rest is needless."""
        if self._error is not None:
            return False
        size = len(data)
        held_bytes = 0 if isinstance(data, memoryview) else size
        if held_bytes:
            self._pipeline.budget.take(held_bytes, unsent=self._part.held_bytes)
        self._frames.append((raw_bytes, size))
        self._part.data.append(data)
        self._part.bytes += size
        self._part.held_bytes += held_bytes
        self._stored += size
        if self._part.bytes >= self._part.full_bytes:
            part, self._part = self._part, self._begin_part(self._part.number + 1, self._stored)
            self._send(part, self._put_part)
        return True

    def _begin_part(self, number: int, offset: int) -> _Part:
        asked_bytes = self._pipeline.store.part_bytes(_even(self._shard.raw_bytes, self._pipeline.part_bytes))
        full_bytes = max(asked_bytes, -(-self._shard.raw_bytes // _PART_SLACK))
        return _Part(number, offset, full_bytes, self._pipeline.store.gather())

    def finish(self, encode_s: float, error: BaseException | None) -> None:
        self._encode_s = encode_s
        part = self._part
        if error is not None:
            self._fail(error)
            self._pipeline.budget.give_back(part.held_bytes)
        elif part.number == 1:
            self._send(part, self._put_whole)
        elif part.bytes:
            self._send(part, self._put_part)
        self._close_one()

    def _send(self, part: _Part, put: Callable[[_Part], None]) -> None:
        with self._lock:
            self._open += 1
        self._pipeline.run(lambda: self._run(part, put))

    def _run(self, part: _Part, put: Callable[[_Part], None]) -> None:
        started = time.perf_counter()
        try:
            if self._error is None:
                put(part)
        except BaseException as error:  # noqa: BLE001 - handed to the receipt's owner
            self._fail(error)
        finally:
            part.data.clear()
            self._pipeline.budget.give_back(part.held_bytes)
            with self._lock:
                self._upload_s += time.perf_counter() - started
            self._close_one()

    def _put_whole(self, part: _Part) -> None:
        self._pipeline.store.put(self._key, part.data)

    def _put_part(self, part: _Part) -> None:
        with self._starting:
            if self._error is not None:
                return
            if self._upload is None:
                try:
                    self._upload = self._pipeline.store.start_upload(self._key)
                except BaseException as error:
                    self._fail(error)  # before the next part looks: it must not start another
                    raise
        self._upload.write(part.number, part.offset, part.data)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error

    def _close_one(self) -> None:
        with self._lock:
            self._open -= 1
            last = self._open == 0
        if last:
            self._conclude()

    def _conclude(self) -> None:
        if self._upload is not None:
            try:
                if self._error is None:
                    self._upload.complete()
            except BaseException as error:  # noqa: BLE001 - handed to the receipt's owner
                self._fail(error)
            if self._error is not None:
                with contextlib.suppress(Exception):  # the first failure is the one to tell
                    self._upload.abort()
        if self._error is not None:
            failure, self._error = self._error, None  # its traceback leads to views of the arena, and back to us
            try:
                self._done(None, failure)
            finally:
                del failure
            return
        receipt = ShardReceipt(
            shard=self._shard.number,
            key=self._key,
            raw_bytes=self._shard.raw_bytes,
            stored_bytes=self._stored,
            frames=tuple(self._frames),
            encode_s=self._encode_s,
            upload_s=self._upload_s,
        )
        self._done(receipt, None)


class Pipeline:
    """One encoder and its uploads. Made after a fork.

    The threads are daemons of our own and start at once: an executor's refuse work at interpreter exit, where the last
    save may still be on its way.
    """

    def __init__(self, store: Store, *, workers: int = 1, progress: Progress = lambda: None) -> None:
        share = IN_FLIGHT_BYTES // workers
        self.store = store
        self.part_bytes = min(share // 4, PART_BYTES)
        self.budget = ByteBudget(share)
        self._progress = progress
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, name=f"asyncckpt-upload-{number}", daemon=True)
            for number in range(upload_threads(store, workers))
        ]
        self._threads = threads[: start(threads)]  # at the limit of threads: slower, not stuck

    def put_shard(self, job: SaveJob, plan: Plan, shard: ShardPlan, arena: memoryview, done: Done) -> None:
        """Encode now; `done(receipt, error)` is called once, from an upload thread, when the object exists or will not."""
        put = _ShardPut(self, keys.folder(job.step, job.attempt) + shard.name, shard, done)
        digests = arena[plan.digests_offset :]
        encode_s = 0.0
        failure: BaseException | None = None
        try:
            frames = encode_shard(shard, arena, plan.codec, digests)
            started = time.perf_counter()
            for frame in frames:
                encode_s += time.perf_counter() - started
                self._progress()
                if not put.add(frame.raw_bytes, frame.data):
                    break
                started = time.perf_counter()
            encode_s += time.perf_counter() - started
        except BaseException as error:  # noqa: BLE001 - handed to the receipt's owner
            failure = error
        try:
            put.finish(encode_s, failure)
        finally:
            del failure  # its traceback leads to views of the arena, and here

    def run(self, work: Callable[[], None]) -> None:
        """Do something beside the encoder (a put, a check, a commit, retention); it must not raise."""
        if self._threads:
            self._work.put(work)
        else:
            work()

    def close(self) -> None:
        """Wait for what was given, and end the threads."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work
