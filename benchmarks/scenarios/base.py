"""What a scenario is, what a run of it is given, and how a save is checked."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from benchmarks.measure import touch, tree
from benchmarks.peers import open_peer
from benchmarks.peers.base import Peer
from benchmarks.results import Goal, Result
from benchmarks.scenarios.goals import GoalSpec, judge
from benchmarks.states import State, StateSpec
from benchmarks.stores import Store, open_store
from benchmarks.stores.s3 import SinkStore

Found = TypeVar("Found")
CHECK_S = 300.0  # a child that verifies longer than this hangs


@dataclass(frozen=True)
class Scenario:
    """One row of the table. `kind` chooses the procedure: `saves`, `alone`, `growth`, `memory` or `codec`.

    `quick`: in the quick set; `full_rounds` and `full_peers` are the full set's choice where it differs. `uncounted`: first rounds
    of every system that are not counted; `settles`: five saves of every
    system come before them. `workers`, `codec`: of asyncckpt, None: its default. `verified` False: nothing can be
    read back from the store.
    """

    name: str
    about: str
    states: tuple[StateSpec, ...]
    peers: tuple[str, ...] = ("asyncckpt",)
    kind: str = "saves"
    loop: str = "idle"
    store: str = "tmpfs"
    rounds: int = 3
    goals: tuple[GoalSpec, ...] = ()
    quick: bool = True
    full_rounds: int | None = None
    full_peers: tuple[str, ...] | None = None
    workers: int | None = None
    codec: str | None = None
    uncounted: int = 1
    settles: bool = True
    verified: bool = True


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A system that failed while it saved this state."""

    state: str
    peer: str
    error: str


class SystemFailedError(Exception):
    """A system failed before any round was counted, and may have left descriptors or memory behind: the others need a new process.

    `folder`: what could not be removed for want of a descriptor.
    """

    def __init__(self, left_out: LeftOut) -> None:
        super().__init__(f"{left_out.peer} failed: {left_out.error}")
        self.left_out = left_out
        self.folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """Of the command line; None: the scenario's own. `size`: factor on the bytes of every state. `folder`: scratch space.

    `left_out`: what failed when this scenario began before.
    """

    folder: Path
    size: float = 1.0
    rounds: int | None = None
    peers: tuple[str, ...] | None = None
    loop: str | None = None
    store: str | None = None
    workers: int | None = None
    codec: str | None = None
    full: bool = False
    warm: bool = True
    left_out: tuple[LeftOut, ...] = ()

    def applied_to(self, scenario: Scenario) -> Scenario:
        """The scenario as it shall run. Its goals stand for its own loop, store and size, and for asyncckpt's defaults, alone."""
        rounds = self.rounds or (self.full and scenario.full_rounds) or scenario.rounds
        peers = self.peers or (self.full and scenario.full_peers) or scenario.peers
        own = (scenario.loop, scenario.store, scenario.workers, scenario.codec)
        asked = (self.loop, self.store, self.workers, self.codec)
        moved = self.size != 1 or any(
            mine is not None and mine != default for mine, default in zip(asked, own, strict=True)
        )
        loop = self.loop or scenario.loop
        return dataclasses.replace(
            scenario,
            kind="alone" if scenario.kind == "saves" and loop == "train" else scenario.kind,  # see `alone`
            rounds=rounds,
            peers=peers,
            loop=loop,
            store=self.store or scenario.store,
            workers=self.workers or scenario.workers,
            codec=self.codec or scenario.codec,
            states=tuple(state.resized(self.size) for state in scenario.states),
            goals=() if moved else scenario.goals,
        )


@dataclass(slots=True)
class System:
    """One system of a comparison, in a store of its own. `servers`: the processes that the store runs in."""

    peer: Peer
    store: Store
    servers: tuple[int, ...]

    @property
    def most_connections(self) -> int:
        """Connections that its server has had at once; 0 where that is not counted."""
        return int(self.store.stats()["most_connections"]) if isinstance(self.store, SinkStore) else 0


@dataclass(frozen=True, slots=True)
class Run:
    """A scenario as it runs. Stores stay open as long as `stack`."""

    scenario: Scenario
    choices: Choices
    stack: contextlib.ExitStack

    def open(self, name: str) -> System:
        """A system, and a store that nobody else uses."""
        options: dict[str, Any] = {}
        if name == "asyncckpt":  # others of ours are what their names say
            given = {"workers": self.scenario.workers, "codec": self.scenario.codec}
            options = {option: value for option, value in given.items() if value is not None}
        children = set(tree())
        store = self.stack.enter_context(_store(self.scenario.store, self.choices.folder))
        servers = tuple(set(tree()) - children)
        return System(open_peer(name, store.place(name), **options), store, servers)

    def warm(self, state: State, saves: int = 1) -> None:
        """Before so many saves: as many bytes as they may write, touched and given back."""
        if self.choices.warm and self.scenario.verified:  # otherwise nothing is kept
            touch(int(state.raw_bytes * 1.05) * saves)

    def known_error(self, spec: StateSpec, name: str) -> str | None:
        """Of a system that failed here before."""
        return next((one.error for one in self.choices.left_out if (one.state, one.peer) == (spec.name, name)), None)

    def say(self, peer: str, number: int, text: str) -> None:
        """One line of progress."""
        rounds = self.scenario.rounds
        count = f"{number}/{rounds}" if number > 0 else "uncounted"
        print(f"  {self.scenario.name}  {count:>9}  {peer:24} {text}", file=sys.stderr, flush=True)

    def warn(self, peer: str, error: str | None) -> None:
        """A line for a system that cannot go on."""
        if error is not None:
            print(f"  {self.scenario.name}  {peer} is left out: {error}", file=sys.stderr, flush=True)

    def result(self, spec: StateSpec, state: State | None, peer: str, **found: Any) -> Result:
        """A result without goals; `found`: measures, series, error, and `settings` of its own."""
        scenario = self.scenario
        settings = {
            "raw_bytes": state.raw_bytes if state else spec.raw_bytes,
            "parameters": len(list(state.model.parameters())) if state else spec.parameters,
            "tensors": len(state.tensors()) if state else 0,
            "rounds": scenario.rounds,
            "size": self.choices.size,
            "warm": self.choices.warm,
            "workers": scenario.workers,
            "codec": scenario.codec,
            "uncounted": scenario.uncounted,
            "settles": scenario.settles,
        } | found.pop("settings", {})
        return Result(
            scenario=scenario.name,
            about=scenario.about,
            state=spec.name,
            store=scenario.store,
            loop=scenario.loop,
            peer=peer,
            settings=settings,
            **found,
        )


def judged(results: list[Result], goals: tuple[GoalSpec, ...]) -> list[Result]:
    """The results of one state, each with the goals that are stated for its system."""
    found: Mapping[str, list[Goal]] = {result.peer: [] for result in results}
    for spec in goals:
        goal = judge(spec, results)
        if goal is not None:
            found[spec.peer].append(goal)
    return [dataclasses.replace(result, goals=found[result.peer]) for result in results]


def _store(name: str, folder: Path) -> Store:
    if name == "discard":
        return SinkStore(name, discard=True)
    return open_store(name, Path(tempfile.mkdtemp(prefix="store-", dir=folder)))


class BitsDifferError(Exception):
    """A restored checkpoint is not what was saved."""


class Verifier:
    """Restores saves into a second state, which held nothing correct before, and compares every bit."""

    def __init__(self, state: State, warm: Callable[[State], None] = lambda _: None) -> None:
        self._state = state
        self._warm = warm
        self._twin = state.twin()
        self._twin.scrub()
        self._own = self._twin.held()

    def check(self, peer: Peer, step: int) -> float:
        """The state as it is now is what `step` must hold. Returns the seconds of the restore alone."""
        self._twin.hold(self._own)
        self._twin.scrub()
        self._warm(self._state)
        self._twin.settle()
        started = time.perf_counter()
        peer.restore(step, self._twin)
        self._twin.settle()
        restore_s = time.perf_counter() - started
        if wrong := self._state.differs_from(self._twin):
            raise BitsDifferError(f"{peer.name}, step {step}: {len(wrong)} tensors differ, the first is {wrong[0]}")
        return restore_s

    def read_one(self, peer: Peer, step: int) -> float | None:
        """Seconds to read the middle one of the tensors alone, onto the state's device; None when the system cannot."""
        tensors = self._state.tensors()
        index = len(tensors) // 2
        expected = tensors[index]
        started = time.perf_counter()
        found = peer.read_one(step, index, self._twin)
        if found is None:
            return None
        found = found.to(expected.device)
        self._state.settle()
        seconds = time.perf_counter() - started
        same = torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        if not same:
            raise BitsDifferError(f"{peer.name}, step {step}: tensor {index}, read alone, differs")
        return seconds

    @torch.no_grad()
    def copy(self) -> float:
        """Seconds of one plain copy of the state into memory that exists already: the faster of all torch's threads and of one."""
        self._twin.hold(self._own)
        targets, sources = self._twin.tensors(), self._state.tensors()

        def seconds() -> float:
            started = time.perf_counter()
            torch._foreach_copy_(targets, sources)
            return time.perf_counter() - started

        seconds()  # on a new thread the first makes torch's own threads
        many_s = seconds()
        with threadpool_limits(1, user_api="openmp"):  # counts for the calling thread alone
            return min(many_s, seconds())


def in_own_process(work: Callable[..., Found], *args: Any) -> Found:
    """Do it in a new interpreter. It is ended when this one is told to end. `BrokenProcessPool` if it was killed."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_cleanly) as alone:
        try:
            return alone.submit(work, *args).result()
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # or leaving the block would wait for it
            raise


def _end_cleanly() -> None:
    """SIGTERM ends what runs as an exception does: systems are closed, and stores."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def in_child(check: Callable[[], object]) -> None:
    """Run a check in a forked child, which ends with it: whatever it allocates is gone. Raises if it failed or hung."""

    def alone() -> None:
        torch.set_num_threads(1)  # the parent's pool of threads did not come along
        check()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    child.join(CHECK_S)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise BitsDifferError(f"a check took more than {CHECK_S:.0f} s")
    if child.exitcode:
        raise BitsDifferError("a check in a child process failed; its traceback stands above")
