"""One save from the state to the engine: flatten, plan, take an arena, snapshot, hand over; and the answer's way back."""

import contextlib
import errno
import functools
import itertools
import logging
import platform
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import asyncckpt
from asyncckpt import errors, events
from asyncckpt.engine.arena import Arena, ArenaPool, why_none
from asyncckpt.engine.choice import CodecChoice
from asyncckpt.engine.client import ServiceEngine
from asyncckpt.engine.inline import InlineEngine
from asyncckpt.engine.job import CommitOutcome, SaveJob
from asyncckpt.engine.submitted import Listener
from asyncckpt.format.plan import Plan
from asyncckpt.lineage import Arrival
from asyncckpt.planner import Planned, Planner, room_bytes
from asyncckpt.request import SaveRequest
from asyncckpt.save import Ledger, Save, report_of
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.ranks import world_size
from asyncckpt.state.snapshot import Copier
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flat, Flattener

_LOG = logging.getLogger("asyncckpt")
_TOLD_STEPS = 10  # of a warning about thousands

Engine = ServiceEngine | InlineEngine
StartEngine = Callable[[Listener, Callable[[], str]], Engine]


@dataclass(slots=True)
class _Flight:
    save: Save
    arena: Arena
    planned: Planned
    request: SaveRequest
    copy: Copy | None = None
    job: SaveJob | None = None


class Launcher:
    """Owns what saves need again and again: plans, arenas, the copier, the engine.

    `overlap`: None overlaps when the state holds an optimizer. `start_engine` is called at the first save. `arrival`: whether this run may
    write in its folder, and its lineage.
    """

    def __init__(
        self,
        start_engine: StartEngine,
        ledger: Ledger,
        hooks: events.Hooks,
        arrival: Arrival,
        *,
        choice: CodecChoice,
        pending: int,
        shared: bool,
    ) -> None:
        self.overlap: bool | None = None
        self.pending = pending
        self.arrival = arrival
        self._start_engine = start_engine
        self._ledger = ledger
        self._hooks = hooks
        self._choice = choice
        self._ended_s = 0.0  # when the last save had its answer
        self._run_id = secrets.token_hex(4)
        self._attempts = itertools.count(1)
        self._flattener = Flattener()
        self._copier = Copier()
        self._arenas = ArenaPool(pending, shared=shared)
        self._planner = Planner(choice, self._forgotten)
        self._flights: dict[int, _Flight] = {}
        self._engine: Engine | None = None
        self._probed = False
        self._foreign: set[int] = set()
        self._told_causes: set[tuple[type, type, tuple[int, ...]]] = set()
        self._touching: list[threading.Thread] = []

    def launch(self, state: Mapping[str, Any], request: SaveRequest, *, started_s: float, wait: bool) -> Save | None:
        """Begin a save; None if every arena is in flight and `wait` is false. An unsupported state raises before anything starts.

        So does another run's folder, at the first save (see `Arrival`).
        """
        save = self._ledger.new(request.step, started_s)
        arena: Arena | None = None
        try:
            self.arrival.begin(request.step)
            if wait:
                self._arenas.wait_free()  # before the state is read: other threads may change it meanwhile
            # once: a state_dict() may be a collective, and the other ranks call it once
            flat = self._flattener.flatten(state)
            planned = self._planner.next(flat.structure)
            if (arena := self._take(planned.plan)) is None:
                return None
            self.arrival.admit(request.step)
            self._ledger.open(save)
            engine = self._engine_started()
            flight = self._flights[save._number] = _Flight(save, arena, planned, request)
            self._copier.copy(
                flat,
                planned.plan,
                arena,
                overlap=flat.has_optimizer if self.overlap is None else self.overlap,
                started_s=started_s,
                begins=lambda: engine.announce(self._job(flight), planned.plan, arena),
                then=lambda copy: self._staged(flight, flat, engine, copy),
            )
        except BaseException as error:
            self._undo(save, arena, error)
            raise
        return save

    def check(self, state: Mapping[str, Any]) -> None:
        """What rank 0 does before it starts, on the other ranks: the same errors, and their part of a `state_dict()` that is a collective."""
        self._flattener.flatten(state, elsewhere=True)

    def provide(self, state: Mapping[str, Any]) -> None:
        """Do ahead what a first save does: plan, start the engine, make the arenas and touch their pages in the background."""
        flat = self._flattener.flatten(state)
        planned = self._planner.next(flat.structure)
        device = next((tensor.device for tensor in flat.tensors if tensor.is_cuda), None)
        self._planner.ahead(planned.structure)
        self._engine_started()
        fresh: list[Arena] = []
        while len(fresh) < self.pending and (arena := self._take(planned.plan)) is not None:
            fresh.append(arena)
        thread = threading.Thread(
            target=_touch, args=(self._copier, planned.plan, fresh, device), name="asyncckpt-touch", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # the limit of threads: the first save touches the pages
            thread.start()
            self._touching.append(thread)
        for arena in fresh:
            self._arenas.give_back(arena)

    @property
    def used(self) -> bool:
        """Whether it holds anything that must be ended."""
        return self._engine is not None or bool(self._arenas.all())

    def close(self, *, wait: bool) -> None:
        """End the engine and free the arenas; saves without an answer are finished by the service."""
        for thread in self._touching:
            thread.join()
        self.arrival.close(wait=wait)
        self._copier.close()
        if self._engine is not None:
            self._engine.close(wait=wait)
        for arena in self._arenas.all():
            self._copier.forget(arena)
            arena.close()

    def leave_in_child(self) -> None:
        """In a forked child: let go of descriptors and maps, wait for nothing."""
        for arena in self._arenas.all():
            arena.leave_in_child()
        if self._engine is not None:
            self._engine.close_in_child()

    # -- the engine's answers, on its thread

    def ended(self, number: int, outcome: CommitOutcome | None, error: BaseException | None) -> None:
        """A save has its answer."""
        flight = self._flights.pop(number, None)
        if flight is None:
            return
        report = None
        if outcome is not None and outcome.result == "exists" and flight.request.on_exists == "raise":
            error = errors.CheckpointConflictError(
                "the step exists already, written by another attempt", step=flight.save.step
            )
        elif outcome is not None:
            report = report_of(flight.save, flight.copy, outcome)
            if outcome.result == "committed":
                self._probed = True
                self.arrival.committed()
                since_s = max(flight.save._started_s, self._ended_s)
                self._choice.learn(flight.planned.plan.codec, report.raw_bytes, time.perf_counter() - since_s)
        elif _blames_codec(flight, error):
            self._choice.failed(flight.planned.plan.codec)
        self._ended_s = time.perf_counter()
        self._arenas.give_back(flight.arena)  # whoever waits for it chooses a codec next
        self._ledger.conclude(flight.save, report, error)

    def event(self, event: events.Event) -> None:
        """Something worth knowing happened."""
        if isinstance(event, events.ForeignCheckpoints):
            event = self._new_foreign(event)
            if not event.steps:
                return
            _LOG.warning(
                "retention leaves checkpoints of another run alone, at step(s) %s: this run did not restore them. "
                "Delete them by hand, or with Run(url).rewind(step), if nobody needs them",
                ", ".join(map(str, event.steps)),
            )
        if isinstance(event, events.RetentionFailed | events.LeftoversRemain) and self._is_new_cause(event):
            _LOG.warning("%s", _warning_of(event))
        self._hooks(event)

    def _is_new_cause(self, event: events.RetentionFailed | events.LeftoversRemain) -> bool:
        """Once for each kind of a store's failure, and once for each record that cannot be read."""
        steps = event.steps if isinstance(event, events.RetentionFailed) else ()
        cause = (type(event), type(event.error), () if isinstance(event.error, errors.StoreError) else steps)
        is_new = cause not in self._told_causes
        self._told_causes.add(cause)
        return is_new

    def _new_foreign(self, event: events.ForeignCheckpoints) -> events.ForeignCheckpoints:
        """What no other worker told before."""
        steps = tuple(step for step in event.steps if step not in self._foreign)
        self._foreign.update(steps)
        return events.ForeignCheckpoints(steps)

    # -- inside

    def _undo(self, save: Save, arena: Arena | None, error: BaseException) -> None:
        """A save did not come to be: refused, or interrupted at any moment."""
        if arena is not None:
            self._copier.settle(arena)  # an interrupt may leave a copy in flight, or on its way to the engine
        handed_over = self._engine is not None and self._engine.holds(save._number)
        if not handed_over and not save.done():  # an interrupt may come when the engine reads the arena already
            self._flights.pop(save._number, None)
            self._ledger.forget(save, error)
        self._arenas.keep_only([flight.arena for flight in list(self._flights.values())])

    def _staged(self, flight: _Flight, flat: Flat, engine: Engine, copy: Copy) -> None:
        # on the copy thread, or inside copy() when nothing was overlapped
        flight.copy = copy
        number = flight.save._number
        if copy.error is not None:
            if isinstance(copy.error, errors.TornSnapshotError):
                self.overlap = (
                    False  # somebody writes behind the optimizer: from now on save() returns with the copy complete
                )
            flight.save._torn(copy.error)
            engine.withdraw(number, copy.error)
            return
        try:
            engine.submit(self._job(flight), flight.planned.plan, flight.arena, write_state(flat.values))
        except errors.CheckpointError as error:
            self.ended(number, None, error)
            return
        except Exception as error:  # noqa: BLE001 - it is this save's failure
            failure = errors.CheckpointError(f"the save could not be handed over: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.ended(number, None, failure)
            return
        flight.save._staged.set()
        self._hooks(events.SaveStaged(flight.save.step, copy.staged_s))
        self._planner.ahead(flight.planned.structure)

    def _engine_started(self) -> Engine:
        if self._engine is not None and self._engine.broken:
            self._engine.close(wait=False)
            self._engine = None
        if self._engine is None:
            try:
                self._engine = self._start_engine(self, self._next_attempt)
            except (OSError, RuntimeError) as error:
                way_out = (
                    "; raise the limit of processes and threads (ulimit -u, pids.max)" if _lacks_room(error) else ""
                )
                raise errors.CheckpointError(f"the checkpoint engine could not be started: {error}{way_out}") from error
        return self._engine

    def _next_attempt(self) -> str:
        return f"{self._run_id}-{next(self._attempts):06d}"

    def _job(self, flight: _Flight) -> SaveJob:
        if flight.job is None:
            flight.job = self._new_job(flight)
        return flight.job

    def _new_job(self, flight: _Flight) -> SaveJob:
        request, planned, arena = flight.request, flight.planned, flight.arena
        return SaveJob(
            number=flight.save._number,
            step=request.step,
            attempt=self._next_attempt(),
            structure=planned.number,
            arena=arena.number,
            codec=planned.plan.codec,
            time_s=time.time(),
            epoch=request.epoch,
            metrics=dict(request.metrics),
            config=request.config.value,
            tags=tuple(request.tags),
            pinned=request.pinned,
            versions=_versions(),
            world_size=world_size(),
            lineage=self.arrival.lineage,
            on_exists=request.on_exists,
            probe=not self._probed,
            newcomer=self.arrival.newcomer,
            restored=self.arrival.restored,
        )

    def _forgotten(self, planned: Planned) -> None:
        if self._engine is not None and all(flight.planned is not planned for flight in list(self._flights.values())):
            self._engine.forget_structure(planned.number)

    def _take(self, layout: Plan) -> Arena | None:
        try:
            taken = self._arenas.take(layout.arena_bytes, make_bytes=room_bytes(layout))
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise errors.SnapshotError(why_none(layout.arena_bytes, error)) from error
        if taken is None:
            return None
        arena, replaced = taken
        for old in replaced:
            self._copier.forget(old)
            if self._engine is not None:
                self._engine.forget_arena(old)
            old.close()
        return arena


def _warning_of(event: events.RetentionFailed | events.LeftoversRemain) -> str:
    why = f"{type(event.error).__name__}: {event.error}"
    if isinstance(event, events.LeftoversRemain):
        return f"what failed saves or dead writers left could not be removed; a later run tries again. {why}"
    if not event.steps:
        return (
            f"retention could not look at the checkpoints, removes nothing, and tries again after the next save. {why}"
        )
    told = ", ".join(map(str, event.steps[:_TOLD_STEPS])) + (", ..." if len(event.steps) > _TOLD_STEPS else "")
    return f"retention leaves step(s) {told} in place, and goes on with the others. It says so once. {why}"


def _lacks_room(error: Exception) -> bool:
    """Whether the system has no thread or process left for us: Python raises a RuntimeError where no thread starts."""
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno == errno.EAGAIN)


def _blames_codec(flight: _Flight, error: BaseException | None) -> bool:
    """Whether a save that was staged failed on its way, and not because its step was taken."""
    staged = flight.copy is not None and flight.copy.error is None
    return staged and error is not None and not isinstance(error, errors.CheckpointConflictError)


def _touch(copier: Copier, layout: Plan, arenas: list[Arena], device: torch.device | None) -> None:
    for arena in arenas:
        arena.touch()
        with contextlib.suppress(ValueError):  # closed meanwhile: a larger state took its place
            copier.prepare(layout, arena, device)


@functools.cache
def _versions() -> dict[str, str]:
    return {"asyncckpt": asyncckpt.__version__, "torch": torch.__version__, "python": platform.python_version()}
