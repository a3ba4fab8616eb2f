"""Snapshots: the tensors of a state copied into an arena, before `copy()` returns (eager) or behind it (overlapped).

All tensors of host memory go in one `torch._foreach_copy_`, which releases the GIL once for the whole list: copied one
by one, each would wait for the GIL again beside a busy main thread (1.7 s instead of 46 ms for 0.8 GB). An overlapped
copy runs on a thread of its own; optimizer steps wait for it (`hook`), and `witness` tells who wrote nevertheless.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import ForkedSaverError, SnapshotError, UnsupportedTensorError
from asyncckpt.latch import Latch
from asyncckpt.state import cuda
from asyncckpt.state.hook import gate
from asyncckpt.state.in_flight import Copy, Then, failure
from asyncckpt.state.parts import Announced, MarkPlaces, Parts, Views, Work, cut, devices_of, shows_stores_in_order
from asyncckpt.state.threads import find_thread_pools
from asyncckpt.state.witness import Ahead, freed

if TYPE_CHECKING:  # annotations only: these pull in the format's dependencies
    from asyncckpt.format.plan import Plan
    from asyncckpt.state.tree import Flat

_JOIN_S = 30.0  # a copy takes as long as a memcpy; what follows one must be quick


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
        self._marks = MarkPlaces()
        self._pins = cuda.Pins()
        self._lanes: dict[torch.device, cuda.Lane] = {}
        self._cut: tuple[tuple[int, ...], tuple[bool, ...], bool, list[int], Parts] | None = None
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._closed = False
        self._forks = gate.forks

    def prepare(self, plan: "Plan", arena: Arena, device: torch.device | None = None) -> None:
        """Do ahead, on any thread, what the first copy into this arena must do: views; page-locking for a CUDA device of the state."""
        with self._lock:
            self._views.of(arena, plan)
            if device is not None:
                self._pins.pin(arena, device)

    def copy(
        self,
        flat: "Flat",
        plan: "Plan",
        arena: Arena,
        *,
        overlap: bool,
        started_s: float,
        then: Then,
        begins: Callable[[], None] | None = None,
    ) -> Copy:
        """Copy the tensors of `flat` to where `plan` has them in `arena`; `started_s` is of the same clock.

        Eager, every byte is in the arena and `then(copy)` has run when this returns. Overlapped, it returns when all that
        may change outside an optimizer's step is copied; the rest follows on the copy thread, and there `then`, which must
        be quick. A failure before it returns raises `SnapshotError`, without `then`; one behind it is `copy.error`.

        `begins` is called on the copy thread, and must not wait, if the arena's counter will tell how many of the plan's shards are
        filled: an overlapped copy of host memory on a processor that shows stores in their order.
        """
        self._refuse(flat)
        work: Work | None = None
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
                if begins is not None and not work.lanes and arena.fd is not None and shows_stores_in_order():
                    marks = partial(self._marks.of, plan, work.parts.later)
                    work.announced = Announced(self._views.counter(arena), marks, begins)
                work.watch(flat.sight, self._ahead)
                gate.enter(copy)
                self._jobs.put((copy, then))
                return copy
            copy.run_here()
        except BaseException as error:
            if work is not None:
                work.settle()
            if isinstance(error, RuntimeError | MemoryError):
                raise failure(error) from error
            raise
        then(copy)
        return copy

    def _refuse(self, flat: "Flat") -> None:
        """Raise if nothing can be copied here, or now."""
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

    def forget(self, arena: Arena) -> None:
        """Drop what is kept of an arena, so that it can be unmapped. Waits for a copy into it."""
        for copy in gate.in_flight():
            if isinstance(copy, Copy) and copy.into(arena):
                copy.wait()
        with self._lock:
            self._views.forget(arena)
            if self._forks == gate.forks:
                self._pins.unpin(arena)

    def settle(self, arena: Arena) -> None:
        """After an interrupt inside `copy()`: return when no copy into this arena is under way or will be, and `then` has run."""
        if self._stop is not None and self._stop.alive and self._forks == gate.forks:
            barrier = _Barrier()
            self._jobs.put((barrier, lambda _: None))
            barrier.reached.wait(_JOIN_S)
        for copy in gate.in_flight():
            if isinstance(copy, Copy) and copy.into(arena) and not copy.begun:  # it was never given to the thread
                gate.leave(copy)
                copy.give_up()

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
                self._pins.pin(arena, parts.lanes[0].device)
            targets = self._views.of(arena, plan)
        return Work(parts, flat.tensors, targets, arena, lanes, flat.structure.path)

    def _has_thread(self) -> bool:
        """Start it if need be; False when the process cannot have one more (limits, interpreter exit)."""
        if self._stop is None:
            find_thread_pools()
            thread = threading.Thread(target=_serve, args=(self._jobs,), name="asyncckpt-copy", daemon=True)
            stop = weakref.finalize(self, _finish, self._jobs, thread)  # also when collected, and at exit
            try:
                gate.open(thread)
                thread.start()
            except BaseException as error:
                self._jobs = (
                    queue.SimpleQueue()
                )  # an interrupt may have come when the thread ran already, and then it ends
                stop()
                if (
                    isinstance(error, RuntimeError) and error.__context__ is None
                ):  # no interrupt in the middle of start()
                    return False
                raise
            self._stop = stop
        return True


class _Barrier:
    """Takes its turn on the copy thread: all that was given to the thread before is done."""

    def __init__(self) -> None:
        self.reached = Latch()

    def run(self, _: Then) -> None:
        self.reached.set()


_Job = tuple[Copy | _Barrier, Then]


def _serve(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    """The copy thread. Holds no Copier, so that one can be collected, and no state between two copies."""
    for copy, then in iter(jobs.get, None):
        copy.run(then)
        del copy, then


def _finish(jobs: "queue.SimpleQueue[_Job | None]", thread: threading.Thread) -> None:
    try:
        jobs.put(None)
        if thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # it was never started
                thread.join(_JOIN_S)
    finally:
        gate.close(thread)
