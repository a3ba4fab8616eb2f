"""A forked worker process: messages in, tasks done, replies out."""

import contextlib
import ctypes
import json
import mmap
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import IN_FLIGHT_BYTES, Pipeline
from asyncckpt.engine.tasks import TaskRunner
from asyncckpt.engine.title import Title, run_name
from asyncckpt.engine.wire import Channel, read_memory_file
from asyncckpt.events import StoreAway, StoreBack, StoreRetried
from asyncckpt.format.plan import Structure
from asyncckpt.options import KeepRule, S3Options
from asyncckpt.store.away import is_met, meet
from asyncckpt.store.errand import Errand
from asyncckpt.store.opening import address_of, open_store

BEAT_S = 1.0
_ACKNOWLEDGED_S = 0.25  # a save of many small shards need not tell of each
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MALLOC_BYTES = 32 * 2**20  # the most that glibc allows
_SWITCH_INTERVAL_S = 0.0005  # upload threads hand the GIL back to the encoder ten times sooner than by default
_MOST_DESCRIPTORS = 2**20


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
        self._runner = TaskRunner(store, rules, pipeline, self._answer, self._errand, progress=self.beat)
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
