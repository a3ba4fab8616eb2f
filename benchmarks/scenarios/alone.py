"""Systems side by side, each in a process of its own, a new one in each round: for main threads that train on all cores.

A second thread that uses OpenMP makes more threads than there are cores, and libgomp then lets those of the training sleep at each
barrier instead of spinning (`gomp_throttled_spin_count_var` in its source): on two cores a small model trains at two thirds of its speed from the first
`dcp.async_save` in a thread until the checkpointer is closed, saves or not, and whoever saves beside it finds half a core idle. In one process that would
slow down everybody's quiet windows alike and be seen in nobody's figures.
"""

import contextlib
import dataclasses
from concurrent.futures.process import BrokenProcessPool

from benchmarks.results import Result
from benchmarks.scenarios.base import Choices, Run, Scenario, in_own_process, judged
from benchmarks.scenarios.samples import Samples, described
from benchmarks.scenarios.saves import sampled, turned
from benchmarks.states import StateSpec


def run(context: Run) -> list[Result]:
    """Every state by itself."""
    scenario = context.scenario
    return [result for spec in scenario.states for result in judged(_compare(context, spec), scenario.goals)]


def _compare(context: Run, spec: StateSpec) -> list[Result]:
    """Processes take turns, as systems do elsewhere. A system that failed is not tried again."""
    scenario = context.scenario
    found: dict[str, tuple[Result, Samples]] = {}
    for number in range(1, scenario.rounds + 1):
        for name in turned(scenario.peers, number - 1):
            before = found[name][1] if name in found else Samples()
            if before.error is None:
                result, samples = _in_child(context, spec, name)
                samples.rounds[:0] = before.rounds
                first = found[name][0] if name in found else result  # what dies later is still who it was
                found[name] = (first, samples)
    return [
        dataclasses.replace(
            result,
            measures=samples.measures(result.settings["raw_bytes"]),
            series=samples.series(),
            settings=result.settings | {"rounds": scenario.rounds},
            error=samples.error,
        )
        for result, samples in (found[name] for name in scenario.peers)
    ]


def _in_child(context: Run, spec: StateSpec, name: str) -> tuple[Result, Samples]:
    own = dataclasses.replace(context.scenario, peers=(name,), rounds=1)
    try:
        return in_own_process(_one, own, context.choices, spec)
    except BrokenProcessPool as error:  # the kernel's killer, most likely
        context.warn(name, described(error))
        return context.result(spec, None, name, measures={}), Samples(error=described(error))


def _one(scenario: Scenario, choices: Choices, spec: StateSpec) -> tuple[Result, Samples]:
    with contextlib.ExitStack() as stack:
        (found,) = sampled(Run(scenario, choices, stack), spec)
    return found
