"""200 saves in one process: memory and descriptors of trainer, service and workers stay what they were after the fifth."""

import gc
from dataclasses import dataclass

from benchmarks import measure
from benchmarks.peers import open_peer
from benchmarks.results import Goal, Result
from benchmarks.scenarios.base import Context, Verifier
from benchmarks.states import SERIAL, build

SAVES = 200
SETTLED = 5
EVERY = 5  # saves between two looks


@dataclass(frozen=True, slots=True)
class _Look:
    memory: measure.Memory
    descriptors: int
    threads: int


def run(context: Context) -> list[Result]:
    return [_one(context, name) for name in context.peers or ("asyncckpt",)]


def _one(context: Context, name: str) -> Result:
    spec = SERIAL.resized(context.size)
    state = build(spec)
    verifier = Verifier(state)
    verifier.touch()
    gc.collect()
    before = _look()
    peer = open_peer(name, context.folder)
    looks: list[_Look] = []
    saves = max(context.rounds or SAVES, 2 * SETTLED)
    try:
        peer.prepare(state)
        for step in range(1, saves + 1):
            state.advance()
            peer.save(step, state).wait_durable()
            verifier.check(peer, step)
            peer.forget(step)
            if step % EVERY == 0 or step == saves:
                looks.append(_look())
    finally:
        peer.close()
    settled, later = looks[0], looks[1:]
    growth_bytes = max(look.memory.total_bytes - settled.memory.total_bytes for look in later)
    drift = max((abs(look.descriptors - settled.descriptors) for look in later), default=0)
    goals = [
        Goal("most bytes above those after the fifth save", growth_bytes, 20e6),
        Goal("descriptors that differ from those after the fifth save", drift, 0),
    ]
    measures: dict[str, measure.Spread | float] = {
        "settled_bytes": settled.memory.total_bytes,
        "of_it_unmapped_bytes": settled.memory.unmapped_bytes,
        "above_start_bytes": settled.memory.total_bytes - before.memory.total_bytes,
        "growth_bytes": growth_bytes,
        "last_growth_bytes": later[-1].memory.total_bytes - settled.memory.total_bytes,
        "descriptors": measure.spread(look.descriptors for look in looks),
        "threads": measure.spread(look.threads for look in looks),
        "saves": float(saves),
    }
    settings = {"raw_bytes": spec.raw_bytes, "parameters": spec.parameters, "loop": "idle"}
    return Result("memory", spec.name, name, measures, goals if name == "asyncckpt" else [], settings)


def _look() -> _Look:
    pids = measure.tree()
    return _Look(measure.memory(pids), measure.descriptors(pids), measure.threads(pids))
