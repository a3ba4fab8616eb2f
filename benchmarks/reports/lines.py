"""The lines that `benchmarks.bench --json` writes, read back; what older files lack has a default."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread

Points = list[list[float]]


class ResultsError(ValueError):
    """A file that holds no results; says which line, and why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and the figure held against it; None: it was not judged, because a figure was missing."""

    text: str
    value: float | None
    limit: float
    at_least: bool
    met: bool | None
    disturbed: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One system in one scenario. `measures` that are one number are a spread of one sample."""

    scenario: str
    about: str
    state: str
    store: str
    loop: str
    peer: str
    measures: dict[str, Spread]
    series: dict[str, Points]
    goals: tuple[Verdict, ...]
    settings: dict[str, Any]
    error: str | None
    date: str
    command: str
    values: str
    machine: dict[str, Any]

    @property
    def case(self) -> tuple[str, str, str]:
        """What systems must share to be compared within a scenario."""
        return (self.state, self.store, self.loop)

    @property
    def dropped(self) -> int:
        """Saves that were left out because other processes disturbed them."""
        found = self.measures.get("dropped")
        return round(found.median) if found else 0

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Line":
        """`KeyError`, `TypeError` or `ValueError` if it is none."""
        settings = row.get("settings") or {}
        return cls(
            scenario=row["scenario"],
            about=row.get("about", ""),
            state=row["state"],
            store=row.get("store", ""),
            loop=row.get("loop") or settings.get("loop", ""),
            peer=row["peer"],
            measures={name: _spread(value) for name, value in row["measures"].items()},
            series=row.get("series") or {},
            goals=tuple(
                Verdict(
                    goal["text"],
                    goal["value"],
                    goal["limit"],
                    goal.get("at_least", False),
                    goal["met"],
                    goal.get("disturbed", False),
                )
                for goal in row.get("goals") or ()
            ),
            settings=settings,
            error=row.get("error"),
            date=row.get("date", ""),
            command=row.get("command", ""),
            values=row.get("values", ""),
            machine=row.get("machine") or {},
        )


def read(paths: Iterable[Path]) -> list[Line]:
    """All lines of all files. `ResultsError` names the file and the line that is none."""
    found = []
    for path in paths:
        try:
            whole = path.read_text()
        except UnicodeDecodeError as error:
            raise ResultsError(f"{path} holds no results: it is no text") from error
        for number, text in enumerate(whole.splitlines(), 1):
            if not text.strip():
                continue
            try:
                found.append(Line.from_json(json.loads(text)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ResultsError(f"{path}:{number} is no result: {type(error).__name__}: {error}") from error
    return found


def sized(lines: Sequence[Line]) -> list[Line]:
    """States of one name and several sizes within a scenario get their size behind the name."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for line in lines:
        sizes.setdefault((line.scenario, line.state), set()).add(line.settings.get("raw_bytes", 0))
    return [
        replace(line, state=f"{line.state}, {line.settings['raw_bytes'] / 1e9:.3g} GB")
        if len(sizes[line.scenario, line.state]) > 1 and line.settings.get("raw_bytes")
        else line
        for line in lines
    ]


def newest(lines: Sequence[Line]) -> list[Line]:
    """The last line of each system in each case: a file that was appended to holds earlier runs too."""
    last = {(line.scenario, line.case, line.peer): line for line in lines}
    return list(last.values())


def by_scenario(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """In the order of the file."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.scenario, []).append(line)
    return found


def by_case(lines: Sequence[Line]) -> dict[tuple[str, str, str], list[Line]]:
    """Of one scenario: those that are compared with each other."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        found.setdefault(line.case, []).append(line)
    return found


def varying(cases: Iterable[tuple[str, str, str]]) -> list[str]:
    """For each case, the words that tell it from the others; the words of all where there is one."""
    cases = list(cases)
    differing = [len({case[position] for case in cases}) > 1 for position in range(3)]
    titles = ("", "store", "main thread")
    return [
        ", ".join(
            f"{title} {word}".strip()
            for word, title, differs in zip(case, titles, differing, strict=True)
            if word and (differs or len(cases) == 1)
        )
        for case in cases
    ]


def _spread(value: Any) -> Spread:
    if isinstance(value, dict):
        return Spread(*(float(value[name]) for name in ("median", "min", "max")), int(value["samples"]))
    return Spread(float(value), float(value), float(value), 1)
