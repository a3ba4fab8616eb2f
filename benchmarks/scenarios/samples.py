"""What one system did over all rounds, and how that becomes figures."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from benchmarks.measure import Spread, percentile, spread

FOREIGN_CORES = 0.2  # above it a round is disturbed: other processes had that many cores, on average


@dataclass(frozen=True, slots=True)
class Save:
    """One save. Seconds from the call, but `wait_s`: a training step was held, and `restore_s`, `one_tensor_s`. None: not measured."""

    call_s: float
    staged_s: float
    durable_s: float
    stored_bytes: int
    wait_s: float | None = None
    restore_s: float | None = None
    one_tensor_s: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """The saves of one window and what the loop did meanwhile. `copy_s`: a plain copy of the state, beside the same loop.

    `connections`: most that the server has had open at once so far. `plain_put_s`, `plain_get_s`: the bytes of one save, as plain HTTP.
    `lost_s`: of the loop's time, by each save. `quiet_speed`: the loop's while nothing is saved, of what it was before the system was opened.
    `put_cpu_s_per_gb`: what putting them through this package's store costs its client, alone.
    """

    saves: tuple[Save, ...]
    foreign_cores: float = 0.0
    copy_s: float | None = None
    cpu_s: float | None = None
    requests: int = 0
    connections: int | None = None
    plain_put_s: float | None = None
    plain_get_s: float | None = None
    put_cpu_s_per_gb: float | None = None
    speed: float | None = None
    quiet_speed: float | None = None
    lost_s: float | None = None
    gap_s: float | None = None
    quiet_gap_s: float | None = None
    series_name: str = "iterations_per_50ms"
    quiet_series: list[list[float]] = field(default_factory=list)
    series: list[list[float]] = field(default_factory=list)

    def summary(self) -> str:
        """For a line of progress."""
        last = self.saves[-1]
        speed = "" if self.speed is None else f"  speed {self.speed:.2f}"
        return (
            f"call {last.call_s * 1e3:.2f} ms  snapshot {last.staged_s * 1e3:.0f} ms  durable {last.durable_s:.2f} s{speed}  "
            f"foreign cores {self.foreign_cores:.2f}"
        )


@dataclass(slots=True)
class Samples:
    """All counted rounds of one system."""

    rounds: list[Round] = field(default_factory=list)
    error: str | None = None

    @contextlib.contextmanager
    def failing(self, *but: type[BaseException]) -> Iterator[None]:
        """Whatever goes wrong inside is the system's error, not the run's, except for `but` and what ends a process."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, *but):
            raise
        except BaseException as error:  # torch.distributed.checkpoint's CheckpointException is no Exception
            if ending := _of_the_end(error):
                raise ending from error
            self.error = described(error)

    def kept(self) -> list[Round]:
        """The rounds that count: those that nobody disturbed, or all when there are none such."""
        return [one for one in self.rounds if one.foreign_cores <= FOREIGN_CORES] or self.rounds

    def measures(self, raw_bytes: int) -> dict[str, Spread | float]:
        """Medians over the saves and windows that count."""
        rounds = self.kept()
        saves = [save for one in rounds for save in one.saves]
        if not saves:
            return {}
        gb = raw_bytes / 1e9
        found: dict[str, Spread | float | None] = {
            "call_s": spread(save.call_s for save in saves),
            "call_p99_s": percentile([save.call_s for save in saves], 99),
            "wait_s": _spread(save.wait_s for save in saves),
            "staged_s": spread(save.staged_s for save in saves),
            "copy_s": _spread(one.copy_s for one in rounds),
            "durable_s": spread(save.durable_s for save in saves),
            "durable_s_per_gb": spread(save.durable_s / gb for save in saves),
            "main_speed": _spread(one.speed for one in rounds),
            "quiet_speed": _spread(one.quiet_speed for one in rounds),
            "lost_s": _spread(one.lost_s for one in rounds),
            "longest_gap_s": _most(one.gap_s for one in rounds),
            "quiet_gap_s": _most(one.quiet_gap_s for one in rounds),
            "stored_bytes": spread(save.stored_bytes for save in saves),
            "stored_ratio": spread(save.stored_bytes / raw_bytes for save in saves),
            "restore_s": _spread(save.restore_s for save in saves),
            "one_tensor_s": _spread(save.one_tensor_s for save in saves),
            "cpu_s_per_gb": _spread(None if one.cpu_s is None else one.cpu_s / len(one.saves) / gb for one in rounds),
            "requests": _spread(one.requests / len(one.saves) if one.requests else None for one in rounds),
            "connections": self.rounds[0].connections,  # later counts hold those of plain copies
            "plain_put_s": _spread(one.plain_put_s for one in rounds),
            "plain_get_s": _spread(one.plain_get_s for one in rounds),
            "put_cpu_s_per_gb": _spread(one.put_cpu_s_per_gb for one in rounds),
            "saves": float(len(saves)),
            "durable_mean_s": statistics.fmean(save.durable_s for save in saves),
            "disturbed": float(len(saves)) if rounds[0].foreign_cores > FOREIGN_CORES else None,
            "dropped": float(sum(len(one.saves) for one in self.rounds) - len(saves)),
            "foreign_cores": max(one.foreign_cores for one in rounds),
        }
        if found["longest_gap_s"] is not None and found["quiet_gap_s"] is not None:
            found["gap_above_quiet_s"] = found["longest_gap_s"] - found["quiet_gap_s"]
        return {name: value for name, value in found.items() if value is not None}

    def series(self) -> dict[str, list[list[float]]]:
        """The last window that counts, and the quiet one before it: how fast the main loop was."""
        for one in reversed(self.kept()):
            if one.series:
                return {f"quiet_{one.series_name}": one.quiet_series, one.series_name: one.series}
        return {}


def _of_the_end(error: BaseException | None) -> BaseException | None:
    """What ends a process, out of an error that wraps it: DCP takes it for a failure of a rank."""
    while error is not None:
        for inner in (error, *(failure[0] for failure in getattr(error, "failures", {}).values())):
            if isinstance(inner, (KeyboardInterrupt, SystemExit)):
                return inner
        error = error.__cause__ or error.__context__
    return None


def described(error: BaseException) -> str:
    """An error in one line: its type, and the last line of its text, where a wrapped traceback names the cause."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:500]


def _spread(values: Iterable[float | None]) -> Spread | None:
    measured = [value for value in values if value is not None]
    return spread(measured) if measured else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
