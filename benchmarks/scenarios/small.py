"""20,000 tensors of 10 kB: what a tensor costs, apart from its bytes."""

from dataclasses import replace

from benchmarks.results import Goal, Result
from benchmarks.scenarios.base import Context, compare, median, results
from benchmarks.states import SMALL

ROUNDS = 3
PEERS = ("asyncckpt", "dcp-thread")
LOOP = "idle"  # the best case of a saver that works on a thread


def run(context: Context) -> list[Result]:
    loop = context.loop or LOOP
    spec = SMALL.resized(context.size)
    samples = compare(context, spec, loop, context.peers or PEERS, context.rounds or ROUNDS)
    found = results("small", spec, loop, samples)
    ours, theirs = samples.get("asyncckpt"), samples.get("dcp-thread")
    if ours is None or theirs is None or not ours.savings or not theirs.savings:
        return found
    goal = Goal("durable, of dcp-thread's time", median(ours, "durable_s") / median(theirs, "durable_s"), 0.1)
    return [replace(result, goals=[goal]) if result.peer == "asyncckpt" else result for result in found]
