"""Durable, snapshot and the main loop's own speed while 1 GB is saved beside a main thread that works."""

from dataclasses import replace

from benchmarks.measure import spread
from benchmarks.results import Goal, Result
from benchmarks.scenarios.base import Context, compare, median, results
from benchmarks.states import DENSE

ROUNDS = 5
PEERS = ("asyncckpt", "dcp-thread")
LOOP = "python"


def run(context: Context) -> list[Result]:
    loop = context.loop or LOOP
    spec = DENSE.resized(context.size)
    samples = compare(context, spec, loop, context.peers or PEERS, context.rounds or ROUNDS)
    found = results("busy", spec, loop, samples)
    ours, theirs = samples.get("asyncckpt"), samples.get("dcp-thread")
    if loop != LOOP or ours is None or not ours.savings:
        return found
    goals = [
        Goal("seconds until the snapshot is complete", median(ours, "staged_s"), 0.120),
        Goal("main loop's speed while saving, of its own", spread(ours.speed).median, 0.95, at_least=True),
    ]
    if theirs is not None and theirs.savings:
        goals.append(
            Goal("durable, of dcp-thread's time", median(ours, "durable_s") / median(theirs, "durable_s"), 0.45)
        )
    return [replace(result, goals=goals) if result.peer == "asyncckpt" else result for result in found]
