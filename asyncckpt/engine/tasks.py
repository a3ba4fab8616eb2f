"""What a worker, or the in-process engine, does for a save: each task against one store, its answer to whoever asked."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt import errors
from asyncckpt.checkpoints import removal
from asyncckpt.checkpoints.admission import admit
from asyncckpt.checkpoints.leftovers import collect
from asyncckpt.engine import commit, upkeep
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import Pipeline
from asyncckpt.engine.retention import Retention
from asyncckpt.format import keys
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import Plan, Structure, plan
from asyncckpt.options import KeepRule
from asyncckpt.store.base import Progress, Store
from asyncckpt.store.errand import Errand, within
from asyncckpt.store.retry import RetryingStore

_COLLECT_S = 120.0  # of one collection: about a million objects on S3
_REMOVAL_S = 60.0  # for what a failed save stored; what stays is found by its missing record

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
        *,
        progress: Progress = lambda: None,
        collect_s: float = _COLLECT_S,
    ) -> None:
        self._store = store
        self._errand_of = errand_of
        self._errands: dict[int, tuple[Errand, int]] = {}  # by save, with how many tasks it has here
        self._counting = threading.Lock()
        self._progress = progress
        self._collect_s = collect_s
        self._clock = store.clock if isinstance(store, RetryingStore) else time.monotonic
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
            store = self._store.on(within(_REMOVAL_S, clock=self._clock))
            removal.abandon(store, job.step, job.attempt)
            removal.end_uploads(store, _folders(job))
            return {}

        self._beside(task, job, work)

    def retain(self, task: int, job: SaveJob) -> None:
        """Apply the rules of retention."""

        def work(_: Errand) -> dict[str, Any]:
            return self._retention.retain(committed=job.step, lineage=job.lineage).to_json()

        self._beside(task, job, work)

    def collect(self, task: int, job: SaveJob) -> None:
        """Remove what dead writers left, and end what workers of this very save left open, which is committed by now."""
        end_s = time.monotonic() + self._collect_s

        def go_on() -> bool:
            self._progress()
            return time.monotonic() < end_s

        def work(_: Errand) -> dict[str, Any]:
            done = collect(self._store, ended=_folders(job), go_on=go_on)
            if time.monotonic() >= end_s:
                late = errors.DeadlineExceededError(
                    f"leftovers were looked for {self._collect_s:.0f} s, and not everywhere; Run(url).collect_garbage() takes the time it needs"
                )
                done = replace(done, failures=(*done.failures, late))
            return upkeep.told_of(done)

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


def _folders(job: SaveJob) -> list[str]:
    """Of all attempts of the save."""
    return [keys.folder(job.step, attempt) for attempt in (job.attempt, *job.earlier_attempts)]
