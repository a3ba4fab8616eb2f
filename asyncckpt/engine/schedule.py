"""Which task of which save is next. Pure: no clock, no I/O; the service and the in-process engine both drive it.

A save is a check (is the step taken?), its shards, and a commit, which waits for the check where the folder may be another run's. A failed
or needless save ends with the removal of what it stored, unless its record may still arrive; a committed one may be followed by retention.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncckpt import errors
from asyncckpt.engine.job import CommitOutcome, SaveJob, ShardReceipt

Kind = Literal["check", "shard", "commit", "abandon", "retain", "collect"]
MAX_DEATHS = 3
"""A task that kills its worker this often fails its save."""
MAX_LOST_UPLOADS = 3
"""So often the upload of a shard is begun again."""


@dataclass(slots=True, eq=False)
class Task:
    """One piece of work for a worker. `shard` is set for kind shard."""

    number: int
    kind: Kind
    run: "JobRun"
    shard: int = -1
    deaths: int = 0
    lost_uploads: int = 0


@dataclass(slots=True, eq=False)
class JobRun:
    """A save on its way. `filled`: so many of its shards are complete in the arena; `staged`: all are, and nobody wrote meanwhile.

    `checked`: nothing that its check may still find forbids the commit.
    `may_appear`: its record was sent and nobody knows whether it arrives; what was stored must stay.
    """

    job: SaveJob
    shards: int
    filled: int
    staged: bool
    checked: bool
    ready: deque[Task] = field(default_factory=deque)
    receipts: dict[int, ShardReceipt] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    retries: int = 0
    stage: Literal["shards", "commit", "abandon", "retain", "over"] = "shards"
    error: BaseException | None = None
    exists: bool = False
    may_appear: bool = False
    outcome: CommitOutcome | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A save has its answer: an outcome, or an error."""

    run: JobRun
    outcome: CommitOutcome | None
    error: BaseException | None


class Schedule:
    """Jobs in order, tasks of the oldest first. `retention`: whether a commit is followed by a retain task.

    `collection`: whether the first commit, and the first one after the death of a worker, is followed by a collect task.
    """

    def __init__(self, *, retention: bool, collection: bool = False) -> None:
        self.runs: dict[int, JobRun] = {}
        self.tasks: dict[int, Task] = {}
        self._retention = retention
        self._collection = collection
        self._to_collect = collection
        self._next = 0

    def submit(self, job: SaveJob, shards: int, *, staged: bool = True) -> JobRun:
        """Take a save in, with its snapshot complete (`staged`) or begun."""
        run = JobRun(job, shards, shards if staged else 0, staged, checked=not job.newcomer)
        self.runs[job.number] = run
        run.ready.append(self._task("check", run))
        run.ready.extend(self._task("shard", run, shard) for shard in range(shards))
        self._commit_if_complete(run)
        return run

    def filled(self, number: int, shards: int) -> bool:
        """So many shards of a snapshot that is being taken are complete; whether that is news."""
        run = self.runs.get(number)
        if run is None or not run.filled < shards <= run.shards:
            return False
        run.filled = shards
        return True

    def staged(self, number: int) -> bool:
        """A snapshot is complete and its save may be committed. False if it has its answer already, without that."""
        run = self.runs.get(number)
        if run is None or run.stage == "over":
            return False
        run.staged, run.filled = True, run.shards
        self._commit_if_complete(run)
        return True

    def withdraw(self, number: int) -> Ended | None:
        """A snapshot failed: what was stored of it goes away."""
        run = self.runs.get(number)
        if run is None or run.stage != "shards":
            return None
        run.error = run.error or errors.SnapshotError("the snapshot was not completed", step=run.job.step)
        self._stop(run)
        return self._advance(run)

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        return not self.runs

    def next(self, *, encoder_free: bool, ahead: Callable[[], bool] = lambda: True) -> Task | None:
        """The next task; shards only when an encoder is free, and those of a snapshot that is being taken when `ahead` says so."""
        for run in self.runs.values():
            if run.ready and (run.ready[0].kind != "shard" or (encoder_free and self._may_start(run, ahead))):
                task = run.ready.popleft()
                run.running.add(task.number)
                return task
        return None

    def _may_start(self, run: JobRun, ahead: Callable[[], bool]) -> bool:
        return run.ready[0].shard < run.filled and (run.staged or ahead())

    def done(self, task: Task, result: dict[str, Any]) -> Ended | None:
        """A task succeeded."""
        run = self._settle(task)
        if task.kind == "shard":
            run.receipts[task.shard] = ShardReceipt.from_json(result)
            self._commit_if_complete(run)
        elif task.kind == "check" and not result["exists"]:
            run.checked = True
            self._commit_if_complete(run)
        elif task.kind == "check" and run.stage in ("shards", "commit"):
            run.exists = True
            self._stop(run)
        elif task.kind == "commit":
            run.outcome = CommitOutcome.from_json({**result, "retries": run.retries})
            if run.outcome.result == "exists":
                run.exists = True
                run.may_appear = run.may_appear or run.outcome.may_appear
                self._stop(run)
            else:
                return self._committed(run)
        return self._advance(run)

    def failed(self, task: Task, error: BaseException) -> Ended | None:
        """A task failed for good; or the store lost the upload of a shard, which is stored again from the arena."""
        if isinstance(error, errors.UploadLostError) and task.kind == "shard" and task.lost_uploads < MAX_LOST_UPLOADS:
            task.lost_uploads += 1
            task.run.retries += 1
            return self._again(task)
        run = self._settle(task)
        if task.kind in ("abandon", "retain", "collect") or run.outcome is not None:
            # leftovers are found by their missing record; retention runs again after the next save; a committed save stays so
            return self._advance(run)
        run.may_appear = run.may_appear or isinstance(error, errors.CommitUnknownError)
        if run.error is None and not run.exists:
            run.error = error
        self._stop(run)
        return self._advance(run)

    def lost(self, task: Task, reason: str) -> Ended | None:
        """The worker died under this task: again, from the arena. A dead one may have sent the record."""
        task.deaths += 1
        self._to_collect = self._to_collect or (self._collection and task.kind != "collect")
        task.run.may_appear = task.run.may_appear or task.kind == "commit"
        if task.deaths >= MAX_DEATHS:
            message = f"{task.deaths} workers in a row died on one {task.kind} task: {reason}"
            died = errors.WorkerDiedError(message, step=task.run.job.step)
            if task.kind != "commit":
                return self.failed(task, died)
            unknown = errors.CommitUnknownError(
                f"{message}. The step may still appear, complete", step=task.run.job.step
            )
            unknown.__cause__ = died
            return self.failed(task, unknown)
        return self._again(task)

    def _again(self, task: Task) -> Ended | None:
        task.run.running.discard(task.number)
        if self._wanted(task):
            task.run.ready.appendleft(task)
            return None
        del self.tasks[task.number]
        return self._advance(task.run)

    def _commit_if_complete(self, run: JobRun) -> None:
        if run.stage == "shards" and run.staged and run.checked and len(run.receipts) == run.shards:
            run.stage = "commit"
            run.ready.append(self._task("commit", run))

    def _wanted(self, task: Task) -> bool:
        return task.run.stage not in ("abandon", "over") or task.kind == "abandon"

    def _task(self, kind: Kind, run: JobRun, shard: int = -1) -> Task:
        self._next += 1
        task = self.tasks[self._next] = Task(self._next, kind, run, shard)
        return task

    def _settle(self, task: Task) -> JobRun:
        task.run.running.discard(task.number)
        self.tasks.pop(task.number, None)
        return task.run

    def _stop(self, run: JobRun) -> None:
        # nothing new starts; what runs comes home first, so that the removal finds everything
        for task in run.ready:
            del self.tasks[task.number]
        run.ready.clear()
        if run.stage != "over":
            run.stage = "abandon"

    def _committed(self, run: JobRun) -> Ended:
        run.stage = "retain"
        if self._retention:
            run.ready.append(self._task("retain", run))
        if self._to_collect:
            self._to_collect = False
            run.ready.append(self._task("collect", run))
        self._advance(run)
        return Ended(run, run.outcome, None)

    def _advance(self, run: JobRun) -> Ended | None:
        if run.ready or run.running or run.stage in ("shards", "commit"):
            return None
        if run.stage == "abandon":
            run.stage = "over"
            outcome = CommitOutcome("exists", retries=run.retries) if run.exists and run.error is None else None
            if run.may_appear:
                self.runs.pop(run.job.number, None)
            else:
                run.ready.append(self._task("abandon", run))
            return Ended(run, outcome, run.error)
        self.runs.pop(run.job.number, None)
        return None
