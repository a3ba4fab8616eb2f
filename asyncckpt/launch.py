"""One save from the state to the engine: flatten, plan, take an arena, snapshot, hand over; and the answer's way back."""

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from asyncckpt import errors, events
from asyncckpt.engine.arena import Arena, ArenaPool, why_none
from asyncckpt.engine.choice import CodecChoice
from asyncckpt.engine.client import ServiceEngine
from asyncckpt.engine.crew import lacks_room
from asyncckpt.engine.inline import InlineEngine
from asyncckpt.engine.job import CommitOutcome, SaveJob
from asyncckpt.engine.submitted import Listener
from asyncckpt.flight import Flight
from asyncckpt.format.plan import Plan
from asyncckpt.lineage import Arrival
from asyncckpt.news import News
from asyncckpt.planner import Planned, Planner, room_bytes
from asyncckpt.request import SaveRequest
from asyncckpt.save import Ledger, Save, report_of
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.snapshot import Copier
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flat, Flattener
from asyncckpt.turns import Turns

Engine = ServiceEngine | InlineEngine
MakeEngine = Callable[[Listener, Callable[[], str]], Engine]


class Launcher:
    """Owns what saves need again and again: plans, arenas, the copier, the engine.

    `overlap`: None overlaps when the state holds an optimizer. `make_engine` is called at the first save, and again if it
    `falls_back` to another one when that cannot be started. `arrival`: whether this run may
    write in its folder, and its lineage.

    A signal handler may save in the middle of a call that saves. It shares the engine with the call beneath, which may have come to any point,
    and the plans; it has a flattener, a copier and an arena of its own. No thread of ours waits for a lock that the call beneath may hold.
    """

    def __init__(
        self,
        make_engine: MakeEngine,
        falls_back: Callable[[OSError], bool],
        ledger: Ledger,
        hooks: events.Hooks,
        *,
        turns: Turns,
        arrival: Arrival,
        url: str,
        choice: CodecChoice,
        pending: int,
        shared: bool,
    ) -> None:
        self._waits = True
        self._news = News(url, meanwhile=self._meanwhile, in_flight=lambda: len(self._flights))
        self.overlap: bool | None = None
        self.pending = pending
        self.arrival = arrival
        self._make_engine = make_engine
        self._falls_back = falls_back
        self._ledger = ledger
        self._hooks = hooks
        self._turns = turns
        self._choice = choice
        self._ended_s = 0.0  # when the last save had its answer
        self._run_id = secrets.token_hex(4)
        self._attempts = itertools.count(1)
        self._flattener = Flattener()
        self._copier = Copier()
        self._shared = shared
        self._arenas = ArenaPool(pending, shared=shared)
        self._planner = Planner(choice, self._forgotten)
        self._flights: dict[int, Flight] = {}
        self._engine: Engine | None = None
        self._engines: list[Engine] = []  # all that were made and not closed
        self._probed = False
        self._touching: list[threading.Thread] = []

    def launch(self, state: Mapping[str, Any], request: SaveRequest, *, started_s: float, wait: bool) -> Save | None:
        """Begin a save; None if every arena is in flight and `wait` is false. An unsupported state raises before anything starts.

        So does another run's folder, at the first save (see `Arrival`). A save within another call takes an arena beside all others, and is
        copied when this returns.
        """
        within = self._turns.within()
        launch = partial(self._launch, state, request, started_s=started_s, wait=wait and not within, within=within)
        while True:
            if wait and not within:  # outside of the turn: a signal handler that comes now saves as anybody does
                self._arenas.wait_free()  # before the state is read: other threads may change it meanwhile
            launched = self._turns.begin_save(launch)
            if launched is not None or not wait:
                return launched

    def _launch(
        self, state: Mapping[str, Any], request: SaveRequest, *, started_s: float, wait: bool, within: bool
    ) -> Save | None:
        save = self._ledger.new(request.step, started_s)
        save._launching = threading.get_ident()
        arena: Arena | None = None
        self._waits = wait
        flight: Flight | None = None
        flatten, copier = (Flattener().flatten, Copier()) if within else (self._flatten, self._copier)
        try:
            self.arrival.begin(request.step)
            if wait and not self._arenas.has_free():
                return None  # another thread was faster
            # once: a state_dict() may be a collective, and the other ranks call it once
            flat = flatten(state)
            planned = self._planner.next(flat.structure)
            if (arena := self._take(planned.plan, within=within)) is None:
                return None
            nowhere = self.arrival.admit(request.step)
            self._ledger.open(save)
            if (
                nowhere is not None
            ):  # an outage at the start ends no training: this save fails, and the next looks again
                self._release(arena)
                self._ledger.conclude(save, None, nowhere)
                return save
            engine = self._engine_started(within=within)
            begun = flight = self._flights[save._number] = Flight(save, arena, planned, request)
            overlap = flat.has_optimizer if self.overlap is None else self.overlap

            def then(copy: Copy) -> None:
                if within:
                    copier.close()
                self._staged(begun, flat, engine, copy)

            copier.copy(
                flat,
                planned.plan,
                arena,
                overlap=overlap and not within,
                started_s=started_s,
                begins=lambda: engine.announce(self._job(begun), planned.plan, arena),
                then=then,
            )
        except BaseException as error:
            self._undo(save, flight, arena, copier, error)
            raise
        finally:
            save._launching = None
        return save

    def check(self, state: Mapping[str, Any]) -> None:
        """What rank 0 does before it starts, on the other ranks: the same errors, and their part of a `state_dict()` that is a collective."""
        flatten = Flattener().flatten if self._turns.within() else self._flatten
        self._turns.begin_save(partial(flatten, state, elsewhere=True))

    def provide(self, state: Mapping[str, Any]) -> None:
        """Do ahead what a first save does: plan, start the engine, make the arenas and touch their pages in the background."""
        flat = self._flatten(state)
        planned = self._planner.next(flat.structure)
        device = next((tensor.device for tensor in flat.tensors if tensor.is_cuda), None)
        self._planner.ahead(planned.structure)
        self._engine_started(within=False)
        fresh: list[Arena] = []
        try:
            while len(fresh) < self.pending and (arena := self._take(planned.plan, within=False)) is not None:
                fresh.append(arena)
            thread = threading.Thread(
                target=_touch, args=(self._copier, planned.plan, fresh, device), name="asyncckpt-touch", daemon=True
            )
            self._touching.append(thread)
            with contextlib.suppress(RuntimeError):  # the limit of threads: the first save touches the pages
                thread.start()
        finally:
            self._keep_flights()

    @property
    def used(self) -> bool:
        """Whether it holds anything that must be ended."""
        return bool(self._engines or self._arenas.all())

    def close(self, *, wait_s: float) -> None:
        """End the engine, waiting so long at most, and free the arenas; saves without an answer are finished by the service."""
        for thread in self._touching:
            with contextlib.suppress(RuntimeError):  # an interrupt came before it was started
                thread.join()
        self.arrival.close()
        self._copier.close()
        for engine in list(self._engines):
            engine.close(wait_s=wait_s)
            self._engines.remove(engine)
        left = [flight.arena for flight in list(self._flights.values())] if not self._shared else []
        for arena in self._arenas.all():
            self._copier.forget(arena)
            if arena not in left:  # a service has a map of its own, the in-process engine reads this one
                arena.close()

    def leave_in_child(self) -> None:
        """In a forked child: let go of descriptors and maps, wait for nothing."""
        for arena in self._arenas.all():
            arena.leave_in_child()
        for engine in self._engines:
            engine.close_in_child()

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
        elif flight.blames_codec(error):
            self._choice.failed(flight.planned.plan.codec)
        self._ended_s = time.perf_counter()
        self._release(flight.arena)  # whoever waits for it chooses a codec next
        self._ledger.conclude(flight.save, report, error)

    def event(self, event: events.Event) -> None:
        """Something worth knowing happened."""
        news = self._news.told(event)
        if news is not None:
            self._hooks(news)

    def _meanwhile(self) -> str:
        """What training does in an outage."""
        busy = self._arenas.in_flight
        if busy < self.pending:
            return "training goes on"
        waits = "save() waits" if self._waits else "save() stores nothing"
        return f"{waits}: {busy} of {self.pending} snapshots in flight"

    # -- inside

    def _undo(
        self, save: Save, flight: Flight | None, arena: Arena | None, copier: Copier, error: BaseException
    ) -> None:
        """A save did not come to be: refused, or interrupted at any moment."""
        if arena is not None:
            copier.settle(arena)  # an interrupt may leave a copy in flight, or on its way to the engine
        if copier is not self._copier:
            copier.close()
        if flight is None or flight.claim("caller"):  # an interrupt may come when the engine reads the arena already
            self._flights.pop(save._number, None)
            self._ledger.forget(save, error)
            if arena is not None:
                self._release(arena)
        if copier is self._copier:
            self._keep_flights()

    def _keep_flights(self) -> None:
        """Every other arena is free."""
        self._arenas.keep_only([flight.arena for flight in list(self._flights.values())])

    def _flatten(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> Flat:
        try:
            return self._flattener.flatten(state, elsewhere=elsewhere)
        except BaseException:
            self._flattener = Flattener()  # an interrupt may have come when it knew one half
            raise

    def _release(self, arena: Arena) -> None:
        """Nobody uses it any more."""
        if not self._arenas.is_extra(arena):
            self._arenas.give_back(arena)
            return
        for engine in list(self._engines):
            engine.forget_arena(arena)
        self._arenas.close_extra(arena)

    def _staged(self, flight: Flight, flat: Flat, engine: Engine, copy: Copy) -> None:
        """On the copy thread, or inside `copy()` when nothing was overlapped."""
        flight.copy = copy
        if copy.begun:
            self._hand_over(flight, flat, engine, copy)
        else:
            if copy.error is None:
                flight.save._staged.set()
            engine.call(lambda: self._hand_over(flight, flat, engine, copy))

    def _hand_over(self, flight: Flight, flat: Flat, engine: Engine, copy: Copy) -> None:
        """Where no signal handler comes: an answer must follow, and the locks are those of the engine's threads."""
        if not flight.claim("engine"):
            return
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

    def _engine_started(self, *, within: bool) -> Engine:
        engine = self._engine
        if engine is not None and engine.broken:
            self._engine = None
            if not within:  # a call beneath may be about to use it
                self._end(engine)
        if self._engine is not None:
            return self._engine
        made = self._make_engine(self, self._next_attempt)
        self._engines.append(made)
        try:
            made.start()
        except BaseException as error:
            self._end(made)
            if isinstance(error, OSError) and self._falls_back(error):
                return self._engine_started(within=within)
            if (
                isinstance(error, OSError | RuntimeError) and error.__context__ is None
            ):  # and no interrupt in the middle of a start
                way_out = (
                    "; raise the limit of processes and threads (ulimit -u, pids.max)" if lacks_room(error) else ""
                )
                raise errors.CheckpointError(f"the checkpoint engine could not be started: {error}{way_out}") from error
            raise
        if (engine := self._engine) is None:
            engine = self._engine = made
        else:  # a save in a signal handler has started one meanwhile
            self._end(made)
        return engine

    def _end(self, engine: Engine) -> None:
        engine.close(wait_s=0)
        self._engines.remove(engine)

    def _next_attempt(self) -> str:
        return f"{self._run_id}-{next(self._attempts):06d}"

    def _job(self, flight: Flight) -> SaveJob:
        if flight.job is None:
            flight.job = flight.new_job(self._next_attempt(), self.arrival, probe=not self._probed)
        return flight.job

    def _forgotten(self, planned: Planned) -> None:
        if all(flight.planned is not planned for flight in list(self._flights.values())):
            for engine in list(self._engines):
                engine.forget_structure(planned.number)

    def _take(self, layout: Plan, *, within: bool) -> Arena | None:
        try:
            if within:
                return self._arenas.one_more(layout.arena_bytes)
            taken = self._arenas.take(layout.arena_bytes, make_bytes=room_bytes(layout))
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise errors.SnapshotError(why_none(layout.arena_bytes, error)) from error
        if taken is None:
            return None
        arena, replaced = taken
        for old in replaced:
            self._copier.forget(old)
            for engine in list(self._engines):
                engine.forget_arena(old)
            old.close()
        return arena


def _touch(copier: Copier, layout: Plan, arenas: list[Arena], device: torch.device | None) -> None:
    for arena in arenas:
        arena.touch()
        with contextlib.suppress(ValueError):  # closed meanwhile: a larger state took its place
            copier.prepare(layout, arena, device)
