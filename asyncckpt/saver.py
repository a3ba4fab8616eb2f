"""The front door to saving: `Saver`.

`save()` flattens the state, takes an arena, snapshots into it and returns; the engine does the rest in the background.
"""

import atexit
import logging
import math
import os
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from asyncckpt import dropped, errors, events, progress
from asyncckpt.backing import Backing
from asyncckpt.engine.alone import tell_notices
from asyncckpt.engine.catalog import find_checkpoints
from asyncckpt.engine.choice import CodecChoice, usual_codec
from asyncckpt.engine.spawn import EngineOptions, default_workers
from asyncckpt.events import SaveReport
from asyncckpt.launch import Launcher
from asyncckpt.lineage import Arrival, root_of
from asyncckpt.options import (
    Codec,
    EngineName,
    KeepRule,
    OnExists,
    S3Options,
    StepChoice,
    WhenFull,
    check_choices,
    check_rules,
)
from asyncckpt.request import Config, SaveRequest
from asyncckpt.restore import Restored, restore_from, set_aside, take_back
from asyncckpt.save import Ledger, Save
from asyncckpt.state import replicas
from asyncckpt.state.batches import begin, has_place
from asyncckpt.state.ranks import rank
from asyncckpt.state.rng import RNG
from asyncckpt.store.base import Store
from asyncckpt.store.opening import parse_url
from asyncckpt.telling import warn
from asyncckpt.turns import Turns

T = TypeVar("T")

_LOG = logging.getLogger("asyncckpt")
_savers: "weakref.WeakSet[Saver]" = weakref.WeakSet()  # those that are not closed


class Saver:
    """Checkpoints of one training run, below one URL.

    Args:
        url: `s3://bucket/prefix`, `file:///path`, a plain path, or `memory://name`.
        keep: Rules of retention (`KeepLast`, `KeepEvery`); a checkpoint stays if any rule keeps it. Empty keeps all.
        codec: `"planes"` (byte planes and zstd), `"zstd"`, `"none"`, or `"auto"`: planes or none, whichever makes saves durable sooner
            at this store, by what they took; it begins with planes on S3 and with none in a folder.
        workers: Worker processes; default: the usable cores over `LOCAL_WORLD_SIZE`, at most 8.
        overlap: Whether `save()` may return while optimizer-owned tensors are still copied; `optimizer.step()` then waits for the copy.
            None: yes when the state holds an optimizer. It notices most, but not all, other writers (a write that restores both the
            version and the sampled word of every tensor goes unseen): a loop that changes parameters without an optimizer either says
            `overlap=False` or calls `wait_staged()` first.
        pending: How many snapshots may be in flight; each takes host memory of one state.
        when_full: What `save()` does when all are in flight: `"wait"`, `"skip"` (counted and reported) or `"raise"` (`QueueFullError`).
        on_exists: A step that is committed already: `"skip"` (reported) or `"raise"` (`CheckpointConflictError`).
        adopt: Whether to go on with whatever checkpoints the folder holds, as if this run had restored the newest of them. Otherwise the first
            `save()` below checkpoints of another run, or of a branch that was left, raises, and retention leaves other runs' alone.
        max_failed_saves: So many failed saves in a row make `save()` raise; None never does.
        config: JSON-able description of the run, kept in every record.
        store: `S3Options`, or a Store of your own (then the engine is in-process).
        engine: `"service"` (a process that outlives this one) or `"inline"`; None chooses the service where it can run.
        hooks: Called with every event, see `asyncckpt.events`.

    A Saver belongs to one process and may be used from several threads. A signal handler may save, wait and close at any moment; within
    `save()` that takes host memory of one more state. With `torch.distributed` initialised, rank 0 writes
    the replicated state; call `save()` on every rank, so that all are told alike what cannot be stored. On the others it checks the
    state and returns. One that nobody holds any more, as when a notebook's cell is run again, finishes its saves and ends its service.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: Sequence[KeepRule] = (),
        codec: Codec = "auto",
        workers: int | None = None,
        overlap: bool | None = None,
        pending: int = 1,
        when_full: WhenFull = "wait",
        on_exists: OnExists = "skip",
        adopt: bool = False,
        max_failed_saves: int | None = None,
        config: Any = None,
        store: S3Options | Store | None = None,
        engine: EngineName | None = None,
        hooks: Sequence[events.Hook] = (),
    ) -> None:
        check_choices(codec=codec, when_full=when_full, on_exists=on_exists, engine=engine)
        if pending < 1 or (workers is not None and workers < 1):
            raise ValueError("pending and workers are at least 1")
        check_rules(keep)
        if store is not None and not isinstance(store, S3Options | Store):
            raise TypeError(f"store is asyncckpt.S3Options(...) or a Store, not {type(store).__name__}")
        self.url = os.fspath(url) if isinstance(store, Store) else str(parse_url(url))
        self._root = root_of(self.url, store)
        self._when_full = when_full
        self._on_exists: OnExists = on_exists
        self._config = Config.of(config)
        self._hooks = events.Hooks(tuple(hooks))
        self._keep = tuple(keep)
        self._workers = workers or default_workers()
        self._backing = Backing(self.url, store, self._keep, self._hooks, engine)
        self._store = self._backing.store
        self._pid = os.getpid()
        self._turns = Turns()
        self._ledger = Ledger(self._hooks, max_failed_saves)
        options = self._engine_options()
        self._launcher = Launcher(
            partial(self._backing.make, options),
            self._backing.falls_back,
            self._ledger,
            self._hooks,
            turns=self._turns,
            arrival=Arrival(
                self._root, self._backing.opened_to_look, adopt=adopt, wait_s=self._backing.retry.first_contact_s
            ),
            url=self.url,
            choice=CodecChoice(codec, usual_codec(self._store)),
            pending=pending,
            shared=self._engine_name == "service",
        )
        self._backing.listener = self._launcher
        self._launcher.overlap = overlap
        self._restored: list[RNG] = []  # until the next `batches()`
        self._ended = False  # closed, and nothing is left
        self._finalizer = weakref.finalize(self, dropped.Dropped(self._launcher, self._ledger, self._backing).begin)
        self._finalizer.atexit = False
        _savers.add(self)
        if rank() == 0:
            tell_notices(options.notices, options.place)

    # -- saving

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        epoch: int | None = None,
        tags: Sequence[str] = (),
        pin: bool = False,
    ) -> Save:
        """Save `state` as checkpoint `step` (optimizer steps completed) in the background.

        Returns at once when the state holds optimizers and overlap is on; what an optimizer owns may then not be changed but
        by its `step()`, until `wait_staged()`. Otherwise returns when the snapshot is complete. Blocks, too, while all arenas
        are in flight (`when_full="wait"`). `metrics`: numbers by name, for `Best`. `pin`: retention never removes it.

        Raises `UnsupportedTensorError` and `UnsupportedObjectError` with the path before anything starts, also for what each of several
        ranks has of its own (`RNG`, loaders, samplers: see `Replicated`), `QueueFullError` with `when_full="raise"`, and never the failure
        of an earlier save, of which it warns. The first save, also after a restore of a step below the newest, raises
        `CheckpointConflictError` if checkpoints that this run does not go on from stand above `step`; it waits for one listing of the
        folder, at most `RetryPolicy.first_contact_s` (without an answer the service looks, and it is that save's failure).
        """
        started_s = time.perf_counter()
        self._check_usable()
        request = SaveRequest(step, metrics or {}, epoch, tags, pin, self._on_exists, self._config)
        self._ledger.report_earlier(step)
        replicas.check(state, "save")
        if rank() != 0:
            self._in_turn(partial(self._launcher.check, state))
            save = Save(step, 0, started_s)
            save._conclude(SaveReport(step, skipped="rank 0 writes replicated state"), None)
            return save
        wait = self._when_full == "wait"
        launched = self._in_turn(partial(self._launcher.launch, state, request, started_s=started_s, wait=wait))
        if launched is None:
            return self._full(step, started_s)
        launched._call_s = time.perf_counter() - started_s
        return launched

    def wait(self, timeout: float | None = None) -> None:
        """The barrier: every save so far is committed or was skipped, or `SaveFailedError` says which is not, and why.

        `TimeoutError` after `timeout` seconds; the saves go on. Shows a progress bar on a terminal.
        """
        self._check_usable()
        with progress.saving(self._ledger, self._hooks):
            self._ledger.wait(timeout)

    def wait_staged(self, timeout: float | None = None) -> None:
        """Wait until every snapshot is complete: afterwards the state may be changed in any way."""
        self._check_usable()
        self._ledger.wait_staged(timeout)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Do ahead what the first save would do: check and plan the state, start the service, make and touch the arenas.

        Optional; returns before the pages are touched. Call it when the optimizer holds its state already (or after the first step).
        """
        self._check_usable()
        replicas.check(state, "save")
        provide = self._launcher.provide if rank() == 0 else self._launcher.check
        self._in_turn(partial(self._turns.prepare, partial(provide, state)))

    # -- restoring

    def restore(self, state: Mapping[str, Any], *, step: StepChoice = "latest", strict: bool = True) -> Restored | None:
        """Load a checkpoint into the objects of `state`, in place and verified; None if there is none at all yet.

        All or nothing: names, shapes, dtypes and every digest are checked before a value is changed (see `asyncckpt.restore`). A damaged `latest` is set aside
        with a warning and the one before is taken; a step asked for by number raises. After restoring a step below the newest, the next save
        below that raises `CheckpointConflictError`, or `latest` would go on being the branch that was left; `Run.rewind` takes the newer
        ones away.
        """
        self._check_usable()
        return self._in_turn(partial(self._turns.restore, partial(self._restore, state, step, strict=strict)))

    def _restore(self, state: Mapping[str, Any], step: StepChoice, *, strict: bool) -> Restored | None:
        found = restore_from(
            self._store, state, url=self.url, step=step, strict=strict, hooks=self._hooks, root=self._root
        )
        restored = found.restored
        if restored is None:
            return None
        self._restored = replicas.generators(state)
        if rank() == 0:
            set_aside(self._store, found.damaged, restored=restored.step)
        there = find_checkpoints(self._store)
        if rank() == 0 and found.whole and restored.step in there.marked:
            take_back(self._store, restored.step)
        newest = max(set(there.good).difference(found.damaged), default=-1)
        self._launcher.arrival.resume(restored.step, newest=newest)
        if newest > restored.step:
            self._on_exists = "raise"
        return restored

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """`iter(loader)`, with the random numbers of the checkpoint: `for batch in saver.batches(loader)`.

        `iter()` of a torch DataLoader draws from torch's generator. So the first call after a `restore()` whose state holds an `RNG` puts the
        generators back: behind that draw if the checkpoint was saved within an epoch, before it if it was saved between two (and the loader
        does not restore its own place). The checkpoint knows that if the run that saved it used `batches()`, too. A resumed run is then exact
        with `num_workers=0`, and with workers that draw nothing. Warns where `iter(loader)` is a generator (accelerate's loaders): it draws
        later, with the first batch.
        """
        self._check_usable()
        restored, self._restored = self._restored, []
        before = all(generators.between_epochs for generators in restored) and not has_place(loader)
        if before:
            for generators in restored:
                generators.restore_again()
        batches = begin(loader)
        if restored and not before and isinstance(batches.iterator, types.GeneratorType):
            warn(
                f"iter() of a {type(loader).__name__} is a generator, which draws its random numbers with the first batch: the resumed run "
                "will not repeat the uninterrupted one exactly. Give saver.batches() the loader that it wraps",
                UserWarning,
                stacklevel=2,
            )
        for generators in restored if not before else ():
            generators.restore_again()
        return batches

    # -- the end

    def close(self, timeout: float | None = None) -> None:
        """Wait for every save, end the service, free the arenas. Raises `SaveFailedError` for failures not raised before.

        Where the store is away, saves fail at `RetryPolicy.deadline_s`, and this returns within two seconds: the service removes what they
        stored. `TimeoutError` after `timeout` seconds: the Saver is closed too, and the service finishes the saves.
        """
        self._check_process()
        if self._ended or self._turns.is_ending():
            return
        if self._turns.within():
            self._turns.closed = self._turns.owed = True
            self._ledger.wait(timeout)
            return
        end_s = math.inf if timeout is None else time.monotonic() + timeout
        try:
            if self._turns.closed:  # within a call that is over now, or by a close() that was interrupted
                self._ledger.wait(timeout)
            else:
                self.wait(timeout)
        except TimeoutError:
            self._leave(finish=False)
            raise
        except Exception:
            self._shut(wait_s=end_s - time.monotonic())
            raise
        except BaseException:  # Ctrl-C: whoever is in a hurry does not wait for a slow store
            self._leave()
            raise
        self._shut(wait_s=end_s - time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid or self._ended:
            return
        if kind is None:
            self.close()
            return
        # the body failed: its error matters more. What was saved is handed over; the service goes on without us.
        self._leave()

    def __reduce__(self) -> Any:
        raise TypeError("a Saver belongs to one process and cannot be pickled; make another from its url")

    @property
    def skipped_saves(self) -> int:
        """How many saves stored nothing, because the step existed or the queue was full."""
        return self._ledger.skipped_saves

    # -- inside

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise errors.ForkedSaverError("a Saver belongs to the process that made it; make another in the child")

    def _check_usable(self) -> None:
        self._check_process()
        self._turns.check()

    def _in_turn(self, act: Callable[[], T]) -> T:
        return self._turns.finish(act, end=self.close, leave=self._leave)

    def _full(self, step: int, started_s: float) -> Save:
        reason = f"all {self._launcher.pending} snapshot(s) are in flight"
        if self._when_full == "raise":
            raise errors.QueueFullError(reason, step=step)
        save = self._ledger.new(step, started_s)
        self._ledger.conclude(save, SaveReport(step, skipped=f'{reason} and when_full="skip"'), None)
        return save

    @property
    def _engine_name(self) -> EngineName:
        return self._backing.engine_name

    def _engine_options(self) -> EngineOptions:
        return EngineOptions(self.url, self._backing.s3, self._workers, self._keep)

    def _leave(self, *, finish: bool = True) -> None:
        """Hand over what is staged and go; the in-process engine must `finish` first, where this process may end."""
        for save in self._ledger.underway():
            save._staged.wait()
        if self._engine_name == "inline":
            for save in self._ledger.underway() if finish else ():
                save._ended.wait()
        elif in_flight := self._ledger.in_flight:
            steps = ", ".join(str(save.step) for save in in_flight)
            _LOG.warning("leaving while step(s) %s are on their way; the checkpoint service finishes them", steps)
        self._shut(wait_s=math.inf if finish and self._engine_name == "inline" else 0.0)
        for save in self._ledger.in_flight:
            reason = "the Saver was left while this save was on its way; the checkpoint service finishes it"
            self._ledger.forget(save, errors.CheckpointError(reason, step=save.step))

    def _shut(self, *, wait_s: float) -> None:
        with self._turns.ending:
            self._turns.closed = True
            self._launcher.close(wait_s=wait_s)
            self._backing.close()
            self._ended = True
            _savers.discard(self)
            self._finalizer.detach()


def _forked() -> None:
    for saver in list(_savers):
        saver._launcher.leave_in_child()
    dropped.leave_dropped_in_child()


def _drain_at_exit() -> None:
    for saver in list(_savers):
        if saver._pid == os.getpid() and not saver._ended and saver._launcher.used:
            saver._leave()
    dropped.hand_over_dropped()


os.register_at_fork(after_in_child=_forked)
atexit.register(_drain_at_exit)
