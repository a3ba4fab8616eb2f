"""One snapshot while it is being taken: who waits for it, what became of it."""

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable

import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import SnapshotError, TornSnapshotError
from asyncckpt.latch import Latch
from asyncckpt.state import cuda
from asyncckpt.state.hook import gate
from asyncckpt.state.parts import Work
from asyncckpt.state.threads import within_idle_cores

_LOG = logging.getLogger("asyncckpt")


class Copy:
    """One snapshot being taken. `hook_wait_s`: steps waited for it; `staged_s`: from the start until it was complete.

    `error` is set before `done()`; `hook_wait_s` is final once the step that waits goes on.
    """

    def __init__(self, work: Work, clock: Callable[[], float], started_s: float) -> None:
        self.error: SnapshotError | None = None
        self.hook_wait_s = 0.0
        self.staged_s = 0.0
        self._work: Work | None = work  # holds the sources; gone when done
        self._clock = clock
        self._started_s = started_s
        self._enqueued = Latch()  # with CUDA: what steps wait for is known
        self._done = Latch()
        self._thread: int | None = None

    def done(self) -> bool:
        """Whether the snapshot is complete or failed; the state may change."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Block until done; does not raise `error`."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the snapshot was not complete after {timeout} s")

    def hold_step(self) -> None:
        """Return when an optimizer may step: the copy is done or, with CUDA, the step's stream waits for it."""
        if self._thread == threading.get_ident() or cuda.capturing():
            return  # the copy must not wait for itself; a step that is captured does not run now
        began_s = self._clock()
        work = self._work
        if work is None or not work.parts.lanes:
            self._done.wait()
        else:
            self._enqueued.wait()
            self._check(work)
            for lane, event in work.events:
                lane.hold(event)
        waited_s = self._clock() - began_s
        self.hook_wait_s += waited_s

    def abandon(self) -> None:
        """In a forked child: the thread that copies is the parent's."""
        self.error = SnapshotError("the process was forked while the snapshot was copied; the parent completes it")
        self._finish()

    @property
    def begun(self) -> bool:
        """Whether the copy thread has it."""
        return self._thread is not None

    def give_up(self) -> None:
        """Nobody will copy it: whoever waits goes on."""
        if self._work is not None:
            self._work.settle()
        self.error = SnapshotError("interrupted before it was copied")
        self._finish()

    def run(self, then: "Then") -> None:
        """On the copy thread: copy, check, tell. Never raises."""
        self._thread = threading.get_ident()
        afterwards = self._work.afterwards if self._work is not None else None
        try:
            self._copy()
        except BaseException as error:  # noqa: BLE001 - whoever waits must be told, whatever it is
            self._fail(error)
        gate.leave(self)
        self._finish()
        try:
            then(self)
        except Exception:  # noqa: BLE001 - the thread must live on for the next snapshot
            _LOG.exception("what follows a snapshot failed")
        if afterwards is not None:
            with contextlib.suppress(Exception):  # the next save draws for itself
                afterwards()

    def run_here(self) -> None:
        """On the caller's thread: only other threads can come between. Raises what goes wrong, but sets `error` for a torn copy."""
        assert self._work is not None
        with torch.no_grad():
            self._work.copy()
            self._work.synchronize()
        self._check(self._work, arena=self._work.arena)
        self._finish()

    def into(self, arena: Arena) -> bool:
        """Whether this arena is being written."""
        return self._work is not None and self._work.arena is arena

    def _copy(self) -> None:
        assert self._work is not None
        with torch.no_grad(), within_idle_cores(reserved=1):  # the training loop waits for the GIL while we look
            self._work.copy()
            self._enqueued.set()
            self._work.synchronize()
        self._check(self._work, arena=self._work.arena)

    def _fail(self, cause: BaseException) -> None:
        traceback.clear_frames(cause.__traceback__)  # or the error would keep the state in memory
        if self._work is not None:
            self._work.settle()
            with contextlib.suppress(Exception):
                self._check(self._work)  # a tensor that was changed beneath the copy explains most failures
        if self.error is None:
            self.error = cause if isinstance(cause, SnapshotError) else failure(cause)

    def _finish(self) -> None:
        self.staged_s = self._clock() - self._started_s
        self._work = None
        self._enqueued.set()
        self._done.set()

    def _check(self, work: Work, arena: Arena | None = None) -> None:
        """Hold the witnesses against the sources: before an optimizer writes, and not again afterwards.

        The copy thread and a step may do so at the same time. Whoever is ready first has the answer, and the other one's is dropped: by then
        the optimizer may have written. Neither waits for the other, since a signal handler may have come in the middle of the step's.
        """
        witnesses = work.witnesses
        if witnesses is None or self.error is not None:
            return
        found = witnesses.difference(None if arena is None else arena.buffer)
        if work.witnesses is None:
            return
        if found is not None:
            member, what = found
            self.error = TornSnapshotError(
                f"this tensor {what} while the snapshot copied it, so the copy may be of two moments; nothing of this save "
                "is stored. Write parameters and optimizer state in Optimizer.step() only, on the thread that saves, and "
                "call wait_staged() before any other write (with overlap=False the copy is complete when save() returns)",
                key=work.path(work.parts.watched.members[member]),
            )
        work.witnesses = None


Then = Callable[[Copy], None]
"""What follows a copy, whether it is complete or failed."""


def failure(cause: BaseException) -> SnapshotError:
    """What stopped a copy, as our error."""
    error = SnapshotError(f"copying the state failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
