"""A checkpoint written without a Saver: flatten, plan, encode, put, commit. For tests of what reads."""

import secrets
import time
from collections.abc import Callable
from typing import Any

import torch

from asyncckpt.engine.commit import commit
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.format import keys
from asyncckpt.format.frames import encode_shard
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import Plan, ShardPlan, plan
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flattener
from asyncckpt.store.base import Store


def write_checkpoint(
    store: Store,
    step: int,
    state: Any,
    *,
    codec: str = "planes",
    shard_bytes: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
    **record: Any,
) -> str:
    """Write `state` as step `step`; returns the folder. `record`: fields of a SaveJob, such as metrics or epoch."""
    flat = Flattener().flatten(state)
    made = plan(flat.structure, codec=codec, shard_bytes=shard_bytes)
    arena = memoryview(bytearray(made.arena_bytes))
    for tensor, offset in zip(flat.tensors, made.tensor_offsets, strict=True):
        data = tensor_bytes(tensor)
        arena[offset : offset + len(data)] = data
    attempt = f"{secrets.token_hex(4)}-1"
    receipts = [_put(store, keys.folder(step, attempt), made, shard, arena) for shard in made.shards]
    fields: dict[str, Any] = {"time_s": 1.7e9 + step, "on_exists": "raise", **record}
    job = SaveJob(number=1, step=step, attempt=attempt, structure=1, arena=1, codec=made.codec, **fields)
    digests = bytes(arena[made.digests_offset : made.digests_offset + 32 * made.piece_count])
    state_file = write_state(flat.values)
    outcome = commit(store, job, IndexBuilder(made), receipts=receipts, digests=digests, state=state_file, sleep=sleep)
    assert outcome.result == "committed"
    return keys.folder(step, attempt)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """What must be stored of a tensor: the bytes of its elements in row order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _put(store: Store, folder: str, made: Plan, shard: ShardPlan, arena: memoryview) -> ShardReceipt:
    data, frames, stored = [], [], 0
    for frame in encode_shard(shard, arena, made.codec, arena[made.digests_offset :]):
        data.append(frame.data)
        frames.append((frame.raw_bytes, len(frame.data)))
        stored += len(frame.data)
    store.put(folder + shard.name, data)
    return ShardReceipt(shard.number, folder + shard.name, shard.raw_bytes, stored, tuple(frames), 0.0, 0.0)
