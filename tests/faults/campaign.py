"""Runs of the campaign: every kill at every point of every scenario, other faults at every point, and dice."""

import itertools
import os
import random
import select
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.fates import FILE_FAULTS, HARMLESS, KILLS, REQUEST_FAULTS, WIRE_FAULTS, Case, Point, possible
from tests.faults.lives import scale_limits
from tests.faults.oracle import KINDS
from tests.faults.places import PLACES, Place
from tests.faults.scenarios import SCENARIOS, clean

_SHOWN = 6  # faults of a run that failed
VICTIMS = ("worker", "service", "trainer", "all")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one run ended. `fired`: the faults that met a point. `points`: all there were. `stumps`: records without objects, passed over."""

    case: Case
    violations: tuple[tuple[str, str], ...]
    fired: tuple[str, ...]
    points: tuple[Point, ...] = field(repr=False)
    failures: tuple[str, ...] = ()
    stumps: int = 0

    def told(self) -> str:
        """Everything that is needed to look into it."""
        lines = [f"{kind.upper()}: {text}" for kind, text in self.violations]
        lines += [f"  fault: {fault}" for fault in self.fired[:_SHOWN]]
        lines += [f"  and {len(self.fired) - _SHOWN} more faults"] * (len(self.fired) > _SHOWN)
        return "\n".join([*lines, f"  again: {self.case.command}"])


def run(case: Case, make: Callable[[Case], Place] | None = None) -> Verdict:
    """One run: a life without faults, lives with them, and a clean life; then everything is held against what was told."""
    scale_limits()
    scenario = SCENARIOS[case.scenario]
    place = (make or PLACES[case.store])(case)
    try:
        place.undisturbed(1, scenario.before)
        place.ledger.judge(scenario.keep_last)
        if scenario.ruin is not None:
            place.ledger.ruined(scenario.ruin(place.store))
        before = place.ledger.objects()
        for number, act in enumerate(scenario.acts, 2):
            place.disturbed(number, act)
            place.ledger.judge(scenario.keep_last)
        hidden = not place.killed and case.fault in HARMLESS
        if hidden or case.injection == "nothing":
            place.ledger.nothing_left(before)
            if place.ledger.failures:
                place.ledger.violated("blocked", f"a retry would have cured it: {place.ledger.failures[0]}")
        if not place.killed and (left := place.temporary_files()) and ":unlink:" not in case.at and case.seed is None:
            place.ledger.violated("left", f"temporary files {left}")
        failures = tuple(place.ledger.failures)
        place.deliver()
        place.ledger.judge(scenario.keep_last)
        stumps = place.ledger.stumps
        place.ledger.clean = True
        place.undisturbed(len(scenario.acts) + 2, clean(scenario, stumps, rewind_to=place.ledger.rewinding))
        place.ledger.judge(scenario.keep_last)
        found = tuple(dict.fromkeys(place.ledger.violations))
        return Verdict(case, found, tuple(place.fired), tuple(place.points), failures, len(stumps))
    finally:
        place.close()


def rehearsed(scenario: str, store: str) -> list[Point]:
    """The points of a run in which nothing goes wrong. It must itself be sound."""
    verdict = run(Case(scenario, store))
    assert not verdict.violations, verdict.told()
    return list(dict.fromkeys(verdict.points))


def systematic(scenario: str, store: str, faults: Sequence[str] | None = None) -> list[Case]:
    """Every fault at every point, kills first."""
    points = rehearsed(scenario, store)
    if store == "service":
        kills = itertools.product(VICTIMS, KILLS, points)
        return [Case(scenario, store, fault, str(point), victim=victim) for victim, fault, point in kills]
    of_store = {"memory": REQUEST_FAULTS, "s3": (*REQUEST_FAULTS, *WIRE_FAULTS)}
    chosen = faults or of_store.get(store, FILE_FAULTS)
    return [
        Case(scenario, store, fault, str(point))
        for fault in chosen
        for point in points
        if possible(fault, point.operation) or store != "memory"
    ]


def drawn(runs: int, seed: int, scenarios: Sequence[str] = tuple(SCENARIOS)) -> Iterator[Case]:
    """So many cases: half of them kills in memory and in a folder, some through a service and before S3, then other faults, then dice."""
    dice = random.Random(seed)
    kills: list[Case] = []
    others: list[Case] = []
    served: list[Case] = []
    sent: list[Case] = []
    for scenario in scenarios:
        for store in ("memory", "local"):
            for case in systematic(scenario, store):
                (kills if case.fault in KILLS else others).append(case)
    for scenario in [name for name in ("save", "retention", "replace") if name in scenarios]:
        served += systematic(scenario, "service")
        sent += systematic(scenario, "s3", (*KILLS, "lost-answer", "late-always", *WIRE_FAULTS))
    for cases in (kills, others, served, sent):
        dice.shuffle(cases)
    taken = [*served[: runs // 25], *sent[: runs // 50], *kills[: runs // 2]]
    rest = runs - len(taken)
    taken += others[: rest // 2]
    seeds = itertools.count(seed)
    while len(taken) < runs:
        number = next(seeds)
        scenario = dice.choice(scenarios)
        taken.append(Case(scenario, dice.choice(("memory", "memory", "memory", "local")), seed=number))
    dice.shuffle(taken)
    return iter(taken)


class Table:
    """What the runs came to, by scenario and injection."""

    def __init__(self) -> None:
        self.runs: Counter[tuple[str, str, str]] = Counter()
        self.found: Counter[tuple[str, str, str, str]] = Counter()
        self.missed = 0

    def add(self, verdict: Verdict) -> None:
        row = (verdict.case.scenario, verdict.case.store, verdict.case.injection)
        self.runs[row] += 1
        self.missed += bool(verdict.case.at) and not verdict.fired
        for kind in {kind for kind, _ in verdict.violations}:
            self.found[*row, kind] += 1

    def lines(self) -> list[str]:
        head = f"{'scenario':15} {'store':8} {'injection':13} {'runs':>6} " + " ".join(f"{kind:>8}" for kind in KINDS)
        lines = [head, "-" * len(head)]
        for row in sorted(self.runs):
            counts = " ".join(f"{self.found[*row, kind]:8}" for kind in KINDS)
            lines.append(f"{row[0]:15} {row[1]:8} {row[2]:13} {self.runs[row]:6} {counts}")
        totals = [sum(count for key, count in self.found.items() if key[3] == kind) for kind in KINDS]
        lines += ["-" * len(head), f"{'all':38} {sum(self.runs.values()):6} " + " ".join(f"{n:8}" for n in totals)]
        return lines


def in_parallel(cases: Sequence[Case], jobs: int) -> Iterator[Verdict]:
    """Run the cases in forked processes; their verdicts as they come."""
    import pickle  # between processes of ours

    ends = {}
    for job in range(jobs):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with os.fdopen(writing, "wb") as stream:
                for case in cases[job::jobs]:
                    pickle.dump(run(case), stream)
                    stream.flush()
            os._exit(0)
        os.close(writing)
        ends[os.fdopen(reading, "rb", buffering=0)] = pid
    while ends:
        ready, _, _ = select.select(list(ends), [], [])
        for stream in ready:
            try:
                yield pickle.load(stream)
            except EOFError:
                stream.close()
                status = os.waitstatus_to_exitcode(os.waitpid(ends.pop(stream), 0)[1])
                assert status == 0, f"a process of the campaign ended with {status}"
