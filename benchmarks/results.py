"""Figures of one run: a table for people, a JSON line for machines, and whether the stated goals were met."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.devices import described
from benchmarks.measure import Spread

_REPOSITORY = Path(__file__).parent.parent
_PACKAGES = ("torch", "numpy", "zstandard", "blake3", "safetensors", "boto3")
_OTHERS = ("torch_checkpointing", "s3torchconnector", "zipnn")  # of the extra `bench`


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must be. `at_least`: the figure must not be below the limit, otherwise not above it. No `value`: it was not judged.
    `disturbed`: other processes ran in all rounds of a system that it needs.
    """

    text: str
    value: float | None
    limit: float
    at_least: bool = False
    disturbed: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"----  {self.text}: not judged, a figure that it needs is missing ({sign} {self.limit:g})"
        doubt = "; disturbed: other processes ran meanwhile" if self.disturbed else ""
        return f"{'met ' if self.met else 'MISS'}  {self.text}: {self.value:.4g} {sign} {self.limit:g}{doubt}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"met": self.met}


@dataclass(frozen=True, slots=True)
class Result:
    """One system in one scenario, on one state. Units stand in the names of `measures`. `error`: why there are none, or no more.

    `series`: points [x, y]; a name says `y_over_x`, or y alone where x is seconds since the window's start.
    """

    scenario: str
    state: str
    peer: str
    measures: dict[str, Spread | float]
    goals: Sequence[Goal] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    about: str = ""
    store: str = "tmpfs"
    loop: str = "idle"
    series: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "about": self.about,
            "state": self.state,
            "store": self.store,
            "loop": self.loop,
            "peer": self.peer,
            "measures": {name: v.to_json() if isinstance(v, Spread) else v for name, v in self.measures.items()},
            "series": self.series,
            "goals": [goal.to_json() for goal in self.goals],
            "settings": self.settings,
            "error": self.error,
        }


def table(results: Sequence[Result]) -> str:
    """A table for each scenario and state: systems as columns; medians, with the smallest and largest sample behind them."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.scenario, result.state), []).append(result)
    return "\n\n".join(_one_table(rows) for rows in groups.values())


def _one_table(results: list[Result]) -> str:
    first = results[0]
    size = first.settings.get("raw_bytes", 0)
    state = f"{first.state} ({size / 1e6:,.0f} MB)" if size else first.state
    title = f"{first.scenario}: {first.about}\n{state}, {first.loop} main thread, store {first.store}"
    measured = [result for result in results if result.measures]
    names = list(dict.fromkeys(name for result in measured for name in result.measures))
    rows = [["", *(result.peer for result in measured)]]
    for name in names:
        cells = [_text(name, result.measures[name]) if name in result.measures else "-" for result in measured]
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    errors = [
        f"{result.peer} {'stopped' if result.measures else 'did not run'}: {result.error}"
        for result in results
        if result.error
    ]
    return "\n".join([title, *(lines if measured else []), *errors, *(str(goal) for r in results for goal in r.goals)])


def _text(name: str, value: Spread | float) -> str:
    if not isinstance(value, Spread):
        return _number(name, value)
    if value.samples == 1:
        return _number(name, value.median)
    return f"{_number(name, value.median)} ({_number(name, value.min)} .. {_number(name, value.max)})"


def _number(name: str, value: float) -> str:
    if name.endswith(("_s", "_s_per_gb")) and not name.endswith("per_s"):
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.2f} s"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


# -- where and when


def machine() -> dict[str, Any]:
    """What a figure cannot be read without."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES} | _others(),
        "commit": _commit(),
        **described(),
    }


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when figures come from. Made before anything runs: a commit meanwhile is not theirs.

    `program`: the module that was called. `values`: where the state's values come from.
    """

    program: str
    values: str
    machine: dict[str, Any] = field(default_factory=machine)


def append(path: Path, results: Sequence[Result], origin: Origin) -> None:
    """One JSON line a result."""
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", "-m", origin.program, *_asked(sys.argv[1:])]),
        "values": origin.values,
        "machine": origin.machine,
    }
    with path.open("a") as file:
        for result in results:
            file.write(json.dumps(result.to_json() | about) + "\n")


def _asked(words: Sequence[str]) -> list[str]:
    """Without where the lines go."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if before != "--json" and word.partition("=")[0] != "--json"]


def _others() -> dict[str, str]:
    found = {}
    for name in _OTHERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", _REPOSITORY, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain") else "")
