"""What the way into a store costs: requests alone, the encoder beside them, and a whole save."""

import itertools
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import asyncckpt
from asyncckpt.engine.job import SaveJob, ShardReceipt
from asyncckpt.engine.pipeline import REMOTE_UPLOADS, Pipeline
from asyncckpt.events import SaveReport
from asyncckpt.format.digest import Buffer
from asyncckpt.format.plan import Plan
from asyncckpt.options import StoredCodec
from asyncckpt.store.base import Store
from asyncckpt.store.opening import open_store
from benchmarks.measure import spread
from benchmarks.stages.base import Bench, Limit, Stage, total
from benchmarks.states import State
from benchmarks.stores.base import Place

_SOCKET_BYTES = 2**20
_NO_BYTES = ("save() returned", "state, index and record")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A snapshot, and the stored buffers of each of its shards."""

    plan: Plan
    arena: memoryview
    stored: Sequence[list[Buffer]]


def saving(bench: Bench, store_name: str, place: Place, encoded: Encoded, known: dict[str, Stage]) -> Iterator[Stage]:
    """Puts of encoded shards alone, then encoding and puts as one worker makes them side by side."""
    group = f"Way to {store_name}"
    plan, stored = encoded.plan, encoded.stored
    size = plan.data_bytes
    moved = sum(len(data) for buffers in stored for data in buffers)
    store = opened(place)
    key_numbers = itertools.count()

    def key() -> str:
        return f"put-{next(key_numbers)}"

    if place.folder is None:
        wire = _wire(bench, group, moved, size)
        yield wire
        limit, connections = wire.as_limit(), (1, REMOTE_UPLOADS)
    else:
        write = known["tmpfs"]
        limit, connections = Limit(write.name, write.fastest_s_per_gb * moved / size), (1,)
    puts = []
    for count in connections:
        with ThreadPoolExecutor(count) as threads:

            def put(keys: list[str], threads: ThreadPoolExecutor = threads) -> None:
                for done in [threads.submit(store.put, k, data) for k, data in zip(keys, stored, strict=True)]:
                    done.result()

            elapsed_s, cpu_s = bench.time(put, lambda: [key() for _ in stored], store.delete)
        name = f"put of encoded shards, {count} at once"
        puts.append(Stage(group, name, size, moved, elapsed_s, cpu_s, limit))
        yield puts[-1]
    yield _one_worker(bench, group, store, encoded, total("BLAKE3 + split + zstd", *_encoding(known)))
    store.close()


def _encoding(known: dict[str, Stage]) -> tuple[Stage, Stage, Stage]:
    return known["blake3"], known["split4"], known["zstd"]


def _one_worker(bench: Bench, group: str, store: Store, encoded: Encoded, limit: Limit) -> Stage:
    """Every shard through one Pipeline: from the first until the store has the last."""
    numbers = itertools.count()
    plan, arena = encoded.plan, encoded.arena

    def job() -> SaveJob:
        number = next(numbers)
        return SaveJob(number, number, f"00000000-{number}", 0, 0, "planes", 0.0)

    def put(job: SaveJob) -> None:
        pipeline, failures = Pipeline(store), []

        def done(_: ShardReceipt | None, error: BaseException | None) -> None:
            failures.extend([error] if error else [])

        for shard in plan.shards:
            pipeline.put_shard(job, plan, shard, arena, done)
        pipeline.close()
        if failures:
            raise failures[0]

    def remove(_: SaveJob) -> None:
        store.delete([entry.key for entry in store.list("step-")])

    elapsed_s, cpu_s = bench.time(put, job, remove)
    return Stage(
        group, "encode and put, one worker's pipeline", plan.data_bytes, plan.data_bytes, elapsed_s, cpu_s, limit
    )


def _wire(bench: Bench, group: str, moved: int, state_bytes: int) -> Stage:
    """As many bytes through one TCP connection of this machine, sender and receiver on threads of this process."""
    data = memoryview(bytearray(_SOCKET_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()

        def receive() -> None:
            target, left = bytearray(_SOCKET_BYTES), moved
            while left > 0:
                left -= receiver.recv_into(target)

        def send() -> None:
            thread = threading.Thread(target=receive)
            thread.start()
            for start in range(0, moved, _SOCKET_BYTES):
                sender.sendall(data[: min(_SOCKET_BYTES, moved - start)])
            thread.join()

        with receiver:
            return bench.stage(
                group, "TCP over loopback, one connection", send, state_bytes=state_bytes, moved_bytes=moved
            )


def saves(
    bench: Bench, store_name: str, place: Place, state: State, known: dict[str, Stage], *, codec: StoredCodec
) -> Iterator[Stage]:
    """Whole saves from their calls on, beside an idle main thread, as the saver's own reports tell; leaves the last one there."""
    group = f"Whole save to {store_name}, codec {codec}, idle main thread"
    reports: list[SaveReport] = []
    url, options = target(place)
    with asyncckpt.Saver(url, codec=codec, store=options, keep=[asyncckpt.KeepLast(1)]) as saver:
        saver.prepare(state.objects)
        for step in range(1, bench.rounds + 2):
            state.advance()
            reports.append(saver.save(step, state.objects).result())
    kept = reports[1:]
    copy = known["copy"]
    parts = _encoding(known) if codec == "planes" else (known["blake3"],)
    words = "BLAKE3 + split + zstd" if codec == "planes" else "BLAKE3"
    workers = len(os.sched_getaffinity(0))
    encode = total(f"{words} on {workers} cores", *parts, divided_by=workers)
    rows: list[tuple[str, list[float], Limit | None]] = [
        ("save() returned", [report.call_s for report in kept], None),
        ("snapshot complete", [report.staged_s for report in kept], copy.as_limit()),
        ("busy seconds of encoders", [report.encode_s for report in kept], total("the same", *parts)),
        ("busy seconds of connections", [report.upload_s for report in kept], None),
        ("state, index and record", [report.commit_s for report in kept], None),
        (
            "durable",
            [report.total_s for report in kept],
            Limit(f"copy, then {encode.text}", copy.fastest_s_per_gb + encode.s_per_gb),
        ),
    ]
    for name, seconds, limit in rows:
        elapsed_s = spread(seconds)
        moved_bytes = None if name in _NO_BYTES else state.raw_bytes
        yield Stage(group, name, state.raw_bytes, moved_bytes, elapsed_s, None, limit)


def opened(place: Place) -> Store:
    """The package's own store, as a save opens it."""
    url, options = target(place)
    return open_store(url, options)


def target(place: Place) -> tuple[str, asyncckpt.S3Options | None]:
    """What the front doors are given for a place."""
    if place.folder is not None:
        return str(place.folder), None
    assert place.url is not None
    return place.url, asyncckpt.S3Options(endpoint_url=place.endpoint_url, region=place.region)
