"""One round of one system: a quiet window, a plain copy, then saves beside the loop, each restored and compared afterwards."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.loops import Loop, Window, no_barrier, quiet
from benchmarks.measure import Observed, Observer
from benchmarks.peers.base import Peer, Saving
from benchmarks.scenarios.base import Run, System, Verifier
from benchmarks.scenarios.goals import OURS
from benchmarks.scenarios.samples import Round, Save
from benchmarks.scenarios.wire import plain_s, put_cpu_s
from benchmarks.states import State, poke
from benchmarks.stores.s3 import SinkStore

WINDOW_SAVES = 4  # what the fastest makes in a window; none is deleted before its end
QUIET_S = 2.0
SAVING_S = 2.0
CACHES_S = 0.2  # of the loop again, so that a save meets its caches and not those of who touched memory


@dataclass(slots=True)
class Bench:
    """What all systems of a comparison share. `undisturbed`: the loop before any system was opened."""

    state: State
    loop: Loop
    verifier: Verifier | None
    undisturbed: Window | None = None
    steps: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    ends: list[torch.Tensor] = field(init=False)
    marks: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(1, 200)))  # exact in every dtype

    def __post_init__(self) -> None:
        self.ends = self.state.ends()

    @property
    def idle(self) -> bool:
        """Does the main thread do nothing?"""
        return self.loop.name == "idle"

    def mark(self) -> int:
        """Make the state differ from what it was; the mark by which `poke` makes it the same again."""
        mark = next(self.marks)
        poke(self.ends, mark)
        return mark

    @contextlib.contextmanager
    def written_when_staged(self, marks: list[int]) -> Iterator[None]:
        """While this lasts the state changes whenever a system says that its snapshot is complete; each change is added to `marks`."""
        Saving.on_staged = lambda: marks.append(self.mark())
        try:
            yield
        finally:
            Saving.on_staged = None


@dataclass(frozen=True, slots=True)
class _Before:
    """The window in which nothing was saved, and a plain copy of the state beside the loop."""

    window: Window
    copy_s: float | None
    foreign_cores: float


@dataclass(frozen=True, slots=True)
class _Saved:
    """The saves of a window, durable, none of them looked at. `marks`: by which each one's bytes are made again."""

    savings: list[Saving]
    waits_s: list[float]
    marks: list[int]
    window: Window
    observed: Observed
    requests: int


def one_round(system: System, bench: Bench, context: Run, *, counted: bool) -> Round:
    """A window in which nothing is saved (beside a busy loop), then saves: one, or whole ones back to back for at least two seconds."""
    before = _quiet(bench, context, counted=counted)
    around = Observer()
    saved = _saved(system, bench, whole_window=counted and not bench.idle)
    connections = system.most_connections
    saves = tuple(_compared(system.peer, bench, saved))
    served = counted and bench.verifier and isinstance(system.store, SinkStore)
    plain = plain_s(system.store, saves[0].stored_bytes) if served else None
    puts = put_cpu_s(system.store, saves[0].stored_bytes) if served and system.peer.name.startswith(OURS) else None
    undisturbed, window = bench.undisturbed, saved.window
    speed = None if bench.idle or not counted else window.per_s / (undisturbed or before.window).per_s
    return Round(
        saves=saves,
        foreign_cores=max(before.foreign_cores, saved.observed.foreign_cores, around.stop().foreign_cores),
        copy_s=before.copy_s,
        cpu_s=saved.observed.cpu_s if bench.idle else None,
        requests=saved.requests,
        connections=connections or None,
        plain_put_s=plain[0] if plain else None,
        plain_get_s=plain[1] if plain else None,
        put_cpu_s_per_gb=puts / saves[0].stored_bytes * 1e9 if puts else None,
        speed=speed,
        quiet_speed=before.window.per_s / undisturbed.per_s if undisturbed and counted else None,
        lost_s=None if speed is None else (1 - speed) * window.elapsed_s / len(saves),
        gap_s=None if bench.idle else window.longest_gap_s,
        quiet_gap_s=None if bench.idle else before.window.longest_gap_s,
        series_name="iterations_per_s" if bench.loop.long else "iterations_per_50ms",
        quiet_series=[] if bench.idle else before.window.series(),
        series=[] if bench.idle else window.series(),
    )


def _quiet(bench: Bench, context: Run, *, counted: bool) -> _Before:
    """Everything ahead of the first save; beside a busy loop memory is warmed last: two seconds later the host has taken it back."""
    watched = counted and not bench.idle
    if not watched:
        context.warm(bench.state)
    bench.state.advance()
    observer = Observer()
    window = quiet(bench.loop, QUIET_S if watched else 0.0)
    copy_s = _copied_beside(bench.loop, bench.verifier) if bench.verifier and counted else None
    foreign_cores = observer.stop().foreign_cores
    if watched:
        context.warm(bench.state, WINDOW_SAVES)
        quiet(bench.loop, CACHES_S)
    return _Before(window, copy_s, foreign_cores)


def _saved(system: System, bench: Bench, *, whole_window: bool) -> _Saved:
    peer = system.peer
    requests = system.store.requests()
    observer = Observer(system.servers)
    window, waits = Window(), Waits()
    savings: list[Saving] = []
    marks = [bench.mark()]
    while not savings or (whole_window and window.elapsed_s < SAVING_S):
        with bench.written_when_staged(marks):
            saving = peer.save(next(bench.steps), bench.state)
            savings.append(saving)
            window.run(bench.loop, saving.done, no_barrier if peer.guards_steps else waits.barrier(saving.wait_staged))
            saving.wait_durable()
        waits.next()
    observed = observer.stop()
    return _Saved(savings, waits.each_s, marks[:-1], window, observed, system.store.requests() - requests)


def _compared(peer: Peer, bench: Bench, saved: _Saved) -> Iterator[Save]:
    for saving, waited_s, mark in zip(saved.savings, saved.waits_s, saved.marks, strict=True):
        poke(bench.ends, mark)
        yield compared(
            peer,
            saving,
            bench.verifier,
            waited_s=waited_s if bench.loop.name == "train" else None,
            one_tensor=saving is saved.savings[0],
        )


def compared(
    peer: Peer, saving: Saving, verifier: Verifier | None, *, waited_s: float | None, one_tensor: bool = True
) -> Save:
    """A save that is durable: restored, compared with the verifier's state, and deleted. `waited_s`: a step was held by the harness."""
    reports = getattr(peer, "reports", {})
    hooked_s = reports[saving.step].hook_wait_s if saving.step in reports else 0.0
    save = Save(
        call_s=saving.returned_s,
        staged_s=saving.staged_s,
        durable_s=saving.durable_s,
        wait_s=None if waited_s is None else waited_s + hooked_s,
        stored_bytes=peer.stored_bytes(saving.step),
        restore_s=verifier.check(peer, saving.step) if verifier else None,
        one_tensor_s=verifier.read_one(peer, saving.step) if verifier and one_tensor else None,
    )
    peer.forget(saving.step)
    return save


def _copied_beside(loop: Loop, verifier: Verifier) -> float:
    """Seconds of a plain copy of the state on another thread, while this one runs the loop."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(verifier.copy()))
    thread.start()
    Window().run(loop, lambda: not thread.is_alive())
    thread.join()
    return found[0]


class Waits:
    """How long a training step was held at the barrier, for each save."""

    def __init__(self) -> None:
        self.each_s: list[float] = []
        self._now_s = 0.0

    def barrier(self, wait_staged: Callable[[], None]) -> Callable[[], None]:
        def wait() -> None:
            started = time.perf_counter()
            wait_staged()
            self._now_s += time.perf_counter() - started

        return wait

    def next(self) -> None:
        self.each_s.append(self._now_s)
        self._now_s = 0.0
