"""Do tasks: in a forked worker process, or on the threads of the in-process engine. One runner, two hosts."""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from asyncckpt import errors
from asyncckpt.checkpoints import removal
from asyncckpt.checkpoints.admission import admit
from asyncckpt.checkpoints.leftovers import collect
from asyncckpt.engine import commit, upkeep
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import IN_FLIGHT_BYTES, Pipeline
from asyncckpt.engine.retention import Retention
from asyncckpt.engine.title import Title, run_name
from asyncckpt.engine.wire import Channel, read_memory_file
from asyncckpt.events import StoreRetried
from asyncckpt.format import keys
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import Plan, Structure, plan
from asyncckpt.options import KeepRule, S3Options
from asyncckpt.store.base import Progress, Store
from asyncckpt.store.opening import open_store

BEAT_S = 1.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MALLOC_BYTES = 32 * 2**20  # the most that glibc allows
_COLLECT_S = 120.0  # of one collection: about a million objects on S3
_SWITCH_INTERVAL_S = 0.0005  # upload threads hand the GIL back to the encoder ten times sooner than by default

_MOST_DESCRIPTORS = 2**20

Reply = Callable[[int, str, dict[str, Any]], None]


class TaskRunner:
    """Runs tasks against one store. `reply(task, "done"|"failed"|"encoded", data)` is called from any thread."""

    def __init__(
        self,
        store: Store,
        rules: Sequence[KeepRule],
        pipeline: Pipeline,
        reply: Reply,
        progress: Progress = lambda: None,
        *,
        collect_s: float = _COLLECT_S,
    ) -> None:
        self._store = store
        self._progress = progress
        self._collect_s = collect_s
        self._retention = Retention(store, rules)
        self._pipeline = pipeline
        self._reply = reply
        self._structures: dict[int, Structure] = {}
        self._plans: dict[tuple[int, str, int | None], IndexBuilder] = {}
        self._planning = threading.Lock()

    def add_structure(self, number: int, structure: Structure) -> None:
        """Jobs may name this structure from now on."""
        self._structures[number] = structure

    def forget_structure(self, number: int) -> None:
        """No job names it any more."""
        self._structures.pop(number, None)
        for key in [key for key in self._plans if key[0] == number]:
            del self._plans[key]

    def plan(self, job: SaveJob) -> Plan:
        """The job's plan; computed once per structure, the same in every process."""
        return self._planned(job).plan

    def _planned(self, job: SaveJob) -> IndexBuilder:
        key = (job.structure, job.codec, job.shard_bytes)
        with self._planning:
            if key not in self._plans:
                made = plan(self._structures[job.structure], codec=job.codec, shard_bytes=job.shard_bytes)
                self._plans[key] = IndexBuilder(made)
            return self._plans[key]

    def shard(self, task: int, job: SaveJob, number: int, arena: memoryview) -> None:
        """Encode now, upload beside; replies `encoded`, later `done` or `failed`."""

        def done(receipt: ShardReceipt | None, error: BaseException | None) -> None:
            if receipt is not None:
                self._reply(task, "done", receipt.to_json())
            elif error is not None:
                self._fail(task, job, error)

        try:
            layout = self.plan(job)
            self._pipeline.put_shard(job, layout, layout.shards[number], arena, done)
        except Exception as error:  # noqa: BLE001 - every failure is the task's answer
            self._fail(task, job, error)
        self._reply(task, "encoded", {})

    def commit(
        self,
        task: int,
        job: SaveJob,
        receipts: Sequence[ShardReceipt],
        arena: memoryview,
        state: bytes,
        *,
        again: bool = False,
    ) -> None:
        """Write state, index and record. `again`: a worker died over it."""

        def work() -> dict[str, Any]:
            builder = self._planned(job)
            layout = builder.plan
            digests = bytes(arena[layout.digests_offset : layout.digests_offset + DIGEST_BYTES * layout.piece_count])
            outcome = commit.commit(
                self._store, job, builder, receipts=receipts, digests=digests, state=state, again=again
            )
            return outcome.to_json()

        self._beside(task, job, work)

    def check(self, task: int, job: SaveJob) -> None:
        """Is the step taken, or the folder another run's?"""

        def work() -> dict[str, Any]:
            taken = commit.exists(self._store, job)
            if job.newcomer:
                admit(self._store, job.step, restored=job.restored, run_id=job.attempt.partition("-")[0])
            if taken and job.on_exists == "raise":
                raise errors.CheckpointConflictError(
                    "the step exists already, written by another attempt", step=job.step, attempt=job.attempt
                )
            return {"exists": taken}

        self._beside(task, job, work)

    def abandon(self, task: int, job: SaveJob) -> None:
        """Remove what the attempt stored."""

        def work() -> dict[str, Any]:
            removal.abandon(self._store, job.step, job.attempt)
            removal.end_uploads(self._store, _folders(job))
            return {}

        self._beside(task, job, work)

    def retain(self, task: int, job: SaveJob) -> None:
        """Apply the rules of retention."""

        def work() -> dict[str, Any]:
            return self._retention.retain(committed=job.step, lineage=job.lineage).to_json()

        self._beside(task, job, work)

    def collect(self, task: int, job: SaveJob) -> None:
        """Remove what dead writers left, and end what workers of this very save left open, which is committed by now."""
        end_s = time.monotonic() + self._collect_s

        def go_on() -> bool:
            self._progress()
            return time.monotonic() < end_s

        def work() -> dict[str, Any]:
            done = collect(self._store, ended=_folders(job), go_on=go_on)
            if time.monotonic() >= end_s:
                late = errors.DeadlineExceededError(
                    f"leftovers were looked for {self._collect_s:.0f} s, and not everywhere; Run(url).collect_garbage() takes the time it needs"
                )
                done = replace(done, failures=(*done.failures, late))
            return upkeep.told_of(done)

        self._beside(task, job, work)

    def _beside(self, task: int, job: SaveJob, work: Callable[[], dict[str, Any]]) -> None:
        def run() -> None:
            try:
                self._reply(task, "done", work())
            except Exception as error:  # noqa: BLE001 - every failure is the task's answer
                self._fail(task, job, error)

        self._pipeline.run(run)

    def _fail(self, task: int, job: SaveJob, error: BaseException) -> None:
        if isinstance(error, errors.CheckpointError):
            error.at(step=job.step, attempt=job.attempt)
        self._reply(task, "failed", errors.to_json(error))


def _folders(job: SaveJob) -> list[str]:
    """Of all attempts of the save."""
    return [keys.folder(job.step, attempt) for attempt in (job.attempt, *job.earlier_attempts)]


class _Worker:
    """A forked worker: messages in, tasks done, replies out."""

    def __init__(self, channel: Channel, hello: dict[str, Any], rules: Sequence[KeepRule]) -> None:
        self._channel = channel
        self._beat_at = 0.0
        options = S3Options.from_json(hello["s3"]) if hello["s3"] else None
        store = open_store(hello["url"], options, progress=self.beat, on_retry=self._retried)
        pipeline = Pipeline(store, workers=hello["workers"], progress=self.beat)
        self._runner = TaskRunner(store, rules, pipeline, self._answer, self.beat)
        self._arenas: dict[int, mmap.mmap] = {}

    def serve(self) -> None:
        while (messages := self._channel.receive()) is not None:
            for message, fds in messages:
                try:
                    getattr(self, "_on_" + message["op"])(message, fds)
                finally:
                    for fd in fds:
                        os.close(fd)

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at > BEAT_S:
            self._beat_at = now
            self._channel.send({"op": "beat"})

    def _on_structure(self, message: dict[str, Any], fds: list[int]) -> None:
        self._runner.add_structure(message["structure"], Structure.from_json(json.loads(read_memory_file(fds[0]))))

    def _on_forget_structure(self, message: dict[str, Any], _: list[int]) -> None:
        self._runner.forget_structure(message["structure"])

    def _on_arena(self, message: dict[str, Any], fds: list[int]) -> None:
        self._arenas[message["arena"]] = mmap.mmap(fds[0], message["bytes"])

    def _on_rest(self, _: dict[str, Any], __: list[int]) -> None:
        _give_back_freed_memory()

    def _on_forget_arena(self, message: dict[str, Any], _: list[int]) -> None:
        memory = self._arenas.pop(message["arena"], None)
        if memory is not None:
            with contextlib.suppress(BufferError):  # a view still lives: the map goes with it
                memory.close()

    def _on_task(self, message: dict[str, Any], fds: list[int]) -> None:
        task, job = message["task"], SaveJob.from_json(message["job"])
        if message["kind"] == "shard":
            self._runner.shard(task, job, message["shard"], memoryview(self._arenas[job.arena]))
        elif message["kind"] == "commit":
            receipts = [ShardReceipt.from_json(row) for row in message["receipts"]]
            arena, state = memoryview(self._arenas[job.arena]), read_memory_file(fds[0])
            self._runner.commit(task, job, receipts, arena, state, again=message["again"])
        else:
            getattr(self._runner, message["kind"])(task, job)

    def _answer(self, task: int, kind: str, data: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service died, and we die with it
            self._channel.send({"op": kind, "task": task, "data": data})

    def _retried(self, event: StoreRetried) -> None:
        data = {name: getattr(event, name) for name in StoreRetried.__slots__}
        self._answer(-1, "retried", data)


def run_worker(sock: socket.socket, hello: dict[str, Any], rules: Sequence[KeepRule], service_pid: int) -> None:
    """The life of a forked worker; never returns to the service's code."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != service_pid:
        os._exit(1)
    close_all_but(sock.fileno())
    Title().show(f"asyncckpt: {run_name(hello['url'])}, worker")
    sock.setblocking(True)
    channel = Channel(sock)
    try:
        os.nice(hello["nice"])
    except OSError as error:
        channel.send(
            {"op": "refused", "reason": f"setpriority: {error.strerror}: workers do not yield to the training"}
        )
    _keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _Worker(channel, hello, rules).serve()


def _keep_freed_memory() -> None:
    """Within a save malloc reuses the frames' memory: given back, each page would be zeroed and mapped again at the next frame.

    60,000 page faults a GB less; what is kept is bounded by the bytes in flight.
    """
    if hasattr(_libc, "mallopt"):  # glibc
        _libc.mallopt(_M_MMAP_THRESHOLD, _MALLOC_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, IN_FLIGHT_BYTES)


def _give_back_freed_memory() -> None:
    """Between saves nothing is kept: memory stays flat, whatever the largest save had in flight."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def close_all_but(keep: int) -> None:
    """Close every descriptor above stderr but one: an inherited socket would keep its other end from seeing our siblings' end."""
    try:
        numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:  # no /proc
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        os.closerange(3, keep)
        os.closerange(keep + 1, most if 0 <= most < _MOST_DESCRIPTORS else _MOST_DESCRIPTORS)
        return
    for fd in numbers:
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):
                os.close(fd)
