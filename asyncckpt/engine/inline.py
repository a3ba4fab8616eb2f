"""The in-process engine: the same schedule and runner on threads of the trainer.

For stores that live in this process, and where memory files do not exist. Slower beside a busy main thread, which
keeps the GIL from the encoder, and it ends with the process.
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncckpt import errors, events
from asyncckpt.engine import upkeep
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import Pipeline
from asyncckpt.engine.schedule import Ended, Schedule, Task
from asyncckpt.engine.submitted import Listener, parting_s
from asyncckpt.engine.tasks import TaskRunner
from asyncckpt.format.plan import Plan
from asyncckpt.latch import Latch
from asyncckpt.options import KeepRule, RetryPolicy
from asyncckpt.store.base import Store
from asyncckpt.store.errand import Errand

_LOG = logging.getLogger("asyncckpt")
_LOOK_S = 0.2  # how often the clocks of saves are looked at


@dataclass(slots=True)
class _Staged:
    arena: Arena
    state: bytes


class InlineEngine:
    """Saves on threads of this process; same interface as `ServiceEngine`."""

    pid: int | None = None
    broken = False

    def __init__(
        self,
        store: Store,
        keep: tuple[KeepRule, ...],
        listener: Listener,
        *,
        retry: RetryPolicy | None = None,
        closes_store: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock  # the store's: its retries are timed by it
        self._keep = keep
        self._closes_store = closes_store
        self._store_fails = False  # a request was tried again since the last answer
        self._listener = listener
        self._retention = bool(keep)
        self._retry = retry or RetryPolicy()
        self._schedule = self._new_schedule()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pipeline: Pipeline  # of the thread
        self._runner: TaskRunner
        self._begun = Latch()
        self._failure: BaseException | None = None
        self._staged: dict[int, _Staged] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="asyncckpt-engine", daemon=True)

    def start(self) -> None:
        """Before anything else. `close` must follow, whatever is raised."""
        self._thread.start()
        self._begun.wait()
        if self._failure is not None:
            raise self._failure

    def call(self, act: Callable[[], None]) -> None:
        """Do it on the engine's thread, where no signal handler comes, ahead of all that is asked for later."""
        self._inbox.put(act)

    def announce(self, job: SaveJob, plan: Plan, arena: Arena) -> None:
        """Nothing is done ahead: threads of the trainer's own would only slow the copy down."""

    def withdraw(self, number: int, error: BaseException) -> None:
        """A snapshot failed: this is the save's answer."""
        self._listener.ended(number, None, error)

    def submit(self, job: SaveJob, plan: Plan, arena: Arena, state: bytes) -> None:
        """Hand one staged save over."""
        self._staged[job.number] = _Staged(arena, state)
        self._inbox.put(lambda: self._take(job, plan))

    def forget_arena(self, arena: Arena) -> None:
        """Nothing is held here."""

    def forget_structure(self, number: int) -> None:
        """No later job names this structure."""
        self._inbox.put(lambda: self._runner.forget_structure(number))

    def close(self, *, wait_s: float = math.inf) -> None:
        """Finish what was handed over and end the threads, and the store if it is ours.

        What follows the answers (a removal, retention) is waited for as `parting_s` says, and `wait_s` at most. It goes on then, as long as
        the process lives; so do the saves themselves.
        """
        self._inbox.put(None)
        with contextlib.suppress(RuntimeError):  # an interrupt came before it was started
            self._thread.join(max(0.0, min(wait_s, parting_s(self._retry, store_fails=self._store_fails))))

    def close_in_child(self) -> None:
        """Nothing to let go of: threads do not cross a fork."""

    def retried(self, event: events.StoreRetried) -> None:
        """The store waits before it asks again."""
        self._store_fails = True
        self._inbox.put(lambda: self._listener.event(event))

    def _take(self, job: SaveJob, plan: Plan) -> None:
        self._runner.add_structure(job.structure, plan.structure)
        self._schedule.submit(job, len(plan.shards))

    def _run(self) -> None:
        try:  # here, where no interrupt comes between the starts of its threads
            self._pipeline = Pipeline(self._store)
            self._runner = TaskRunner(self._store, self._keep, self._pipeline, self._reply, self._errand)
        except BaseException as error:  # noqa: BLE001 - who starts us is told
            self._failure = error
            return
        finally:
            self._begun.set()
        while not (self._closing and self._schedule.idle):
            try:
                message = self._inbox.get(timeout=None if self._schedule.idle else _LOOK_S)
            except queue.Empty:
                message = self._look
            try:
                if message is None:
                    self._closing = True
                else:
                    self._look()
                    message()
                while (task := self._schedule.next(encoder_free=self._inbox.empty())) is not None:
                    self._do(task)
            except Exception as error:  # noqa: BLE001 - nobody would answer any more: tell everybody who waits
                _LOG.debug("the checkpoint engine failed", exc_info=error)
                self._fail_all(f"the checkpoint engine failed: {type(error).__name__}: {error}")
            del message
        self._pipeline.close()
        if self._closes_store:
            self._store.close()

    def _fail_all(self, reason: str) -> None:
        self._schedule = self._new_schedule()
        for number in list(self._staged):
            del self._staged[number]
            self._listener.ended(number, None, errors.WorkerDiedError(reason))

    def _do(self, task: Task) -> None:
        job = task.run.job
        staged = self._staged.get(job.number)
        if task.kind == "shard":
            assert staged is not None
            self._runner.shard(task.number, job, task.shard, memoryview(staged.arena.buffer))
        elif task.kind == "commit":
            assert staged is not None
            receipts = sorted(task.run.receipts.values(), key=lambda receipt: receipt.shard)
            self._runner.commit(task.number, job, receipts, memoryview(staged.arena.buffer), staged.state)
        else:
            getattr(self._runner, task.kind)(task.number, job)

    def _reply(self, task: int, kind: str, data: dict[str, Any]) -> None:
        self._inbox.put(lambda: self._heard(task, kind, data))

    def _new_schedule(self) -> Schedule:
        return Schedule(
            retention=self._retention,
            collection=True,
            deadline_s=self._retry.deadline_s,
            give_up=lambda job: self._runner.give_up(job.number),
        )

    def _errand(self, job: SaveJob) -> Errand:
        """One that looks at its save's clock itself: this engine's thread may be the encoder, which waits for its uploads."""
        run = self._schedule.runs[job.number]
        clock = run.clock

        def retried(event: events.StoreRetried) -> None:
            run.retries += 1
            clock.last = event
            self.retried(event)

        return Errand(
            failing=lambda sent_s: clock.fails(job.number, sent_s),
            eased=lambda: clock.eases(job.number),
            acknowledged=lambda: clock.acknowledges(self._clock()),
            retried=retried,
            is_late=lambda: clock.ran_out(self._clock()),
            clock=self._clock,
        )

    def _look(self) -> None:
        for ended in self._schedule.look(self._clock()):
            self._answer(ended)

    def _heard(self, number: int, kind: str, data: dict[str, Any]) -> None:
        if kind == "encoded":
            self._answer(self._schedule.encoded(number))
            return
        task = self._schedule.tasks.get(number)
        if task is None:
            return  # of a save that failed with the engine
        if kind == "done":
            self._progress(task, data)
            self._answer(self._schedule.done(task, data))
        else:
            self._tell_of_upkeep(task, upkeep.told_of_failure(data))
            self._answer(self._schedule.failed(task, errors.from_json(data)))

    def _progress(self, task: Task, data: dict[str, Any]) -> None:
        run = task.run
        if task.kind == "shard":
            receipt = ShardReceipt.from_json(data)
            event: events.Event = events.ShardStored(
                step=run.job.step,
                key=receipt.key,
                raw_bytes=receipt.raw_bytes,
                stored_bytes=receipt.stored_bytes,
                shards_done=len(run.receipts) + 1,
                shards=run.shards,
            )
            self._listener.event(event)
        self._tell_of_upkeep(task, data)

    def _tell_of_upkeep(self, task: Task, data: dict[str, Any]) -> None:
        if task.kind in upkeep.KINDS:
            for event in upkeep.events_of(task.kind, data):
                self._listener.event(event)

    def _answer(self, ended: Ended | None) -> None:
        if ended is not None:
            self._store_fails = self._store_fails and ended.error is not None
            self._staged.pop(ended.run.job.number)
            self._listener.ended(ended.run.job.number, ended.outcome, ended.error)
