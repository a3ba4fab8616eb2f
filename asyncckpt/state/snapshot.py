"""Snapshots: the tensors of a state copied into an arena, before `copy()` returns (eager) or behind it (overlapped).

All tensors of host memory go in one `torch._foreach_copy_`, which releases the GIL once for the whole list: copied one
by one, each would wait for the GIL again beside a busy main thread (1.7 s instead of 46 ms for 0.8 GB). An overlapped
copy runs on a thread of its own; optimizer steps wait for it (`hook`), and `witness` tells who wrote nevertheless.
"""

import contextlib
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import ForkedSaverError, SnapshotError, TornSnapshotError, UnsupportedTensorError
from asyncckpt.state import cuda
from asyncckpt.state.hook import gate
from asyncckpt.state.parts import Parts, Views, Work, cut, devices_of
from asyncckpt.state.threads import find_thread_pools, within_idle_cores
from asyncckpt.state.witness import Ahead, freed

if TYPE_CHECKING:  # annotations only: these pull in the format's dependencies
    from asyncckpt.format.plan import Plan
    from asyncckpt.state.tree import Flat

_LOG = logging.getLogger("asyncckpt")
_JOIN_S = 30.0  # a copy takes as long as a memcpy; what follows one must be quick


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
        self._lock = threading.Lock()
        self._enqueued = threading.Event()  # with CUDA: what steps wait for is known
        self._done = threading.Event()
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
        with self._lock:
            self.hook_wait_s += self._clock() - began_s

    def abandon(self) -> None:
        """In a forked child: the thread that copies is the parent's, and a lock may be held by it for ever."""
        self._lock, self._done, self._enqueued = threading.Lock(), threading.Event(), threading.Event()
        self.error = SnapshotError("the process was forked while the snapshot was copied; the parent completes it")
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
            with contextlib.suppress(Exception):
                self._check(self._work)  # a tensor that was changed beneath the copy explains most failures
        if self.error is None:
            self.error = failure(cause)

    def _finish(self) -> None:
        self.staged_s = self._clock() - self._started_s
        self._work = None
        self._enqueued.set()
        self._done.set()

    def _check(self, work: Work, arena: Arena | None = None) -> None:
        """Hold the witnesses against the sources: once, because after that an optimizer may write."""
        with self._lock:
            witnesses, work.witnesses = work.witnesses, None
            if witnesses is None or self.error is not None:
                return
            found = witnesses.difference(None if arena is None else arena.buffer)
            if found is not None:
                member, what = found
                self.error = TornSnapshotError(
                    f"this tensor {what} while the snapshot copied it, so the copy may be of two moments; nothing of this save "
                    "is stored. Write parameters and optimizer state in Optimizer.step() only, on the thread that saves, and "
                    "call wait_staged() before any other write (with overlap=False the copy is complete when save() returns)",
                    key=work.path(work.parts.watched.members[member]),
                )


Then = Callable[[Copy], None]


class Copier:
    """Takes snapshots, one after the other; has a thread and a hook from the first overlapped one until `close()`.

    Args:
        clock: Seconds, for the reports.
        random: Draws where the witness words stand; never torch's or NumPy's global generator.
        before_copy: Runs on the copy thread before it copies, so that a test can write at that moment.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        random: np.random.Generator | None = None,
        before_copy: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock
        self._ahead = Ahead(random or np.random.default_rng())
        self._before_copy = before_copy
        self._views = Views()
        self._pins = cuda.Pins()
        self._lanes: dict[torch.device, cuda.Lane] = {}
        self._cut: tuple[tuple[int, ...], tuple[bool, ...], bool, list[int], Parts] | None = None
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Copy, Then] | None] = queue.SimpleQueue()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._closed = False
        self._forks = gate.forks

    def prepare(self, plan: "Plan", arena: Arena) -> None:
        """Do ahead, on any thread, what the first copy into this arena must do: views; page-locking if CUDA is in use."""
        with self._lock:
            self._views.of(arena, plan)
            if torch.cuda.is_initialized():
                self._pins.pin(arena)

    def copy(self, flat: "Flat", plan: "Plan", arena: Arena, *, overlap: bool, started_s: float, then: Then) -> Copy:
        """Copy the tensors of `flat` to where `plan` has them in `arena`; `started_s` is of the same clock.

        Eager, every byte is in the arena and `then(copy)` has run when this returns. Overlapped, it returns when all that
        may change outside an optimizer's step is copied; the rest follows on the copy thread, and there `then`, which must
        be quick. A failure before it returns raises `SnapshotError`, without `then`; one behind it is `copy.error`.
        """
        if self._forks != gate.forks:
            raise ForkedSaverError("a Saver belongs to the process that made it; make another one in the child")
        if self._closed:
            raise RuntimeError("this Copier is closed")
        if cuda.capturing():
            raise SnapshotError("save() was called inside the capture of a CUDA graph; call it outside")
        gone = freed(flat.tensors, flat.sight.addresses)
        if gone is not None:
            path = flat.structure.path(gone)
            raise UnsupportedTensorError("its storage was freed; gather the full parameters before saving", key=path)
        try:
            work = self._work(flat, plan, arena, overlap=overlap)
            copy = Copy(work, self._clock, started_s)
            overlaps = work.parts.overlaps and self._has_thread()
            if not overlaps:
                work.watch(flat.sight, self._ahead)
            with torch.no_grad():
                work.start()
            if overlaps:
                work.before_copy = self._before_copy
                work.watch(flat.sight, self._ahead)
                gate.enter(copy)
                self._jobs.put((copy, then))
                return copy
            copy.run_here()
        except (RuntimeError, MemoryError) as error:
            raise failure(error) from error
        then(copy)
        return copy

    def forget(self, arena: Arena) -> None:
        """Drop what is kept of an arena, so that it can be unmapped. Waits for a copy into it."""
        for copy in gate.in_flight():
            if isinstance(copy, Copy) and copy.into(arena):
                copy.wait()
        with self._lock:
            self._views.forget(arena)
            if self._forks == gate.forks:
                self._pins.unpin(arena)

    def close(self) -> None:
        """Finish the copies in flight and leave nothing: no thread, no hook, no view."""
        self._closed = True
        if self._stop is not None:
            self._stop()
        for arena in self._views.arenas():
            self.forget(arena)

    def _work(self, flat: "Flat", plan: "Plan", arena: Arena, *, overlap: bool) -> Work:
        devices = devices_of(flat.tensors)
        known = self._cut
        offsets = plan.tensor_offsets  # of one object are one structure, whatever the codec
        if known is None or known[0] is not offsets or known[1:4] != (flat.overlappable, overlap, devices):
            known = self._cut = (offsets, flat.overlappable, overlap, devices, cut(flat, plan, overlap=overlap))
        parts = known[4]
        lanes = []
        for part in parts.lanes:
            if part.device not in self._lanes:
                self._lanes[part.device] = cuda.Lane(part.device)
            lanes.append(self._lanes[part.device])
        with self._lock:
            if lanes:
                self._pins.pin(arena)
            targets = self._views.of(arena, plan)
        return Work(parts, flat.tensors, targets, arena, lanes, flat.structure.path)

    def _has_thread(self) -> bool:
        """Start it if need be; False when the process cannot have one more (limits, interpreter exit)."""
        if self._stop is None:
            find_thread_pools()
            thread = threading.Thread(target=_serve, args=(self._jobs,), name="asyncckpt-copy", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            gate.open()
            self._stop = weakref.finalize(self, _finish, self._jobs, thread)  # also when collected, and at exit
        return True


def failure(cause: BaseException) -> SnapshotError:
    """What stopped a copy, as our error."""
    error = SnapshotError(f"copying the state failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _serve(jobs: "queue.SimpleQueue[tuple[Copy, Then] | None]") -> None:
    """The copy thread. Holds no Copier, so that one can be collected, and no state between two copies."""
    for copy, then in iter(jobs.get, None):
        copy.run(then)
        del copy, then


def _finish(jobs: "queue.SimpleQueue[tuple[Copy, Then] | None]", thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(_JOIN_S)
    gate.close()
