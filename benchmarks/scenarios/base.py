"""What every scenario is given, and the two things it does: check a save, and compare systems side by side."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.loops import LOOPS, Loop, Window, no_barrier, quiet
from benchmarks.measure import Observer, Spread, spread
from benchmarks.peers import open_peer
from benchmarks.peers.base import Peer, Saving
from benchmarks.results import Result
from benchmarks.states import State, StateSpec, build

QUIET_S = 1.0
SAVING_S = 2.0


@dataclass(frozen=True, slots=True)
class Context:
    """Choices of the command line; None: the scenario's own. `size`: factor on the bytes of every state."""

    folder: Path
    size: float = 1.0
    rounds: int | None = None
    peers: tuple[str, ...] | None = None
    loop: str | None = None


class BitsDifferError(Exception):
    """A restored checkpoint is not what was saved."""


class Verifier:
    """Restores saves into a second state, which held nothing correct before, and compares every bit."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._twin = state.twin()

    def touch(self) -> None:
        """Make the second state's pages exist before somebody looks at memory."""
        self._twin.scrub()

    def check(self, peer: Peer, step: int) -> float:
        """The state as it is now is what `step` must hold. Returns the seconds of the restore alone."""
        self._twin.scrub()
        started = time.perf_counter()
        peer.restore(step, self._twin)
        restore_s = time.perf_counter() - started
        if wrong := self._state.differs_from(self._twin):
            raise BitsDifferError(f"{peer.name}, step {step}: {len(wrong)} tensors differ, the first is {wrong[0]}")
        return restore_s


@dataclass(slots=True)
class Samples:
    """What one system did over all rounds."""

    savings: list[Saving] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    quiet_gap_s: list[float] = field(default_factory=list)
    error: str | None = None

    def measures(self) -> dict[str, Spread | float]:
        """Medians of all saves; speed and gaps of all windows."""
        if not self.savings:
            return {}
        found: dict[str, Spread | float] = {
            "call_s": spread(saving.returned_s for saving in self.savings),
            "staged_s": spread(saving.staged_s for saving in self.savings),
            "durable_s": spread(saving.durable_s for saving in self.savings),
            "stored_bytes": spread(self.stored_bytes),
            "restore_s": spread(self.restore_s),
        }
        if self.speed:
            found |= {
                "main_speed": spread(self.speed),
                "longest_gap_s": max(self.gap_s),
                "quiet_gap_s": max(self.quiet_gap_s),
            }
        return found | {"saves": float(len(self.savings)), "foreign_cores": max(self.foreign_cores)}


def compare(context: Context, spec: StateSpec, loop_name: str, peers: Sequence[str], rounds: int) -> dict[str, Samples]:
    """Systems side by side on one state, alternating, while the main thread runs a loop.

    A round of a system is a window in which nothing is saved, then whole saves back to back for at least two seconds. Every save is restored and
    compared afterwards. The state's bytes change between windows. A first save of each system is not counted. A system that
    cannot run is left out from there on, with its error.
    """
    state = build(spec)
    verifier = Verifier(state)
    loop = LOOPS[loop_name]()
    samples = {name: Samples() for name in peers}
    steps = itertools.count(1)
    opened: dict[str, Peer] = {}
    try:
        for name in peers:
            opened[name] = open_peer(name, context.folder)
            opened[name].prepare(state)
        for number in range(rounds + 1):
            for name, peer in opened.items():
                if samples[name].error is None:
                    kept = samples[name] if number else Samples()
                    try:
                        _round(peer, state, loop, verifier, steps, kept=kept, seconds=SAVING_S if number else 0.0)
                    except BitsDifferError:
                        raise
                    except Exception as error:
                        samples[name].error = f"{type(error).__name__}: {error}"
    finally:
        for peer in opened.values():
            peer.close()
    return samples


def _round(
    peer: Peer, state: State, loop: Loop, verifier: Verifier, steps: Iterator[int], *, kept: Samples, seconds: float
) -> None:
    state.advance()
    observer = Observer()
    before = quiet(loop, QUIET_S if seconds else 0.0)
    window = Window()
    savings: list[Saving] = []
    while not savings or window.elapsed_s < seconds:
        saving = peer.save(next(steps), state)
        savings.append(saving)
        window.run(loop, saving.done, no_barrier if peer.guards_steps else saving.wait_staged)
        saving.wait_durable()
    kept.foreign_cores.append(observer.stop().foreign_cores)
    for saving in savings:
        kept.savings.append(saving)
        kept.stored_bytes.append(peer.stored_bytes(saving.step))
        kept.restore_s.append(verifier.check(peer, saving.step))
        peer.forget(saving.step)
    if loop.name != "idle":
        kept.speed.append(window.per_s / before.per_s)
        kept.gap_s.append(window.longest_gap_s)
        kept.quiet_gap_s.append(before.longest_gap_s)


def results(scenario: str, spec: StateSpec, loop_name: str, samples: dict[str, Samples]) -> list[Result]:
    """A result of every system, without goals."""
    settings = {"raw_bytes": spec.raw_bytes, "parameters": spec.parameters, "loop": loop_name}
    return [
        Result(scenario, f"{spec.name}, {loop_name} main thread", name, kept.measures(), (), settings, kept.error)
        for name, kept in samples.items()
    ]


def median(samples: Samples, stamp: str) -> float:
    """The median of one stamp (`returned_s`, `staged_s`, `durable_s`) over all saves."""
    return spread(getattr(saving, stamp) for saving in samples.savings).median
