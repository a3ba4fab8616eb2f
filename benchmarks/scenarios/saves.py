"""Systems side by side on one state, alternating, while the main thread runs a loop. Also how time grows with the state."""

import contextlib
import gc
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from asyncckpt.engine.choice import SETTLING_SAVES
from benchmarks.loops import LOOPS, Loop, Window, no_barrier, quiet
from benchmarks.measure import Observer, available_bytes
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
from benchmarks.scenarios.rounds import QUIET_S, Bench, one_round
from benchmarks.scenarios.samples import FOREIGN_CORES, Samples
from benchmarks.states import StateSpec, build

AGAIN = 2  # times that a disturbed round is repeated

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
        bench = Bench(state, loop, Verifier(state, context.warm) if scenario.verified else None, undisturbed)
        for name, kept in samples.items():
            if kept.error is None:
                _open(name, kept, opened=opened, bench=bench, context=context, spec=spec)
        for number in range(1, scenario.rounds + 1):
            for name, system in turned(list(opened.items()), number - 1):
                if samples[name].error is None:
                    _take_turn(number, system, samples[name], bench, context)
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


def _open(name: str, kept: Samples, *, opened: dict[str, System], bench: Bench, context: Run, spec: StateSpec) -> None:
    """Into `opened`, and through all that is not counted."""
    with kept.failing():
        opened[name] = context.open(name)
    context.warn(name, kept.error)
    if kept.error is None:
        with kept.failing(BitsDifferError), _few_descriptors():
            _begin(opened[name], bench, context)
        _begin_again_without(name, kept.error, context, spec)


def _take_turn(number: int, system: System, kept: Samples, bench: Bench, context: Run) -> None:
    """A round that counts; again if others disturbed it."""
    name = system.peer.name
    with kept.failing(BitsDifferError):
        for _ in range(1 + AGAIN):
            found = one_round(system, bench, context, counted=True)
            context.say(name, number, found.summary())
            kept.rounds.append(found)
            if found.foreign_cores <= FOREIGN_CORES:
                break
    context.warn(name, kept.error)


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


def _begin(system: System, bench: Bench, context: Run) -> None:
    """All that is not counted, of one system before the next is opened: who fails, or hoards descriptors, is this one."""
    system.peer.prepare(bench.state)
    _settle(system, bench, context)
    for number in range(1 - context.scenario.uncounted, 1):
        context.say(system.peer.name, number, one_round(system, bench, context, counted=False).summary())


def _settle(system: System, bench: Bench, context: Run) -> None:
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
