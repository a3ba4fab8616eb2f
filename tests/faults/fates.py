"""What may go wrong, where, and in which run: a run is a `Case`, and a case says everything that is needed to run it again."""

import random
import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any, Protocol

KILLS = ("kill-before", "kill-after")
_ONCE = ("lost-request", "lost-answer", "late")
ALWAYS = "-always"
REQUEST_FAULTS = (*KILLS, *_ONCE, *(f"{fault}{ALWAYS}" for fault in _ONCE), "doubled", "refused", "outage", "absent")
"""Of a store's requests.

`kill-*`: the process dies before the request is sent, or right after it took effect. `lost-request` never arrives;
`lost-answer` took effect and the caller cannot know. `late`: the caller is told of a failure, and the request arrives
later. `*-always`: the same for every further try of this request in this life, and nothing else is disturbed.
`doubled`: it arrives now, and again later. `refused`: an error that no retry cures, once. `outage`: from here on nothing
is answered, as long as this life lasts. `absent`: an object that is there is said not to be, once.
"""
WIRE_FAULTS = ("delay", "truncate", "throttle", "flip")
"""Of bytes on their way to or from a real server. `delay`: a request waits before it arrives. `truncate`: an answer ends in the middle.
`throttle`: an answer trickles. `flip`: one bit changes, of the request's body, or where it has none of the answer's.
"""
FILE_FAULTS = (*KILLS, "eio", "enospc", "full")
"""Of a local store's file operations. `eio`, `enospc`: that error, once. `full`: from here on the disk takes nothing more."""
HARMLESS = frozenset({"lost-request", "lost-answer", *WIRE_FAULTS})
"""Faults that the retries of a save must hide completely: everything is committed, and nothing is left behind."""
WRITING = frozenset({"put", "replace", "remove", "delete", "complete"})
_ATTEMPT = re.compile(r"\b([0-9a-f]{8})-([0-9]+)\b")
_TEMPORARY = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True, slots=True)
class Point:
    """One request or file operation, with a name that is the same in every run of a scenario.

    `life`: the number of the process's life. `count`: the how manieth of this operation on this key in this life.
    """

    life: int
    operation: str
    key: str
    count: int

    def __str__(self) -> str:
        return f"{self.life}:{self.operation}:{self.key}:{self.count}"


class Names:
    """Numbers the points, and takes everything random out of their keys."""

    def __init__(self) -> None:
        self._runs: dict[str, int] = {}
        self._counts: dict[tuple[int, str, str], int] = {}

    def point(self, life: int, operation: str, key: str) -> Point:
        key = _TEMPORARY.sub("temporary", _ATTEMPT.sub(self._attempt, key))
        count = self._counts[life, operation, key] = self._counts.get((life, operation, key), 0) + 1
        return Point(life, operation, key, count)

    def _attempt(self, match: re.Match[str]) -> str:
        return f"run{self._runs.setdefault(match[1], len(self._runs) + 1)}-{match[2]}"


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the campaign.

    Either one `fault` at the point `at`, or, with a `seed`, as many as its dice say. Neither: nothing goes wrong.
    `victim`: who dies of a kill, where saves go through a service: worker, service, trainer or all.
    """

    scenario: str
    store: str
    fault: str = ""
    at: str = ""
    seed: int | None = None
    victim: str = "worker"

    @property
    def command(self) -> str:
        """How to run this case again."""
        words = ["python", "-m", "tests.faults", "--scenario", self.scenario, "--store", self.store]
        if self.fault:
            words += ["--fault", self.fault, "--at", self.at]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        if self.victim != "worker":
            words += ["--victim", self.victim]
        return shlex.join(words)

    @property
    def injection(self) -> str:
        """One word for the table."""
        return self.fault or ("nothing" if self.seed is None else "dice")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Fate(Protocol):
    """Which fault meets a point, and how many requests later a late or doubled one arrives."""

    def fault(self, point: Point) -> str: ...

    def delay(self, point: Point) -> int: ...


class Weather:
    """Bad all the time: so many of all requests meet a fault that retries must hide. It depends on the seed and the point alone."""

    def __init__(self, rate: float, seed: int) -> None:
        self._rate, self._seed = rate, seed

    def fault(self, point: Point) -> str:
        rng = random.Random(f"{self._seed} {point}")
        if rng.random() >= self._rate:
            return ""
        faults = ("lost-request", "lost-answer", "late", "doubled", *WIRE_FAULTS)
        return rng.choice([fault for fault in faults if possible(fault, point.operation)])

    def delay(self, point: Point) -> int:
        return random.Random(f"late {self._seed} {point}").choice((1, 3, 8, 20))


class Dice:
    """Which fault meets which point. It depends on the case and the point alone: threads may come in any order."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._rate = random.Random(case.seed).choice((0.01, 0.03, 0.08, 0.15))

    def fault(self, point: Point) -> str:
        """The fault's name, or nothing."""
        case = self._case
        if case.seed is None:
            return case.fault if case.at == str(point) else ""
        rng = random.Random(f"{case.seed} {point}")
        if rng.random() >= self._rate:
            return ""
        if case.store in ("local", "service"):
            return rng.choice(FILE_FAULTS)
        faults = (*REQUEST_FAULTS, *WIRE_FAULTS) if case.store == "s3" else REQUEST_FAULTS
        return rng.choice([fault for fault in faults if possible(fault, point.operation)])

    def delay(self, point: Point) -> int:
        """So many requests later a late or doubled one arrives. Without dice: when all lives with faults are over."""
        if self._case.seed is None:
            return 10**6
        return random.Random(f"late {self._case.seed} {point}").choice((1, 3, 8, 20, 10**6))


def possible(fault: str, operation: str) -> bool:
    """A request that only reads leaves nothing to arrive later, and one that only writes is told of no absence."""
    if fault == "absent":
        return operation in ("get", "get_into")
    return operation in WRITING if fault.startswith(("late", "doubled")) else True
