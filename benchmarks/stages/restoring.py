"""What the way back costs: reading alone, decoding and verifying, scattering into objects, and a whole restore."""

import os
from collections.abc import Iterator, Sequence

import torch

import asyncckpt
from asyncckpt.engine.catalog import find_checkpoints, read_checkpoint
from asyncckpt.engine.direct import direct_paths, fill, verify
from asyncckpt.engine.fetch import anonymous_map, default_threads, fetch
from asyncckpt.engine.ranges import plan_fetch
from asyncckpt.format.index import Index
from asyncckpt.restore import read_values_of
from asyncckpt.staging import fetch_tensors
from asyncckpt.state.homes import memory_of
from asyncckpt.state.stateful import RestorePlan, plan_restore
from asyncckpt.store.base import Store
from benchmarks.stages.base import Bench, Limit, Stage, torch_threads, total
from benchmarks.stages.saving import opened, target
from benchmarks.states import State
from benchmarks.stores.base import Place


def restoring(bench: Bench, store_name: str, place: Place, state: State, known: dict[str, Stage]) -> Iterator[Stage]:
    """The newest checkpoint back: read alone, fetched and verified, scattered into objects, and all of it."""
    group = f"Restore from {store_name}"
    store = opened(place)
    step = find_checkpoints(store).good[-1]
    record, index = read_checkpoint(store, step)
    twin = state.twin()
    twin.scrub()
    raw = state.raw_bytes
    yield bench.stage(group, "record and index", lambda: read_checkpoint(store, step), state_bytes=raw, moved_bytes=0)

    def matched() -> RestorePlan:
        specs = {path: (tensor.dtype, tensor.shape) for path, tensor in index.tensors.items()}
        return plan_restore(twin.objects, index.tree, specs, read_values_of(store, record))

    yield bench.stage(group, "match state and checkpoint", matched, state_bytes=raw, moved_bytes=0)
    paths = matched().paths
    requests = plan_fetch(index, paths).requests
    largest = memoryview(bytearray(max(request.stored_bytes for request in requests)))

    def read() -> None:
        for request in requests:
            store.get_into(request.key, request.offset, largest[: request.stored_bytes])

    moved = sum(request.stored_bytes for request in requests)
    copy = known["memcpy"]
    limit = Limit(copy.name, copy.fastest_s_per_gb * moved / raw)
    yield bench.stage(group, "read alone, one connection", read, state_bytes=raw, moved_bytes=moved, limit=limit)
    parts = known["unzstd"], known["merge4"], known["blake3"]
    yield from _fetching(bench, group, store, (index, paths), parts)
    yield from _scatter(bench, group, matched(), fetch_tensors(store, index, paths), copy.as_limit())
    url, options = target(place)
    elapsed_s, cpu_s = bench.time(lambda _: asyncckpt.restore(url, twin.objects, store=options), twin.scrub)
    cores = len(os.sched_getaffinity(0))
    whole = total("", *parts, divided_by=cores)
    limit = Limit(
        f"zstd + merge + BLAKE3 on {cores} cores, new pages, memcpy",
        whole.s_per_gb + known["huge"].fastest_s_per_gb + copy.fastest_s_per_gb,
    )
    yield Stage(group, "whole restore, verified", raw, raw, elapsed_s, cpu_s, limit)
    if wrong := state.differs_from(twin):
        raise AssertionError(f"{len(wrong)} tensors differ after the restore")
    store.close()


def plainly(bench: Bench, store_name: str, place: Place, state: State, known: dict[str, Stage]) -> Iterator[Stage]:
    """The newest checkpoint back, which is stored as it is: from a folder each pass over its bytes by itself, then all of it."""
    group = f"Restore from {store_name}, codec none"
    store = opened(place)
    _, index = read_checkpoint(store, find_checkpoints(store).good[-1])
    twin = state.twin()
    twin.scrub()
    raw, cores = state.raw_bytes, len(os.sched_getaffinity(0))
    paths = direct_paths(store, index, index.tensors)
    once = total(f"memcpy + BLAKE3 on {cores} cores", known["memcpy"], known["blake3"], divided_by=cores)
    if paths:
        room = torch.empty(sum(index.tensors[path].raw_bytes for path in paths), dtype=torch.uint8).fill_(0)
        places, start = {}, 0
        for path in paths:
            size = index.tensors[path].raw_bytes
            places[path] = memory_of(room[start : start + size])
            start += size
        moved = room.nbytes
        yield bench.stage(group, "verify", lambda: verify(store, index, paths), moved_bytes=moved, limit=once)
        yield bench.stage(
            group, "fill places that are there", lambda: fill(store, index, places), moved_bytes=moved, limit=once
        )
        del places
    url, options = target(place)
    elapsed_s, cpu_s = bench.time(lambda _: asyncckpt.restore(url, twin.objects, store=options), twin.scrub)
    limit = Limit("twice " + once.text, 2 * once.s_per_gb) if paths else once
    yield Stage(group, "whole restore, verified", raw, raw, elapsed_s, cpu_s, limit)
    if wrong := state.differs_from(twin):
        raise AssertionError(f"{len(wrong)} tensors differ after the restore")
    store.close()


def _fetching(
    bench: Bench, group: str, store: Store, wanted: tuple[Index, Sequence[str]], parts: Sequence[Stage]
) -> Iterator[Stage]:
    """Ranges read, decoded and verified, by one thread and by as many as a restore takes."""
    index, paths = wanted
    target_bytes = plan_fetch(index, paths).target_bytes
    touched = anonymous_map(target_bytes)
    for threads in dict.fromkeys((1, default_threads(store))):
        cores = min(threads, len(os.sched_getaffinity(0)))
        limit = total(f"zstd + merge + BLAKE3 on {cores} core{'s'[: cores - 1]}", *parts, divided_by=cores)
        name = f"fetch and verify, pages there, {threads} thread{'s'[: threads - 1]}"

        def work(threads: int = threads) -> None:
            fetch(store, index, paths, into=lambda size: touched[:size], threads=threads)

        yield bench.stage(group, name, work, state_bytes=target_bytes, limit=limit)


def _scatter(
    bench: Bench, group: str, plan: RestorePlan, tensors: dict[str, torch.Tensor], limit: Limit
) -> Iterator[Stage]:
    """From the one map into every object, after all was verified; their pages are there."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    for threads in torch_threads():
        name = f"scatter into the objects, {threads} torch thread{'s'[: threads - 1]}"
        yield bench.stage(group, name, lambda: plan.apply(tensors.__getitem__), state_bytes=size, limit=limit)
