"""Do tasks: in a forked worker process, or on the threads of the in-process engine. One runner, two hosts."""

import contextlib
import ctypes
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncckpt import errors
from asyncckpt.checkpoints import removal
from asyncckpt.checkpoints.admission import admit
from asyncckpt.engine import commit
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import IN_FLIGHT_BYTES, Pipeline
from asyncckpt.engine.retention import Retention
from asyncckpt.engine.wire import Channel, read_memory_file
from asyncckpt.events import StoreAway, StoreBack, StoreRetried
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import Plan, Structure, plan
from asyncckpt.options import KeepRule, S3Options
from asyncckpt.store.away import is_met, meet
from asyncckpt.store.base import Store
from asyncckpt.store.errand import Errand, within
from asyncckpt.store.opening import address_of, open_store

BEAT_S = 1.0
_ACKNOWLEDGED_S = 0.25  # a save of many small shards need not tell of each
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MALLOC_BYTES = 32 * 2**20  # the most that glibc allows
_REMOVAL_S = 60.0  # for what a failed save stored; what stays is found by its missing record
_SWITCH_INTERVAL_S = 0.0005  # upload threads hand the GIL back to the encoder ten times sooner than by default

Reply = Callable[[int, str, dict[str, Any]], None]


class TaskRunner:
    """Runs tasks against one store. `reply(task, "done"|"failed"|"encoded", data)` is called from any thread.

    `errand_of`: what the requests of a save belong to, so that they are given up together.
    """

    def __init__(
        self,
        store: Store,
        rules: Sequence[KeepRule],
        pipeline: Pipeline,
        reply: Reply,
        errand_of: Callable[[SaveJob], Errand] = lambda _: Errand(),
    ) -> None:
        self._store = store
        self._errand_of = errand_of
        self._errands: dict[int, tuple[Errand, int]] = {}  # by save, with how many tasks it has here
        self._counting = threading.Lock()
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

    def give_up(self, number: int) -> None:
        """This save has failed: its requests are not tried again, and none is begun."""
        errand, _ = self._errands.get(number, (None, 0))
        if errand is not None:
            errand.give_up()

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
        errand = self._begin(job)

        def done(receipt: ShardReceipt | None, error: BaseException | None) -> None:
            self._end(job)
            if receipt is not None:
                self._reply(task, "done", receipt.to_json())
            elif error is not None:
                self._fail(task, job, error)

        try:
            layout = self.plan(job)
            shard = layout.shards[number]
        except Exception as error:  # noqa: BLE001 - every failure is the task's answer
            done(None, error)
        else:
            store = self._store.on(errand)
            self._pipeline.put_shard(job, layout, shard, arena, done, store=store, stopped=lambda: errand.given_up)
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

        def work(errand: Errand) -> dict[str, Any]:
            builder = self._planned(job)
            layout = builder.plan
            digests = bytes(arena[layout.digests_offset : layout.digests_offset + DIGEST_BYTES * layout.piece_count])
            outcome = commit.commit(
                self._store.on(errand),
                job,
                builder,
                receipts=receipts,
                digests=digests,
                state=state,
                again=again,
                sleep=errand.sleep,
            )
            return outcome.to_json()

        self._beside(task, job, work)

    def check(self, task: int, job: SaveJob) -> None:
        """Is the step taken, or the folder another run's?"""

        def work(errand: Errand) -> dict[str, Any]:
            store = self._store.on(errand)
            taken = commit.exists(store, job)
            if job.newcomer:
                admit(store, job.step, restored=job.restored, run_id=job.attempt.partition("-")[0])
            if taken and job.on_exists == "raise":
                raise errors.CheckpointConflictError(
                    "the step exists already, written by another attempt", step=job.step, attempt=job.attempt
                )
            return {"exists": taken}

        self._beside(task, job, work)

    def abandon(self, task: int, job: SaveJob) -> None:
        """Remove what the attempt stored, within a minute."""

        def work(_: Errand) -> dict[str, Any]:
            removal.abandon(self._store.on(within(_REMOVAL_S)), job.step, job.attempt)
            return {}

        self._beside(task, job, work)

    def retain(self, task: int, job: SaveJob) -> None:
        """Apply the rules of retention."""

        def work(_: Errand) -> dict[str, Any]:
            return self._retention.retain(committed=job.step, lineage=job.lineage).to_json()

        self._beside(task, job, work)

    def _beside(self, task: int, job: SaveJob, work: Callable[[Errand], dict[str, Any]]) -> None:
        errand = self._begin(job)

        def run() -> None:
            try:
                self._reply(task, "done", work(errand))
            except Exception as error:  # noqa: BLE001 - every failure is the task's answer
                self._fail(task, job, error)
            finally:
                self._end(job)

        self._pipeline.run(run)

    def _begin(self, job: SaveJob) -> Errand:
        """A task of this save begins here; `_end` must follow."""
        with self._counting:
            errand, tasks = self._errands.get(job.number, (None, 0))
            if errand is None:
                errand = self._errand_of(job)
            self._errands[job.number] = (errand, tasks + 1)
            return errand

    def _end(self, job: SaveJob) -> None:
        with self._counting:
            errand, tasks = self._errands.pop(job.number)
            if tasks > 1:
                self._errands[job.number] = (errand, tasks - 1)

    def _fail(self, task: int, job: SaveJob, error: BaseException) -> None:
        if isinstance(error, errors.CheckpointError):
            error.at(step=job.step, attempt=job.attempt)
        self._reply(task, "failed", errors.to_json(error))


class _Worker:
    """A forked worker: messages in, tasks done, replies out."""

    def __init__(self, channel: Channel, hello: dict[str, Any], rules: Sequence[KeepRule]) -> None:
        self._channel = channel
        self._beat_at = 0.0
        options = S3Options.from_json(hello["s3"]) if hello["s3"] else None
        self._address = address_of(hello["url"], options)
        if hello["met"]:
            meet(self._address)
        store = open_store(
            hello["url"],
            options,
            progress=self.beat,
            on_retry=self._retried,
            on_away=self._away,
            on_meet=lambda: self._tell("met"),
            away_s=hello["away_s"],
        )
        pipeline = Pipeline(store, workers=hello["workers"], progress=self.beat)
        self._runner = TaskRunner(store, rules, pipeline, self._answer, self._errand)
        self._arenas: dict[int, mmap.mmap] = {}
        self._shards: queue.SimpleQueue[Callable[[], None] | BaseException | None] = queue.SimpleQueue()

    def serve(self) -> None:
        """Encode shards; a thread hears the messages, since one of them may end a save whose encoder waits for its uploads."""
        threading.Thread(target=self._hear, name="asyncckpt-ear", daemon=True).start()
        while (work := self._shards.get()) is not None:
            if isinstance(work, BaseException):
                raise work
            work()
            del work  # it leads to a view of the arena

    def _hear(self) -> None:
        try:
            while (messages := self._channel.receive()) is not None:
                for message, fds in messages:
                    try:
                        getattr(self, "_on_" + message["op"])(message, fds)
                    finally:
                        for fd in fds:
                            os.close(fd)
        except BaseException as error:  # noqa: BLE001 - raised on the main thread, which ends the process
            self._shards.put(error)
        else:
            self._shards.put(None)

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

    def _on_give_up(self, message: dict[str, Any], _: list[int]) -> None:
        self._runner.give_up(message["job"])

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
            arena = memoryview(self._arenas[job.arena])
            self._shards.put(lambda: self._runner.shard(task, job, message["shard"], arena))
        elif message["kind"] == "commit":
            receipts = [ShardReceipt.from_json(row) for row in message["receipts"]]
            arena, state = memoryview(self._arenas[job.arena]), read_memory_file(fds[0])
            self._runner.commit(task, job, receipts, arena, state, again=message["again"])
        else:
            getattr(self._runner, message["kind"])(task, job)

    def _answer(self, task: int, kind: str, data: dict[str, Any]) -> None:
        self._tell(kind, task=task, data=data)

    def _retried(self, event: StoreRetried, number: int | None = None) -> None:
        data = {name: getattr(event, name) for name in StoreRetried.__slots__}
        self._tell("retried", job=number, data=data)

    def _away(self, event: StoreAway | StoreBack) -> None:
        if isinstance(event, StoreAway):
            left_s = None if is_met(self._address) else event.left_s  # behind the first contact the saves have clocks
            self._tell("away", since_s=event.since_s, error=event.error, left_s=left_s)
        else:
            self._tell("back", after_s=event.after_s)

    def _tell(self, kind: str, **facts: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service died, and we die with it
            self._channel.send({"op": kind, **facts})

    def _errand(self, job: SaveJob) -> Errand:
        """One that tells the service how it goes: the service has the clock, for all workers."""
        number, told_s = job.number, -BEAT_S

        def acknowledged() -> None:
            nonlocal told_s
            now_s = time.monotonic()
            if now_s - told_s >= _ACKNOWLEDGED_S:
                told_s = now_s
                self._tell("acknowledged", job=number)

        return Errand(
            failing=lambda sent_s: self._tell("failing", job=number, sent_s=sent_s),
            eased=lambda: self._tell("eased", job=number),
            acknowledged=acknowledged,
            retried=lambda event: self._retried(event, number),
        )


def run_worker(sock: socket.socket, hello: dict[str, Any], rules: Sequence[KeepRule], service_pid: int) -> None:
    """The life of a forked worker; never returns to the service's code."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != service_pid:
        os._exit(1)
    close_all_but(sock.fileno())
    os.nice(hello["nice"])
    _keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    sock.setblocking(True)
    _Worker(Channel(sock), hello, rules).serve()


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
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):
                os.close(fd)
