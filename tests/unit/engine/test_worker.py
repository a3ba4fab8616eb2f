"""Tasks, whoever hosts them; and what a forked worker lets go of."""

import os

from asyncckpt import errors
from asyncckpt.engine.job import SaveJob, ShardReceipt, rules_from_json, rules_to_json
from asyncckpt.engine.pipeline import Pipeline
from asyncckpt.engine.worker import TaskRunner, close_all_but
from asyncckpt.format.plan import Group, Structure, TensorSpec
from asyncckpt.options import KeepEvery, KeepLast
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.writer import write_checkpoint


def job(**fields):
    return SaveJob(1, 10, "aaaaaaaa-000001", structure=1, arena=1, codec="none", time_s=0.0, **fields)


def run(store, kind, *args, **options):
    """The replies to one task."""
    replies = []
    pipeline = Pipeline(store)
    runner = TaskRunner(store, (), pipeline, lambda task, what, data: replies.append((task, what, data)), **options)
    tree = {"dict": {"m": {"dict": {"t": "tensor"}}}}
    runner.add_structure(1, Structure((Group("m", "m"),), (TensorSpec(0, "t", "float32", (4,)),), (), tree))
    getattr(runner, kind)(7, *args)
    pipeline.close()
    return replies


def test_a_check_tells_whether_the_step_is_taken():
    store = MemoryStore()
    assert run(store, "check", job()) == [(7, "done", {"exists": False})]
    write_checkpoint(store, 10, {})
    assert run(store, "check", job()) == [(7, "done", {"exists": True})]


def test_a_check_fails_if_a_taken_step_raises():
    store = MemoryStore()
    write_checkpoint(store, 10, {})
    ((task, what, data),) = run(store, "check", job(on_exists="raise"))
    error = errors.from_json(data)
    assert (task, what) == (7, "failed")
    assert isinstance(error, errors.CheckpointConflictError)
    assert (error.step, error.attempt) == (10, "aaaaaaaa-000001")


def test_a_collection_that_sees_not_everything_in_its_time_says_so_and_removes_nothing():
    store = MemoryStore(clock=lambda: 0.0)
    for step in range(5):
        store.put(f"step-{step:010d}/0123abcd-000001/x", [b"x"])
    store._clock = lambda: 2 * 24 * 3600.0
    ((_, what, data),) = run(store, "collect", job(), collect_s=0.0)
    assert (what, data["folders"]) == ("done", [])
    assert "collect_garbage" in data["lapses"][0]["error"]["message"]
    alive = []
    ((_, what, data),) = run(store, "collect", job(), progress=lambda: alive.append(1))
    assert (what, len(data["folders"]), data["lapses"]) == ("done", 5, [])
    assert len(alive) >= 5, "a worker that lists for long is not taken for hung"


def test_a_shard_is_encoded_then_done():
    store = MemoryStore()
    replies = run(store, "shard", job(), 0, memoryview(bytearray(8192)))
    assert sorted(what for _, what, _ in replies) == ["done", "encoded"]
    (receipt,) = (ShardReceipt.from_json(data) for _, what, data in replies if what == "done")
    assert store.head(receipt.key) is not None


def test_a_shard_that_fails_frees_the_encoder_too():
    store = FaultyStore(MemoryStore(), {1}, operations={"put"}, error=lambda: errors.DiskFullError("full"))
    replies = run(store, "shard", job(), 0, memoryview(bytearray(8192)))
    assert sorted(what for _, what, _ in replies) == ["encoded", "failed"]


def test_a_task_of_an_unknown_structure_fails_and_does_not_kill_the_worker():
    replies = run(MemoryStore(), "shard", SaveJob(1, 10, "aaaaaaaa-000001", 99, 1, "none", 0.0), 0, memoryview(b""))
    assert sorted(what for _, what, _ in replies) == ["encoded", "failed"]
    replies = run(
        MemoryStore(), "commit", SaveJob(1, 10, "aaaaaaaa-000001", 99, 1, "none", 0.0), [], memoryview(b""), b""
    )
    assert [what for _, what, _ in replies] == ["failed"]


def test_a_worker_lets_go_of_every_descriptor_but_its_own():
    kept, other = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            close_all_but(kept)
            left = {int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) > 2}
            gone = True
            try:
                os.fstat(other)
                gone = False
            except OSError:
                pass
            status = 0 if kept in left and len(left) == 2 and gone else 2  # the second is the listing's own
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (kept, other):
        os.close(fd)


def test_what_crosses_to_the_service_comes_back_the_same():
    full = job(metrics={"loss": 0.5}, config={"a": [1]}, tags=("x",), earlier_attempts=("b",), probe=True, pinned=True)
    assert SaveJob.from_json(full.to_json()) == full
    receipt = ShardReceipt(1, "key", 2, 3, ((0, 1, 2, 3),), 0.5, 0.25)
    assert ShardReceipt.from_json(receipt.to_json()) == receipt
    rules = (KeepLast(3), KeepEvery(10))
    assert rules_from_json(rules_to_json(rules)) == rules
