"""What a stage is, how one is timed, and the table of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.measure import Spread, spread

_Prepared = TypeVar("_Prepared")


@dataclass(frozen=True, slots=True)
class Limit:
    """What a stage cannot be faster than. `s_per_gb`: seconds for each GB of state, in the fastest run: noise only adds."""

    text: str
    s_per_gb: float


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, timed alone.

    `moved_bytes`: what it reads or writes once, whichever the stage is about, None where bytes are not what it takes time for;
    `state_bytes`: of how much state. They differ where encoded bytes move. `cpu_s`: of this process, None where others work. `ratio`: stored by plain bytes, `floor`: the least that a coder of single bytes can reach.
    """

    group: str
    name: str
    state_bytes: int
    moved_bytes: int | None
    elapsed_s: Spread
    cpu_s: float | None = None
    limit: Limit | None = None
    ratio: float | None = None
    floor: float | None = None

    @property
    def s_per_gb(self) -> float:
        """Seconds for each GB of state."""
        return self.elapsed_s.median / self.state_bytes * 1e9

    @property
    def fastest_s_per_gb(self) -> float:
        """The fastest run's."""
        return self.elapsed_s.min / self.state_bytes * 1e9

    @property
    def gb_per_s(self) -> float | None:
        """Of moved bytes."""
        return None if self.moved_bytes is None else self.moved_bytes / self.elapsed_s.median / 1e9

    @property
    def cpu_s_per_gb(self) -> float | None:
        """CPU seconds of this process for each GB of state: what a stage costs, however long it had to wait for a core."""
        return None if self.cpu_s is None else self.cpu_s / self.state_bytes * 1e9

    def as_limit(self) -> Limit:
        """Of another stage that can do no less than this one."""
        return Limit(self.name, self.fastest_s_per_gb)

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "stage": self.name,
            "state_bytes": self.state_bytes,
            "moved_bytes": self.moved_bytes,
            "elapsed_s": self.elapsed_s.to_json(),
            "cpu_s": self.cpu_s,
            "gb_per_s": self.gb_per_s,
            "s_per_gb": self.s_per_gb,
            "cpu_s_per_gb": self.cpu_s_per_gb,
            "limit": None if self.limit is None else {"text": self.limit.text, "s_per_gb": self.limit.s_per_gb},
            "ratio": self.ratio,
            "floor": self.floor,
        }


def total(text: str, *stages: Stage, divided_by: int = 1) -> Limit:
    """The limit of a stage that must do all of these, side by side on `divided_by` cores."""
    return Limit(text, sum(stage.fastest_s_per_gb for stage in stages) / divided_by)


@dataclass(frozen=True, slots=True)
class Bench:
    """Choices of the command line. `folder`: scratch in memory. `store`: a store of `benchmarks.stores` to put to, or None."""

    state_bytes: int
    rounds: int
    folder: Path
    store: str | None = None

    def time(
        self,
        work: Callable[[_Prepared], Any],
        before: Callable[[], _Prepared],
        after: Callable[[_Prepared], Any] = lambda _: None,
    ) -> tuple[Spread, float]:
        """Elapsed seconds of `work`, and CPU seconds of this process meanwhile; the first run is not counted."""
        elapsed_s, used_s = [], []
        for _ in range(self.rounds + 1):
            prepared = before()
            started_s, cpu_s = time.perf_counter(), time.process_time()
            work(prepared)
            elapsed_s.append(time.perf_counter() - started_s)
            used_s.append(time.process_time() - cpu_s)
            after(prepared)
            del prepared
        return spread(elapsed_s[1:]), spread(used_s[1:]).median

    def stage(
        self,
        group: str,
        name: str,
        work: Callable[[], Any],
        *,
        state_bytes: int | None = None,
        moved_bytes: int | None = None,
        limit: Limit | None = None,
    ) -> Stage:
        """Time something that needs nothing made or undone around it. It moves the whole state unless it says otherwise."""
        elapsed_s, cpu_s = self.time(lambda _: work(), lambda: None)
        state_bytes = state_bytes or self.state_bytes
        moved_bytes = state_bytes if moved_bytes is None else moved_bytes
        return Stage(group, name, state_bytes, moved_bytes or None, elapsed_s, cpu_s, limit)


def torch_threads() -> Iterator[int]:
    """One, then as many as torch takes by itself: torch has so many while the caller handles each."""
    usual = torch.get_num_threads()
    try:
        for threads in dict.fromkeys((1, usual)):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(usual)


def table(stages: Sequence[Stage]) -> str:
    """Markdown, one table a group."""
    groups = dict.fromkeys(stage.group for stage in stages)
    return "\n\n".join(_one_table(group, [stage for stage in stages if stage.group == group]) for group in groups)


def _one_table(group: str, stages: Sequence[Stage]) -> str:
    ratios = any(stage.ratio is not None for stage in stages)
    head = [
        "stage",
        "GB/s",
        "s per GB of state (min .. max)",
        "CPU s per GB",
        "limit: fastest, s per GB",
        "of the limit's speed",
    ]
    rows = [head + (["ratio", "order-0 entropy of 128 KiB"] if ratios else [])]
    for stage in stages:
        row = [stage.name, _or_blank(stage.gb_per_s), _s_per_gb(stage), _or_blank(stage.cpu_s_per_gb)]
        if stage.limit is None:
            row += ["", ""]
        else:
            reached = stage.limit.s_per_gb / stage.fastest_s_per_gb
            row += [f"{stage.limit.text}: {_digits(stage.limit.s_per_gb)}", f"{reached:.0%}"]
        if ratios:
            row += [_ratio(stage.ratio), _ratio(stage.floor)]
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join([f"### {group}", "", *lines])


def _s_per_gb(stage: Stage) -> str:
    per_gb = 1e9 / stage.state_bytes
    text = _digits(stage.s_per_gb)
    if stage.elapsed_s.samples == 1:
        return text
    return f"{text} ({_digits(stage.elapsed_s.min * per_gb)} .. {_digits(stage.elapsed_s.max * per_gb)})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _or_blank(value: float | None) -> str:
    return "" if value is None else _digits(value)


def _digits(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value >= 99.5:
        return f"{value:,.0f}"
    if value >= 9.95:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.995 else f"{value:.2g}"
