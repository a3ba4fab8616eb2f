"""Saves one after the other in one process: memory, descriptors and threads of the whole process tree.

Every system in a process of its own. A save is verified in a child that is forked after it and ends before the next: what a
restore leaves in the trainer's allocator is not measured.
"""

import contextlib
import gc
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from benchmarks import measure
from benchmarks.peak import Peak
from benchmarks.peers.base import Peer
from benchmarks.results import Result
from benchmarks.scenarios.base import (
    BitsDifferError,
    Choices,
    Run,
    Scenario,
    Verifier,
    in_child,
    in_own_process,
    judged,
)
from benchmarks.scenarios.samples import described
from benchmarks.states import State, StateSpec, build

SETTLED = 5
LOOKS = 40  # at most, after the fifth save


@dataclass(frozen=True, slots=True)
class _Look:
    save: int
    memory: measure.Memory
    descriptors: int
    threads: int


def run(context: Run) -> list[Result]:
    """A process for each system, in which its store is opened."""
    found = []
    for spec in context.scenario.states:
        results = []
        for name in context.scenario.peers:
            try:
                results.append(in_own_process(_one, context.scenario, context.choices, spec, name))
            except BrokenProcessPool as error:  # the kernel's killer, most likely
                context.warn(name, described(error))
                results.append(context.result(spec, None, name, measures={}, error=described(error)))
        found += judged(results, context.scenario.goals)
    return found


def _one(scenario: Scenario, choices: Choices, spec: StateSpec, name: str) -> Result:
    state = build(spec)
    gc.collect()
    start = _look(0)
    with contextlib.ExitStack() as stack:
        context = Run(scenario, choices, stack)
        try:
            looks, peak_bytes = _saves(context, state, name)
        except (BitsDifferError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            context.warn(name, described(error))
            return context.result(spec, state, name, measures={}, error=described(error))
    points = [[look.save, look.memory.total_bytes - start.memory.total_bytes] for look in looks]
    return context.result(
        spec,
        state,
        name,
        measures=_measures(start, looks, peak_bytes, state.raw_bytes),
        series={"memory_bytes_over_saves": points},
    )


def _saves(context: Run, state: State, name: str) -> tuple[list[_Look], int]:
    rounds = context.scenario.rounds
    every = max(1, rounds // LOOKS)
    looks = []
    system = context.open(name)
    peer = system.peer
    try:
        peer.prepare(state)
        with Peak(system.servers) as peak:
            for step in range(1, rounds + 1):
                state.advance()
                with peak.sampling():
                    peer.save(step, state).wait_durable()
                if step % every == 0 or step in (SETTLED, rounds):
                    looks.append(_look(step, (*system.servers, peak.pid)))
                _verify(state, peer, step)
                peer.forget(step)
                if step % every == 0:
                    context.say(name, step, f"{looks[-1].memory.total_bytes / 1e6:.0f} MB in all processes")
    finally:
        peer.close()
    return looks, peak.most_bytes


def _verify(state: State, peer: Peer, step: int) -> None:
    in_child(lambda: Verifier(state).check(peer, step))


def _measures(start: _Look, looks: list[_Look], peak_bytes: int, raw_bytes: int) -> dict[str, measure.Spread | float]:
    peak_above_bytes = peak_bytes - start.memory.total_bytes
    found = {
        "peak_above_start_bytes": float(peak_above_bytes),
        "peak_beyond_state_bytes": float(peak_above_bytes - raw_bytes),
        "peak_of_state": peak_above_bytes / raw_bytes,
        "rest_above_start_bytes": float(looks[-1].memory.total_bytes - start.memory.total_bytes),
        "of_it_unmapped_bytes": float(looks[-1].memory.unmapped_bytes),
        "descriptors": measure.spread(look.descriptors for look in looks),
        "threads": measure.spread(look.threads for look in looks),
        "saves": float(looks[-1].save),
    }
    settled = next((look for look in looks if look.save >= SETTLED), None)
    later = [look for look in looks if settled and look.save > settled.save]
    if settled and later:
        grown = [look.memory.total_bytes - settled.memory.total_bytes for look in later]
        drift = max(abs(look.descriptors - settled.descriptors) for look in later)
        found |= {
            "growth_bytes": float(max(grown)),
            "last_growth_bytes": float(grown[-1]),
            "descriptor_drift": float(drift),
        }
    return found


def _look(save: int, apart: tuple[int, ...] = ()) -> _Look:
    pids = measure.tree(apart=apart)
    return _Look(save, measure.memory(pids), measure.descriptors(pids), measure.threads(pids))
