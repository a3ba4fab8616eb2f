"""Goals as data: a figure of one system, alone or beside another figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Spread
from benchmarks.results import Goal, Result

ASYNCHRONOUS = "best asynchronous peer"
EVERYBODY = "best peer"
OURS = "asyncckpt"


@dataclass(frozen=True, slots=True)
class GoalSpec:
    """`measure` of `peer`, at most (or `at_least`) `limit`.

    `against`: names of peers, or `ASYNCHRONOUS`, or `EVERYBODY`: the figure is divided by the best of theirs. `of`: it is divided
    by another measure of the same system. Figures are medians.
    """

    text: str
    measure: str
    limit: float
    at_least: bool = False
    against: tuple[str, ...] = ()
    of: str | None = None
    peer: str = OURS


def judge(spec: GoalSpec, results: Sequence[Result]) -> Goal | None:
    """The goal on these results of one state, without a value when a figure that it needs is missing; None: the system is not there."""
    own = next((result for result in results if result.peer == spec.peer), None)
    if own is None:
        return None
    value, rival = _value(spec, own, results)
    disturbed = any("disturbed" in result.measures for result in (own, rival) if result is not None)
    return Goal(spec.text, value, spec.limit, spec.at_least, disturbed and value is not None)


def _value(spec: GoalSpec, own: Result, results: Sequence[Result]) -> tuple[float | None, Result | None]:
    """The figure that is judged, and the rival that it is divided by."""
    value = figure(own, spec.measure)
    divisors = [figure(own, spec.of)] if spec.of is not None else []
    rival = None
    if spec.against:
        measured = [
            (found, result)
            for result in results
            if _is_meant(result, spec.against) and (found := figure(result, spec.measure)) is not None
        ]
        best = (max if spec.at_least else min)(measured, key=lambda pair: pair[0], default=(None, None))
        divisors.append(best[0])
        rival = best[1]
    for divisor in divisors:
        if value is None or not divisor:
            return None, rival
        value /= divisor
    return value, rival


def figure(result: Result, measure: str) -> float | None:
    """The median of a measure, or the measure itself."""
    found = result.measures.get(measure)
    return found.median if isinstance(found, Spread) else found


def _is_meant(result: Result, against: tuple[str, ...]) -> bool:
    if result.peer.startswith(OURS):
        return result.peer in against
    everybody = EVERYBODY in against or (ASYNCHRONOUS in against and result.settings.get("asynchronous", False))
    return everybody or result.peer in against
