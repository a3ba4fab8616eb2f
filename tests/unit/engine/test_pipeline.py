"""One encoder beside its uploads: order, bounds, and what happens when a request fails."""

import gc
import os
import threading

import numpy as np
import pytest

from asyncckpt import errors
from asyncckpt.engine.job import SaveJob
from asyncckpt.engine.pipeline import ALL_UPLOADS, LOCAL_UPLOADS, REMOTE_UPLOADS, ByteBudget, Pipeline, upload_threads
from asyncckpt.format.plan import Group, Structure, TensorSpec, plan
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore

PATIENCE_S = 15.0


class Rig:
    """A pipeline over a store, and one state of float32 tensors of `sizes` elements in an arena."""

    def __init__(self, store, sizes=(3_000_000,), codec="none", part_bytes=None, budget_bytes=None, **options):
        self.store = store
        tensors = tuple(TensorSpec(0, f"t{number}", "float32", (size,)) for number, size in enumerate(sizes))
        tree = {"dict": {"m": {"dict": {f"t{number}": "tensor" for number in range(len(sizes))}}}}
        self.plan = plan(Structure((Group("m", "m"),), tensors, (), tree), codec=codec, shard_bytes=2**30)
        self.arena = memoryview(bytearray(self.plan.arena_bytes))
        random = np.random.default_rng(0)
        for tensor, offset in zip(tensors, self.plan.tensor_offsets, strict=True):
            data = random.standard_normal(tensor.shape[0]).astype(np.float32).tobytes()
            self.arena[offset : offset + len(data)] = data
        self.job = SaveJob(1, 10, "aaaaaaaa-000001", structure=1, arena=1, codec=codec, time_s=0.0)
        self.pipeline = Pipeline(store, **options)
        if part_bytes:
            self.pipeline.part_bytes = part_bytes
        if budget_bytes:
            self.pipeline.budget = ByteBudget(budget_bytes)

    def put(self, shard=0):
        """(receipt, error) of one shard."""
        answers = []
        ended = threading.Event()

        def done(receipt, error):
            answers.append((receipt, error))
            ended.set()

        self.pipeline.put_shard(self.job, self.plan, self.plan.shards[shard], self.arena, done)
        assert ended.wait(PATIENCE_S), "the shard got no answer"
        self.pipeline.close()
        assert len(answers) == 1
        return answers[0]

    def stored(self, receipt):
        return self.store.get(receipt.key, max_bytes=2**30)


def check(rig, receipt):
    """The receipt describes the object exactly."""
    data = rig.stored(receipt)
    assert receipt.stored_bytes == len(data)
    assert receipt.raw_bytes == rig.plan.shards[0].raw_bytes
    raw = stored = 0
    for raw_bytes, stored_bytes in receipt.frames:
        raw, stored = raw + raw_bytes, stored + stored_bytes
    assert (raw, stored) == (receipt.raw_bytes, receipt.stored_bytes)


@pytest.mark.parametrize("codec", ["none", "zstd", "planes"])
@pytest.mark.parametrize("part_bytes", [2**20, 2**30])
def test_a_shard_arrives_whole_in_one_put_or_in_parts(codec, part_bytes):
    calls = FaultyStore(MemoryStore(), operations={"put", "write", "complete"})
    rig = Rig(calls, codec=codec, part_bytes=part_bytes)
    receipt, error = rig.put()
    assert error is None
    check(rig, receipt)
    kinds = [operation for operation, _ in calls.calls]
    if part_bytes == 2**30:
        assert kinds == ["put"]
    else:
        assert kinds.count("write") >= 3
        assert kinds.count("complete") == 1
    if codec == "none":
        assert rig.stored(receipt) == rig.plan.shards[0].header + bytes(rig.arena[: rig.plan.data_bytes])


@pytest.mark.parametrize(("over", "parts"), [(1.02, 0), (1.4, 0), (1.6, 2), (2.02, 2), (3.02, 3)])
def test_a_shard_leaves_no_small_rest_for_a_part_of_its_own(over, parts):
    """Each request costs CPU: a shard of one part's size and its header are one put, not an upload of one part and a rest."""
    blocks = 4 * 2**20
    calls: list[tuple[str, int]] = []

    class Counting(MemoryStore):
        def put(self, key, data, *, if_absent=False):
            calls.append(("put", sum(map(len, data))))
            super().put(key, data, if_absent=if_absent)

        def start_upload(self, key):
            upload = super().start_upload(key)
            write = upload.write

            def counted(part, offset, data):
                calls.append(("part", sum(map(len, data))))
                write(part, offset, data)

            upload.write = counted
            return upload

    rig = Rig(Counting(), sizes=(int(over * 4 * blocks / 4),), part_bytes=4 * blocks)
    receipt, error = rig.put()
    assert error is None
    check(rig, receipt)
    sent = [size for kind, size in calls if kind == "part"]
    assert len(sent) == parts
    assert all(size > 2 * blocks for size in sent)


def test_the_digest_of_every_piece_is_left_in_the_arena():
    rig = Rig(MemoryStore(), sizes=(100, 2_000_000, 5))  # the second has two pieces
    rig.put()
    end = rig.plan.digests_offset + 32 * rig.plan.piece_count
    table = bytes(rig.arena[rig.plan.digests_offset : end])
    assert len({table[at : at + 32] for at in range(0, len(table), 32)} - {bytes(32)}) == 4


def test_a_shard_without_tensor_bytes_is_stored_too():
    rig = Rig(MemoryStore(), sizes=(0,))
    receipt, error = rig.put()
    assert error is None
    check(rig, receipt)


def test_bytes_in_flight_are_bounded():
    budget_bytes = 8 * 2**20

    class Slow(MemoryStore):
        def start_upload(self, key):
            upload = super().start_upload(key)
            write = upload.write

            def slow_write(part, offset, data):
                with lock:
                    seen.append(rig.pipeline.budget._used)
                write(part, offset, data)

            upload.write = slow_write
            return upload

    lock = threading.Lock()
    seen = []
    rig = Rig(Slow(), sizes=(12_000_000,), part_bytes=2**20, budget_bytes=budget_bytes)
    receipt, _ = rig.put()
    check(rig, receipt)
    assert 0 < max(seen) <= budget_bytes
    assert rig.pipeline.budget._used == 0


@pytest.mark.parametrize("budget_bytes", [1, 2**20, 3 * 2**20])
def test_a_budget_smaller_than_a_part_does_not_stop_the_encoder_for_ever(budget_bytes):
    """Many workers share the budget, and S3 asks for parts of 5 MiB."""
    rig = Rig(MemoryStore(), part_bytes=5 * 2**20, budget_bytes=budget_bytes)
    receipt, error = run_with_patience(rig.put)
    assert error is None
    check(rig, receipt)


def test_a_worker_among_many_still_has_room_for_a_part_of_s3():
    class PartsOfFive(MemoryStore):
        min_part_bytes = 5 * 2**20

    rig = Rig(PartsOfFive(), sizes=(8_000_000,), workers=256)
    receipt, error = run_with_patience(rig.put)
    assert error is None
    check(rig, receipt)


def run_with_patience(work):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"
    return answers[0]


@pytest.mark.parametrize("operation", ["start_upload", "write", "complete"])
def test_a_failed_part_fails_the_shard_and_aborts_the_upload(operation):
    calls = FaultyStore(MemoryStore(), {1}, operations={operation}, error=lambda: errors.DiskFullError("full"))
    aborted = FaultyStore(calls, operations={"abort"})
    rig = Rig(aborted, part_bytes=2**20)
    receipt, error = rig.put()
    assert receipt is None
    assert isinstance(error, errors.DiskFullError)
    assert list(rig.store.list()) == []
    assert len(aborted.calls) == (operation != "start_upload")
    assert rig.pipeline.budget._used == 0


def test_a_failed_put_fails_the_shard():
    store = FaultyStore(MemoryStore(), {1}, operations={"put"}, error=lambda: errors.StoreAuthError("no"))
    rig = Rig(store, sizes=(100,))
    receipt, error = rig.put()
    assert receipt is None
    assert isinstance(error, errors.StoreAuthError)
    assert rig.pipeline.budget._used == 0


def test_an_encoder_that_fails_answers_and_aborts():
    aborted = FaultyStore(MemoryStore(), operations={"abort"})
    rig = Rig(aborted, part_bytes=2**20)
    rig.arena = rig.arena[: rig.plan.digests_offset - 100]  # the last block cannot be read
    receipt, error = rig.put()
    assert receipt is None
    assert error is not None
    assert list(rig.store.list()) == []
    assert rig.pipeline.budget._used == 0


@pytest.mark.parametrize("operation", ["put", "start_upload", "write", "complete"])
def test_a_failed_shard_holds_no_view_of_the_arena(operation):
    """Else an arena could not be unmapped, and `close()` would raise."""
    store = FaultyStore(MemoryStore(), {1}, operations={operation}, error=lambda: errors.StoreAuthError("no"))
    rig = Rig(store, part_bytes=2**30 if operation == "put" else 2**20)
    base = bytearray(rig.arena)
    rig.arena = memoryview(base)
    gc.disable()
    try:
        assert isinstance(rig.put()[1], errors.StoreAuthError)
        rig.arena.release()
        base.append(0)  # refused while anybody looks at it
    finally:
        gc.enable()


def test_the_threads_are_gone_after_close():
    before = threading.active_count()
    pipeline = Pipeline(MemoryStore())
    assert threading.active_count() == before + LOCAL_UPLOADS
    pipeline.close()
    assert threading.active_count() == before


def test_close_finishes_what_was_given():
    pipeline = Pipeline(MemoryStore())
    gate, ran = threading.Event(), []
    for number in range(2 * LOCAL_UPLOADS):
        pipeline.run(lambda number=number: (gate.wait(PATIENCE_S), ran.append(number)))
    gate.set()
    pipeline.close()
    assert sorted(ran) == list(range(2 * LOCAL_UPLOADS))


def test_progress_is_told_while_a_shard_is_encoded():
    beats = []
    rig = Rig(MemoryStore(), progress=lambda: beats.append(os.getpid()))
    rig.put()
    assert len(beats) > 3


def test_all_workers_together_open_a_bounded_number_of_connections():
    class FarStore(MemoryStore):
        min_part_bytes = 5 * 2**20

    assert upload_threads(FarStore(), 1) == REMOTE_UPLOADS
    assert upload_threads(MemoryStore(), 1) == LOCAL_UPLOADS
    for workers in (1, 2, 8, 32):
        assert workers * upload_threads(FarStore(), workers) <= ALL_UPLOADS


def test_views_of_the_arena_take_nothing_of_the_budget():
    taken = []

    class Counting(ByteBudget):
        def take(self, count, *, unsent):
            taken.append(count)
            super().take(count, unsent=unsent)

    for codec in ("none", "zstd"):
        rig = Rig(MemoryStore(), codec=codec)
        rig.pipeline.budget = Counting(2**30)
        taken.clear()
        _, error = rig.put()
        assert error is None
        assert (sum(taken) < 2**16) == (codec == "none")
        assert rig.pipeline.budget._used == 0
