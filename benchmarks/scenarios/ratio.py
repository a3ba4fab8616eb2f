"""Stored bytes of a really trained model, nothing repeated: weights and AdamW state in fp32, and its weights cast to bf16."""

from benchmarks.measure import spread
from benchmarks.peers.asyncckpt import AsyncCkpt
from benchmarks.results import Goal, Result
from benchmarks.scenarios.base import Context, Verifier
from benchmarks.states import State, as_trained

SAVES = 5
LIMITS = {"trained model, fp32 + AdamW": 0.86, "trained model, bf16 weights": 0.70}


def run(context: Context) -> list[Result]:
    states = (as_trained("float32", adamw=True), as_trained("bfloat16", adamw=False))
    return [_one(context, name, state) for name, state in zip(LIMITS, states, strict=True)]


def _one(context: Context, name: str, state: State) -> Result:
    verifier = Verifier(state)
    peer = AsyncCkpt(context.folder / name.replace(" ", "-"))
    ratios, encode_gb_per_s = [], []
    try:
        for step in range(1, (context.rounds or SAVES) + 1):
            peer.save(step, state).wait_durable()
            verifier.check(peer, step)
            ratios.append(peer.stored_bytes(step) / state.raw_bytes)
            encode_gb_per_s.append(state.raw_bytes / 1e9 / peer.reports[step].encode_s)
            peer.forget(step)
            state.advance()
    finally:
        peer.close()
    measures = {
        "raw_bytes": float(state.raw_bytes),
        "stored_ratio": spread(ratios),
        "encode_gb_per_s": spread(encode_gb_per_s),  # of one worker: raw bytes over its busy seconds
    }
    goals = [Goal("stored bytes, of raw bytes", spread(ratios).median, LIMITS[name])]
    return Result("ratio", name, peer.name, measures, goals, {"raw_bytes": state.raw_bytes})
