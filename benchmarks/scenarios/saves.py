"""Systems side by side on one state, alternating, while the main thread runs a loop. Also how time grows with the state."""

import contextlib
import gc
import itertools
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from asyncckpt.engine.choice import SETTLING_SAVES
from benchmarks.loops import LOOPS, Loop, Window, no_barrier, quiet
from benchmarks.measure import Observer, available_bytes
from benchmarks.peers.base import Saving
from benchmarks.results import Result
from benchmarks.scenarios.base import (
    BitsDifferError,
    LeftOut,
    Run,
    Scenario,
    System,
    SystemFailedError,
    Verifier,
    judged,
)
from benchmarks.scenarios.goals import OURS
from benchmarks.scenarios.samples import FOREIGN_CORES, Round, Samples, Save
from benchmarks.scenarios.wire import plain_s, put_cpu_s
from benchmarks.states import State, StateSpec, build, poke
from benchmarks.stores.s3 import SinkStore

AGAIN = 2  # times that a disturbed round is repeated
WINDOW_SAVES = 4  # what the fastest makes in a window; none is deleted before its end
QUIET_S = 2.0
SAVING_S = 2.0
CACHES_S = 0.2  # of the loop again, so that a save meets its caches and not those of who touched memory

Item = TypeVar("Item")


def run(context: Run) -> list[Result]:
    """Every state by itself."""
    scenario = context.scenario
    return [result for spec in scenario.states for result in judged(_compare(context, spec), scenario.goals)]


def growth(context: Run) -> list[Result]:
    """Every state, then one line a system over all of them: time and bytes as a function of size and tensor count."""
    found = [result for spec in context.scenario.states for result in _compare(context, spec)]
    whole = StateSpec("all of them", parameters=0)
    lines = []
    for name in context.scenario.peers:
        own = [result for result in found if result.peer == name and "durable_s" in result.measures]
        points = [
            (result.settings["raw_bytes"] / 1e9, result.settings["tensors"], result.measures["durable_s"].median)
            for result in own
        ]
        if len(points) < 2:
            continue
        per_gb = [seconds / gb for gb, _, seconds in points]
        series = {
            "s_per_gb_over_gb": [[gb, seconds / gb] for gb, _, seconds in points],
            "durable_s_over_tensors": [[tensors, seconds] for _, tensors, seconds in points],
        }
        measures = {"s_per_gb": per_gb[-1]}
        if len(points) == len(context.scenario.states):  # some of them would be another figure
            measures["s_per_gb_growth"] = max(per_gb) / min(per_gb)
        lines.append(context.result(whole, None, name, measures=measures, series=series))
    return found + judged(lines, context.scenario.goals)


def _compare(context: Run, spec: StateSpec) -> list[Result]:
    return [result for result, _ in sampled(context, spec)]


def sampled(context: Run, spec: StateSpec) -> list[tuple[Result, Samples]]:
    """A round of a system is a window in which nothing is saved (beside a busy loop), then saves: one, or beside a busy loop whole
    saves back to back for at least two seconds. Every save is restored and compared afterwards. The state's bytes change between
    rounds, and some of them whenever a snapshot is said to be complete: who says so too early, or stores an older save again, is found out. A system that cannot run is left out from there on, with its error; if that shows when it saves for the first time,
    everything begins again without it, in a new process (`SystemFailedError`).
    """
    scenario = context.scenario
    state = None
    samples = {name: Samples(error=context.known_error(spec, name)) for name in scenario.peers}
    opened: dict[str, System] = {}
    try:
        _room(scenario, spec)
        state = build(spec)
        loop = LOOPS[scenario.loop]()
        undisturbed = _undisturbed(loop) if scenario.kind == "alone" and loop.name != "idle" else None
        bench = _Bench(state, loop, Verifier(state, context.warm) if scenario.verified else None, undisturbed)
        for name, kept in samples.items():
            if kept.error is not None:
                continue
            with kept.failing():
                opened[name] = context.open(name)
            context.warn(name, kept.error)
            if kept.error is None:
                with kept.failing(BitsDifferError), _few_descriptors():
                    _begin(opened[name], bench, context)
                _begin_again_without(name, kept.error, context, spec)
        for number in range(1, scenario.rounds + 1):
            for name, system in turned(list(opened.items()), number - 1):
                kept = samples[name]
                if kept.error is not None:
                    continue
                with kept.failing(BitsDifferError):
                    for _ in range(1 + AGAIN):
                        found = _round(system, bench, context, counted=True)
                        context.say(name, number, found.summary())
                        kept.rounds.append(found)
                        if found.foreign_cores <= FOREIGN_CORES:
                            break
                context.warn(name, kept.error)
    except MemoryError as error:
        for kept in samples.values():
            kept.error = kept.error or f"MemoryError: {error}"
    finally:
        for name, system in opened.items():
            with samples[name].failing():
                system.peer.close()
    return [
        (
            context.result(
                spec,
                state,
                name,
                measures=kept.measures(state.raw_bytes if state else 0),
                series=kept.series(),
                settings={"asynchronous": name in opened and opened[name].peer.asynchronous},
                error=kept.error,
            ),
            kept,
        )
        for name, kept in samples.items()
    ]


def _undisturbed(loop: Loop) -> Window:
    """The loop before any system is opened, warm."""
    quiet(loop, QUIET_S)
    for _ in range(1 + AGAIN):
        observer = Observer()
        found = quiet(loop, 2 * QUIET_S)
        if observer.stop().foreign_cores <= FOREIGN_CORES:
            break
    return found


def turned(order: Sequence[Item], by: int) -> list[Item]:
    """Another one begins in every round."""
    return [*order[by % len(order) :], *order[: by % len(order)]] if order else []


@contextlib.contextmanager
def _few_descriptors() -> Iterator[None]:
    """A system that keeps one for each of 20,000 tensors is stopped before somebody else gets none."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    kept = len(list(Path("/proc/self/fd").iterdir())) - before
    if kept > limit:
        raise RuntimeError(f"it keeps {kept} descriptors open, more than a quarter of the limit of {4 * limit}")


def _begin_again_without(name: str, error: str | None, context: Run, spec: StateSpec) -> None:
    context.warn(name, error)
    if error is not None and len(context.scenario.peers) > 1:
        raise SystemFailedError(LeftOut(spec.name, name, error))


def _room(scenario: Scenario, spec: StateSpec) -> None:
    """The state, its twin, one checkpoint, and a snapshot that each system keeps."""
    needed = spec.raw_bytes * ((3 if scenario.verified else 1.05) + len(scenario.peers))
    gc.collect()  # the state before
    if needed > available_bytes():
        raise MemoryError(f"{spec.name} in {len(scenario.peers)} systems needs {needed / 1e6:,.0f} MB of free memory")


@dataclass(slots=True)
class _Bench:
    """What all systems share. `undisturbed`: the loop before any system was opened."""

    state: State
    loop: Loop
    verifier: Verifier | None
    undisturbed: Window | None = None
    steps: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    ends: list[torch.Tensor] = field(init=False)
    marks: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(1, 200)))  # exact in every dtype

    def __post_init__(self) -> None:
        self.ends = self.state.ends()

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


def _begin(system: System, bench: _Bench, context: Run) -> None:
    """All that is not counted, of one system before the next is opened: who fails, or hoards descriptors, is this one."""
    system.peer.prepare(bench.state)
    _settle(system, bench, context)
    for number in range(1 - context.scenario.uncounted, 1):
        context.say(system.peer.name, number, _round(system, bench, context, counted=False).summary())


def _settle(system: System, bench: _Bench, context: Run) -> None:
    """Saves that a long run has behind it, not counted, the last two verified: in the full set the same number for every system, in
    the quick one of those that measure themselves.
    """
    peer = system.peer
    measured = context.scenario.settles and peer.measures_itself
    settles = context.scenario.settles and (peer.measures_itself or context.choices.full)
    for number in range(SETTLING_SAVES if settles else 0):
        context.warm(bench.state)
        bench.state.advance()
        saving = peer.save(next(bench.steps), bench.state)
        if measured:  # what it finds depends on the cores that the loop leaves
            Window().run(bench.loop, saving.done, no_barrier if peer.guards_steps else saving.wait_staged)
        saving.wait_durable()
        if bench.verifier and number >= SETTLING_SAVES - 2:
            bench.verifier.check(peer, saving.step)
        stored = f", {peer.stored_bytes(saving.step) / 1e6:.0f} MB" if measured else ""
        peer.forget(saving.step)
        context.say(peer.name, number - SETTLING_SAVES, f"settles: durable {saving.durable_s:.2f} s{stored}")


def _round(system: System, bench: _Bench, context: Run, *, counted: bool) -> Round:
    peer, loop, verifier = system.peer, bench.loop, bench.verifier
    idle = loop.name == "idle"
    if idle or not counted:
        context.warm(bench.state)
    bench.state.advance()
    around = Observer()
    before = quiet(loop, QUIET_S if counted and not idle else 0.0)
    copy_s = _copied_beside(loop, verifier) if verifier and counted else None
    foreign_cores = around.stop().foreign_cores
    if counted and not idle:
        # not before the quiet window: two seconds later the host has taken it back
        context.warm(bench.state, WINDOW_SAVES)
        quiet(loop, CACHES_S)
    around = Observer()
    requests = system.store.requests()
    observer = Observer(system.servers)
    window, waits = Window(), Waits()
    savings = []
    marks = [bench.mark()]
    while not savings or (counted and not idle and window.elapsed_s < SAVING_S):
        with bench.written_when_staged(marks):
            saving = peer.save(next(bench.steps), bench.state)
            savings.append(saving)
            window.run(loop, saving.done, no_barrier if peer.guards_steps else waits.barrier(saving.wait_staged))
            saving.wait_durable()
        waits.next()
    observed = observer.stop()
    requests = system.store.requests() - requests
    connections = system.most_connections
    reports = getattr(peer, "reports", {})
    saves = []
    for saving, waited_s, mark in zip(savings, waits.each_s, marks[:-1], strict=True):
        poke(bench.ends, mark)
        hooked_s = reports[saving.step].hook_wait_s if saving.step in reports else 0.0
        saves.append(
            Save(
                call_s=saving.returned_s,
                staged_s=saving.staged_s,
                durable_s=saving.durable_s,
                wait_s=waited_s + hooked_s if loop.name == "train" else None,
                stored_bytes=peer.stored_bytes(saving.step),
                restore_s=verifier.check(peer, saving.step) if verifier else None,
                one_tensor_s=verifier.read_one(peer, saving.step) if verifier and saving is savings[0] else None,
            )
        )
        peer.forget(saving.step)
    served = counted and verifier and isinstance(system.store, SinkStore)
    plain = plain_s(system.store, saves[0].stored_bytes) if served else None
    puts = put_cpu_s(system.store, saves[0].stored_bytes) if served and peer.name.startswith(OURS) else None
    speed = None if idle or not counted else window.per_s / (bench.undisturbed or before).per_s
    return Round(
        saves=tuple(saves),
        foreign_cores=max(foreign_cores, observed.foreign_cores, around.stop().foreign_cores),
        copy_s=copy_s,
        cpu_s=observed.cpu_s if idle else None,
        requests=requests,
        connections=connections or None,
        plain_put_s=plain[0] if plain else None,
        plain_get_s=plain[1] if plain else None,
        put_cpu_s_per_gb=puts / saves[0].stored_bytes * 1e9 if puts else None,
        speed=speed,
        quiet_speed=before.per_s / bench.undisturbed.per_s if bench.undisturbed and counted else None,
        lost_s=None if speed is None else (1 - speed) * window.elapsed_s / len(saves),
        gap_s=None if idle else window.longest_gap_s,
        quiet_gap_s=None if idle else before.longest_gap_s,
        series_name="iterations_per_s" if loop.long else "iterations_per_50ms",
        quiet_series=[] if idle else before.series(),
        series=[] if idle else window.series(),
    )


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
