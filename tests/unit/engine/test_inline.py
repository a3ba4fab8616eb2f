"""The in-process engine, without a Saver around it."""

import gc
import threading
import time

import pytest

from asyncckpt import KeepLast, RetryPolicy, errors, events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.inline import InlineEngine
from asyncckpt.engine.job import SaveJob
from asyncckpt.engine.pipeline import ByteBudget
from asyncckpt.format.plan import Group, Structure, TensorSpec, plan
from asyncckpt.restore import load
from asyncckpt.state.statefile import write_state
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from tests.faulty import FaultyStore
from tests.processes import eventually

PATIENCE_S = 15.0


class Answers:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.ends = {}
        self.events = []
        self.changed = threading.Condition()

    def ended(self, number, outcome, error):
        with self.changed:
            assert number not in self.ends, "answered twice"
            self.ends[number] = (outcome, error)
            self.changed.notify_all()

    def event(self, event):
        self.events.append(event)

    def of(self, number):
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.ends, PATIENCE_S), f"save {number} got no answer"
            return self.ends[number]


class Rig:
    def __init__(self, store, keep=(), *, codec="none", shard_bytes=None, retry=None):
        tensors = tuple(TensorSpec(0, f"t{number}", "float32", (1000,)) for number in range(3))
        tree = {"dict": {"m": {"dict": {f"t{number}": "tensor" for number in range(3)}}}}
        self.plan = plan(Structure((Group("m", "m"),), tensors, (), tree), codec=codec, shard_bytes=shard_bytes)
        self.shard_bytes = shard_bytes
        self.answers = Answers()
        self.arena = Arena.create(1, self.plan.arena_bytes, shared=False)
        self.engine = InlineEngine(store, keep, self.answers, retry=retry)
        self.engine.start()

    def submit(self, number, step=None, **fields):
        step = number if step is None else step
        job = SaveJob(
            number,
            step,
            f"aaaaaaaa-{number:06d}",
            structure=1,
            arena=1,
            codec=self.plan.codec,
            shard_bytes=self.shard_bytes,
            time_s=0.0,
            **fields,
        )
        self.engine.submit(job, self.plan, self.arena, write_state({}))

    def close(self):
        self.engine.close()
        self.arena.close()


@pytest.fixture
def rig():
    made = Rig(MemoryStore())
    yield made
    made.close()


def test_saves_are_committed_one_after_the_other(rig):
    for number in range(1, 6):
        rig.submit(number)
    for number in range(1, 6):
        assert rig.answers.of(number)[0].result == "committed"


def test_close_finishes_what_was_handed_over_and_ends_every_thread():
    before = threading.active_count()
    store = MemoryStore()
    rig = Rig(store)
    for number in range(1, 4):
        rig.submit(number)
    rig.close()
    assert sorted(rig.answers.ends) == [1, 2, 3]
    assert threading.active_count() == before
    assert load("memory://", step=3, store=store)["m"]["t0"].shape == (1000,)


def test_progress_and_retention_are_told():
    rig = Rig(MemoryStore(), keep=(KeepLast(1),))
    rig.submit(1)
    rig.answers.of(1)
    rig.submit(2)
    rig.close()
    stored = [event for event in rig.answers.events if isinstance(event, events.ShardStored)]
    assert [(event.step, event.shards_done, event.shards) for event in stored] == [(1, 1, 1), (2, 1, 1)]
    assert events.CheckpointsRemoved((1,)) in rig.answers.events


def test_a_failure_of_the_store_is_the_answer_of_its_save_alone():
    rig = Rig(FaultyStore(MemoryStore(), {1}, operations={"put"}, error=lambda: errors.DiskFullError("full")))
    rig.submit(1)
    assert isinstance(rig.answers.of(1)[1], errors.DiskFullError)
    rig.submit(2)
    assert rig.answers.of(2)[0].result == "committed"
    rig.close()


def test_an_error_that_nobody_foresaw_becomes_the_answer_of_its_save():
    class Odd(MemoryStore):
        def put(self, key, data, *, if_absent=False):
            raise ZeroDivisionError("a bug in somebody's store")

    rig = Rig(Odd())
    rig.submit(1)
    _, error = rig.answers.of(1)
    assert isinstance(error, errors.CheckpointError)
    assert "ZeroDivisionError: a bug in somebody's store" in str(error)
    rig.close()


def test_a_bug_in_the_engine_fails_the_saves_and_does_not_leave_them_waiting(rig, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(rig.engine, "_do", lambda task: 1 / 0)
        rig.submit(1)
        _, error = rig.answers.of(1)
    assert isinstance(error, errors.WorkerDiedError)
    assert "ZeroDivisionError" in str(error)
    rig.submit(2)
    assert rig.answers.of(2)[0].result == "committed"


@pytest.mark.parametrize("operation", ["write", "complete"])
def test_an_upload_that_the_store_lost_is_begun_again_from_the_arena(operation):
    inner = MemoryStore()
    lost = FaultyStore(inner, {1, 2}, operations={operation}, error=lambda: errors.UploadLostError("NoSuchUpload"))
    rig = Rig(lost)
    rig.engine._pipeline.part_bytes = 4096
    rig.submit(1)
    outcome, error = rig.answers.of(1)
    rig.close()
    assert error is None
    assert outcome.retries == 2
    assert load("memory://", store=inner)["m"]["t0"].shape == (1000,)
    assert lost.calls.count((operation, lost.calls[0][1])) > 2


def test_a_store_that_loses_every_upload_fails_the_save_and_says_so():
    lost = FaultyStore(
        MemoryStore(), range(100), operations={"write"}, error=lambda: errors.UploadLostError("NoSuchUpload")
    )
    rig = Rig(lost)
    rig.engine._pipeline.part_bytes = 6000
    rig.submit(1)
    assert isinstance(rig.answers.of(1)[1], errors.UploadLostError)
    rig.submit(2)
    assert isinstance(rig.answers.of(2)[1], errors.UploadLostError)
    rig.close()
    assert len(lost.calls) <= 2 * 2 * 4  # each of two parts, at first and three times again


def test_an_engine_without_threads_for_uploads_stores_all_the_same(monkeypatch):
    really = threading.Thread.start

    def start(thread):
        if thread.name.startswith("asyncckpt-upload"):
            raise RuntimeError("can't start new thread")
        really(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    store = MemoryStore()
    rig = Rig(store)
    rig.engine._pipeline.part_bytes = 4096
    rig.submit(1)
    assert rig.answers.of(1)[1] is None
    rig.close()
    assert load("memory://", store=store)["m"]["t0"].shape == (1000,)


@pytest.mark.parametrize("operation", ["put", "write", "complete"])
def test_what_was_tried_again_holds_no_view_of_the_arena(operation):
    """Else the memory of a whole state would stay until somebody collects garbage, and closing the arena would fail."""
    lost = FaultyStore(MemoryStore(), {1}, operations={operation}, error=lambda: errors.TransientStoreError("lost"))
    rig = Rig(RetryingStore(lost, RetryPolicy(deadline_s=10, first_wait_s=0.001, max_wait_s=0.001)))
    rig.engine._pipeline.part_bytes = 10**7 if operation == "put" else 4096
    gc.collect()
    gc.disable()
    try:
        rig.submit(1)
        assert rig.answers.of(1)[1] is None
        rig.close()
        assert rig.arena.buffer.closed
    finally:
        gc.enable()


def quick(deadline_s):
    return RetryPolicy(deadline_s=deadline_s, first_wait_s=0.01, max_wait_s=0.05)


def test_an_encoder_that_waits_for_its_uploads_is_freed_when_the_save_is_given_up():
    """The engine's own thread encodes: nobody else could look at the clock."""
    inner = FaultyStore(MemoryStore(), range(1, 10**6), operations={"put"})
    rig = Rig(RetryingStore(inner, quick(0.3)), codec="zstd", shard_bytes=1, retry=quick(0.3))
    rig.engine._pipeline.budget = ByteBudget(1)
    rig.submit(1)
    _, error = rig.answers.of(1)
    assert isinstance(error, errors.DeadlineExceededError)
    assert "injected" in error.message
    inner.fail = ()
    rig.submit(2)
    assert rig.answers.of(2)[0].result == "committed"
    rig.close()


def test_close_does_not_wait_for_the_removal_behind_a_failed_save():
    inner = FaultyStore(MemoryStore(), range(1, 10**6))
    before = threading.active_count()
    rig = Rig(RetryingStore(inner, quick(0.3)), retry=quick(0.3))
    rig.submit(1)
    assert isinstance(rig.answers.of(1)[1], errors.DeadlineExceededError)
    began_s = time.monotonic()
    rig.close()
    assert time.monotonic() - began_s < 2
    inner.fail = ()  # the store is back, and the removal ends
    eventually(lambda: threading.active_count() == before, "the engine has ended by itself")
    assert list(inner.inner.list()) == []
