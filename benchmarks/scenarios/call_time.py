"""How long `save()` holds the training loop, from the third save on."""

import itertools

from benchmarks.measure import Observer, Spread, percentile, spread
from benchmarks.peers import open_peer
from benchmarks.results import Goal, Result
from benchmarks.scenarios.base import Context, Verifier
from benchmarks.states import DENSE, FEW, SMALL, StateSpec, build

SAVES = 20
LIMIT_S = {FEW.name: 1e-3, SMALL.name: 30e-3}


def run(context: Context) -> list[Result]:
    found = []
    for spec in (FEW, DENSE, SMALL):
        found += [_one(context, spec.resized(context.size), name) for name in context.peers or ("asyncckpt",)]
    return found


def _one(context: Context, spec: StateSpec, name: str) -> Result:
    state = build(spec)
    verifier = Verifier(state)
    folder = context.folder / str(spec.parameters)
    peer = open_peer(name, folder)
    savings, restored_s = [], []
    foreign_cores = []
    try:
        peer.prepare(state)
        for step in itertools.islice(itertools.count(1), (context.rounds or SAVES) + 2):
            state.advance()
            observer = Observer()
            saving = peer.save(step, state)
            saving.wait_durable()
            foreign_cores.append(observer.stop().foreign_cores)
            restored_s.append(verifier.check(peer, step))
            peer.forget(step)
            savings.append(saving)
    finally:
        peer.close()
    calls_s = [saving.returned_s for saving in savings[2:]]
    measures: dict[str, Spread | float] = {
        "call_s": spread(calls_s),
        "call_p99_s": percentile(calls_s, 99),
        "staged_s": spread(saving.staged_s for saving in savings[2:]),
        "durable_s": spread(saving.durable_s for saving in savings[2:]),
        "first_call_s": savings[0].returned_s,
        "restore_s": spread(restored_s),
        "foreign_cores": max(foreign_cores),
    }
    limit_s = LIMIT_S.get(spec.name)
    goals = []
    if name == "asyncckpt" and limit_s is not None:
        goals = [Goal("median seconds until save() returns", spread(calls_s).median, limit_s)]
    settings = {"raw_bytes": spec.raw_bytes, "parameters": spec.parameters, "loop": "idle"}
    return Result("call_time", spec.name, name, measures, goals, settings)
