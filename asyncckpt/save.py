"""The handle of one save, as the training loop holds it, and the ledger of all of them."""

import collections
import contextlib
import itertools
import logging
import threading
import time
from typing import TypeVar

from asyncckpt.engine.job import CommitOutcome
from asyncckpt.errors import CheckpointError, SaveFailedError, SnapshotError
from asyncckpt.events import Event, Hooks, SaveCommitted, SaveFailed, SaveReport, SaveSkipped
from asyncckpt.latch import Latch
from asyncckpt.state.in_flight import Copy
from asyncckpt.telling import say, warn

EXISTS = "the step exists already"
_WAY_OUT = (
    "; nothing of it is stored. If training went back on purpose, Run(url).rewind(step) removes what came later; "
    'on_exists="raise" makes this an error'
)
T = TypeVar("T")


class Save:
    """One save on its way. Thread-safe; made by `Saver.save`."""

    def __init__(self, step: int, number: int, started_s: float) -> None:
        self.step = step
        self._number = number
        self._started_s = started_s
        self._call_s = 0.0
        self._staged = Latch()
        self._ended = Latch()
        self._launching: int | None = None  # the thread that is in the middle of beginning it
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._delivered = False

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self._error else "done"
        return f"<Save step={self.step} {state}>"

    def done(self) -> bool:
        """Whether the save has ended: committed, skipped or failed."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait until the checkpoint exists, and tell how it went.

        Raises the save's own typed error if it failed, each time it is called. `TimeoutError` after `timeout` seconds; the save goes on.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the save of step {self.step} is not committed after {timeout} s; it goes on")
        if self._error is not None:
            self._delivered = True
            raise self._error
        assert self._report is not None
        return self._report

    def wait_staged(self, timeout: float | None = None) -> None:
        """Wait until the snapshot is complete, so that the state may be changed by hand. `TimeoutError` after `timeout` seconds.

        Raises the save's own error if the snapshot failed.
        """
        if not self._staged.wait(timeout):
            raise TimeoutError(f"the snapshot of step {self.step} is not complete after {timeout} s; it goes on")
        if isinstance(self._error, SnapshotError):
            self._delivered = True
            raise self._error

    def _torn(self, error: SnapshotError) -> None:
        """The snapshot failed; the answer follows when nothing reads the arena any more."""
        self._error = error.at(step=self.step)
        self._staged.set()

    def _told(self, report: SaveReport | None, error: BaseException | None) -> None:
        """What `_conclude` will say; nobody wakes."""
        if isinstance(error, CheckpointError):
            error.at(step=self.step)
        self._report = report
        self._error = error

    def _conclude(self, report: SaveReport | None, error: BaseException | None) -> None:
        self._told(report, error)
        self._staged.set()
        self._ended.set()

    def _age_s(self) -> float:
        return time.perf_counter() - self._started_s


class Ledger:
    """Every save of a Saver: which are in flight, which failed, and what the caller has not been told yet.

    Thread-safe without a lock, by single steps of dicts and deques: the answers come on other threads, and a signal handler that waits for
    one may have come in the middle of any method here.
    """

    def __init__(self, hooks: Hooks, max_failed_saves: int | None) -> None:
        self._hooks = hooks
        self._max_failed_saves = max_failed_saves
        self._numbers = itertools.count(1)
        self._open: dict[int, Save] = {}
        self._failed: collections.deque[Save] = collections.deque()
        self._notices: collections.deque[tuple[Save, str]] = collections.deque()
        self._failed_in_row: collections.deque[Save] = collections.deque()
        self.skipped_saves = 0

    def new(self, step: int, started_s: float) -> Save:
        """A save that nobody waits for yet."""
        return Save(step, next(self._numbers), started_s)

    def open(self, save: Save) -> None:
        """It begins; `conclude` or `forget` must follow."""
        self._open[save._number] = save

    def forget(self, save: Save, error: BaseException) -> None:
        """The save never started; whoever asked for it is told by the exception on its way."""
        save._delivered = True
        save._conclude(None, error)
        self._open.pop(save._number, None)

    def conclude(self, save: Save, report: SaveReport | None, error: BaseException | None) -> None:
        """A save ended: remember, wake who waits, log one line, tell the hooks."""
        save._told(report, error)
        if error is not None:  # remembered before anybody wakes and asks
            self._failed_in_row.append(save)
            self._notices.append((save, f"the save of step {save.step} failed: {type(error).__name__}: {error}"))
            self._failed.append(save)
        elif report is not None and report.skipped:
            self.skipped_saves += 1
            way_out = _WAY_OUT if report.skipped == EXISTS else ""
            self._notices.append((save, f"the save of step {save.step} was skipped: {report.skipped}{way_out}"))
        else:
            self._failed_in_row.clear()
        self._open.pop(save._number, None)
        save._conclude(report, error)
        self._hooks(_log(save, report, error))

    def report_earlier(self, step: int) -> None:
        """Warn of what failed or was skipped since the last call; raise when too many failed in a row, and count anew."""
        failed_in_row = len(self._failed_in_row)
        notices = _taken(self._notices)
        if self._max_failed_saves is not None and failed_in_row >= self._max_failed_saves:
            self._failed_in_row.clear()
            self._raise_failures(f"{failed_in_row} saves in a row failed before step {step}")
        for save, notice in notices:
            if not save._delivered:
                warn(notice, RuntimeWarning, stacklevel=3)

    @property
    def in_flight(self) -> list[Save]:
        """Saves without an answer."""
        return list(self._open.values())

    def underway(self) -> list[Save]:
        """Those without an answer that go on by themselves: not what a call beneath, on this very thread, is about to begin."""
        return [save for save in self.in_flight if save._launching != threading.get_ident()]

    def wait_staged(self, timeout: float | None) -> None:
        """Until the snapshot of every save made so far is complete."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for save in self.underway():
            save.wait_staged(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def wait(self, timeout: float | None) -> None:
        """Until every save made so far has ended; then raise what failed and was not raised before."""
        waiting = self.underway()
        deadline = None if timeout is None else time.monotonic() + timeout
        for save in waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not save._ended.wait(left):
                raise TimeoutError(f"the save of step {save.step} is not committed after {timeout} s; it goes on")
        self._raise_failures("")

    def _raise_failures(self, reason: str) -> None:
        failed = [save for save in _taken(self._failed) if not save._delivered]
        if not failed:
            if reason:
                raise CheckpointError(f"{reason}, and max_failed_saves is {self._max_failed_saves}")
            return
        for save in failed:
            save._delivered = True
        raise SaveFailedError({save.step: save._error for save in failed if save._error is not None}) from failed[
            0
        ]._error


def _taken(items: "collections.deque[T]") -> list[T]:
    """All of them, which are gone from there."""
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(items.popleft())
    return taken


def report_of(save: Save, copy: Copy | None, outcome: CommitOutcome) -> SaveReport:
    """What the engine says of a save, and what the trainer saw of it."""
    return SaveReport(
        step=save.step,
        call_s=save._call_s,
        hook_wait_s=copy.hook_wait_s if copy else 0.0,
        staged_s=copy.staged_s if copy else 0.0,
        encode_s=outcome.encode_s,
        upload_s=outcome.upload_s,
        commit_s=outcome.commit_s,
        total_s=save._age_s(),
        raw_bytes=outcome.raw_bytes,
        stored_bytes=outcome.stored_bytes,
        retries=outcome.retries,
        skipped=EXISTS if outcome.result == "exists" else None,
    )


def _log(save: Save, report: SaveReport | None, error: BaseException | None) -> Event:
    if error is not None:
        say(logging.ERROR, "step %d: save failed: %s: %s", save.step, type(error).__name__, error)
        return SaveFailed(save.step, error)
    assert report is not None
    if report.skipped:
        say(logging.WARNING, "step %d: save skipped: %s", save.step, report.skipped)
        return SaveSkipped(save.step, report.skipped)
    ratio = report.stored_bytes / report.raw_bytes if report.raw_bytes else 1.0
    say(
        logging.INFO,
        "step %d: committed in %.2f s (call %.1f ms, staged %.0f ms), %.1f MB stored, ratio %.3f, %d retries",
        *(save.step, report.total_s, report.call_s * 1e3, report.staged_s * 1e3, report.stored_bytes / 1e6, ratio),
        report.retries,
    )
    return SaveCommitted(report)
