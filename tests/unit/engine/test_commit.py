"""The commit point: what makes a step exist, who wins, and what is left behind."""

import errno
import threading
import time
from dataclasses import replace

import pytest
import torch

from asyncckpt import errors
from asyncckpt.checkpoints import removal, standing
from asyncckpt.checkpoints.marks import mark_damaged
from asyncckpt.engine import commit as commits
from asyncckpt.engine.job import SaveJob
from asyncckpt.format import keys, limits
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import plan
from asyncckpt.format.record import Record
from asyncckpt.options import RetryPolicy
from asyncckpt.restore import load
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flattener
from asyncckpt.store.base import Version
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from tests.faulty import FaultyStore
from tests.records import change_record, fields_of, record_text
from tests.writer import _put

STEP = 10
RECORD = keys.record_key(STEP)


class ForgivingStore(MemoryStore):
    """Ignores `if_absent`, as `rclone serve s3` does."""

    conditional_puts = "unproven"

    def put(self, key, data, *, if_absent=False):
        super().put(key, data)


class Attempt:
    """One save of one tensor with a value of its own, ready to commit."""

    def __init__(self, store, attempt="aaaaaaaa-000001", *, step=STEP, value=1.0, sleep=time.sleep, **fields):
        self.store = store
        self.sleep = sleep
        self.job = SaveJob(1, step, attempt, structure=1, arena=1, codec="none", time_s=5.0, **fields)
        self.flat = Flattener().flatten({"weight": torch.full((1000,), value), "epoch": 3})
        self.plan = plan(self.flat.structure, codec="none")
        self.arena = memoryview(bytearray(self.plan.arena_bytes))
        for tensor, offset in zip(self.flat.tensors, self.plan.tensor_offsets, strict=True):
            data = tensor.numpy().tobytes()
            self.arena[offset : offset + len(data)] = data

    def put_shards(self, store=None):
        folder = keys.folder(self.job.step, self.job.attempt)
        return [_put(store or self.store, folder, self.plan, shard, self.arena) for shard in self.plan.shards]

    def commit(self, *, again=False):
        receipts = self.put_shards()
        end = self.plan.digests_offset + 32 * self.plan.piece_count
        digests = bytes(self.arena[self.plan.digests_offset : end])
        state = write_state(self.flat.values)
        return commits.commit(
            self.store,
            self.job,
            IndexBuilder(self.plan),
            receipts=receipts,
            digests=digests,
            state=state,
            again=again,
            sleep=self.sleep,
        )


def names(store):
    return [entry.key for entry in store.list()]


def value(store, step=STEP):
    return load("memory://unused", step=step, store=store)["weight"][0].item()


def owner(store, step=STEP):
    key = keys.record_key(step)
    return Record.parse(store.get(key, max_bytes=2**20), key).attempt


def test_the_record_is_put_last_and_everything_it_names_stands_before():
    store = MemoryStore()
    puts = FaultyStore(store, operations={"put"})
    outcome = Attempt(puts, metrics={"loss": 0.5}, epoch=2, tags=("best",), config={"lr": 1}, pinned=True).commit()
    order = [key for _, key in puts.calls]
    assert order[-1] == RECORD
    assert order.count(RECORD) == 1
    record = Record.parse(store.get(RECORD, max_bytes=2**20), RECORD)
    assert {record.index.key, *(ref.key for ref in record.states)} <= set(order[:-1])
    assert (record.metrics, record.epoch, record.tags, record.config, record.pinned, record.time) == (
        {"loss": 0.5},
        2,
        ("best",),
        {"lr": 1},
        True,
        5.0,
    )
    assert outcome.result == "committed"
    assert outcome.raw_bytes == record.raw_bytes == 4000
    assert outcome.stored_bytes == record.stored_bytes
    assert outcome.stored_bytes == sum(len(store.get(key, max_bytes=2**20)) for key in order[:-1])


def test_a_failure_before_the_record_leaves_no_checkpoint():
    for fail in range(1, 4):
        store = MemoryStore()
        attempt = Attempt(FaultyStore(store, {fail}, operations={"put"}, error=lambda: errors.StoreAuthError("no")))
        with pytest.raises(errors.StoreAuthError):
            attempt.commit()
        assert RECORD not in names(store), f"put {fail} failed"


def test_a_lost_answer_to_the_record_is_recognised_as_our_own_success():
    store = MemoryStore()
    total = len(names_after_commit())
    faulty = FaultyStore(store, {total}, after=True, operations={"put"})
    retrying = RetryingStore(faulty, RetryPolicy(first_wait_s=0.001, max_wait_s=0.001))
    assert Attempt(retrying).commit().result == "committed"
    assert faulty.calls[-1] == ("put", RECORD)
    assert faulty.calls[-2] == ("put", RECORD)
    assert value(store) == 1.0


def names_after_commit():
    store = MemoryStore()
    Attempt(store).commit()
    return names(store)


def test_a_commit_done_twice_is_one_checkpoint():
    """A worker dies after the record was put and before it could say so; the task is done again."""
    store = MemoryStore()
    first, again = Attempt(store), Attempt(store)
    assert first.commit().result == "committed"
    before = {key: store.get(key, max_bytes=2**20) for key in names(store)}
    assert again.commit().result == "committed"
    assert {key: store.get(key, max_bytes=2**20) for key in names(store)} == before


def test_a_step_of_another_attempt_is_never_overwritten():
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
    assert Attempt(store, "bbbbbbbb-000001", value=2.0).commit().result == "exists"
    assert owner(store) == "aaaaaaaa-000001"
    assert value(store) == 1.0


def test_an_earlier_attempt_of_the_same_save_counts_as_committed():
    """The service died after the record was put; the next one does the save again under a new attempt."""
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001").commit()
    again = Attempt(store, "aaaaaaaa-000002", earlier_attempts=("aaaaaaaa-000001",))
    assert not commits.exists(store, again.job)
    assert again.commit().result == "committed"
    assert value(store) == 1.0
    assert not [key for key in names(store) if "000002" in key], "what was stored a second time goes"


def test_what_was_stored_a_second_time_stays_while_its_own_record_may_still_arrive():
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001").commit()
    again = Attempt(store, "aaaaaaaa-000002", earlier_attempts=("aaaaaaaa-000001",))
    assert again.commit(again=True).result == "committed"
    assert [key for key in names(store) if "000002" in key]


def test_of_many_writers_at_once_exactly_one_commits():
    store = MemoryStore()
    results = {}
    barrier = threading.Barrier(8)

    def write(number):
        attempt = Attempt(store, f"{number:08x}-000001", value=float(number))
        barrier.wait()
        results[number] = attempt.commit().result

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number, result in results.items() if result == "committed"]
    assert sorted(results.values()) == ["committed", *["exists"] * 7]
    assert owner(store) == f"{winner:08x}-000001"
    assert value(store) == winner


def test_a_step_that_was_set_aside_as_damaged_can_be_saved_again(tmp_path):
    for store in (MemoryStore(), LocalStore(tmp_path)):
        Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
        mark_damaged(store, STEP)
        again = Attempt(store, "bbbbbbbb-000001", value=2.0)
        assert not commits.exists(store, again.job)
        assert again.commit().result == "committed"
        assert value(store) == 2.0
        third = Attempt(store, "cccccccc-000001", value=3.0)
        assert commits.exists(store, third.job), "the mark names the attempt that is gone, and counts no more"
        assert third.commit().result == "exists"
        assert value(store) == 2.0


@pytest.mark.parametrize("kind", ["text", "bit", "deep", "key", "big"])
def test_a_damaged_record_is_not_in_the_way_of_its_step(kind, tmp_path):
    for store in (MemoryStore(), LocalStore(tmp_path)):
        Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
        good = store.get(RECORD, max_bytes=2**20)
        fields = fields_of(good)
        damaged = {
            "text": b"{",
            "bit": good.replace(b'"epoch"', b'"epocH"'),
            "deep": good.replace(b'"config": null', b'"config": ' + b"[" * 40 + b"]" * 40),
            "key": record_text(fields | {"folders": ["../../etc/"]}),
            "big": good + b" " * (65 * 2**20),
        }[kind]
        store.put(RECORD, [damaged])
        again = Attempt(store, "bbbbbbbb-000001", value=2.0)
        assert not commits.exists(store, again.job)
        assert again.commit().result == "committed"
        assert value(store) == 2.0


@pytest.mark.parametrize("change", [{"format": 2}, {"requires": ["delta"]}, {"big": " " * (65 * 2**20)}])
def test_a_newer_checkpoint_is_never_replaced(change):
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001").commit()
    change_record(store, STEP, **change) if "big" not in change else store.put(
        RECORD, [record_text(fields_of(store.get(RECORD, max_bytes=2**20)) | change)]
    )
    store.put(keys.damaged_key(STEP), [b"aaaaaaaa-000001"])
    before = store.get(RECORD, max_bytes=2**27)
    again = Attempt(store, "bbbbbbbb-000001")
    assert commits.exists(store, again.job)
    assert again.commit().result == "exists"
    mark_damaged(store, STEP)
    assert store.get(RECORD, max_bytes=2**27) == before


def test_a_record_whose_bytes_change_from_reading_to_reading_is_no_damage():
    """A bad path flips bits on the way: the record is sound, and must not be replaced."""
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()

    class Flipping(FaultyStore):
        readings = 0

        def get_version(self, key, *, max_bytes):
            data = bytearray(super().get_version(key, max_bytes=max_bytes).data)
            self.readings += 1
            data[100 + self.readings] ^= 1
            return Version(bytes(data), "")

    with pytest.raises(errors.StoreError, match="change on the way"):
        Attempt(Flipping(store), "bbbbbbbb-000001", value=2.0).commit()
    assert value(store) == 1.0


def test_two_writers_of_a_step_that_was_set_aside_are_not_both_told_that_they_committed():
    """The second one wins while the first one's request is under way: nothing is deleted, and the first is told."""
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
    mark_damaged(store, STEP)

    class Overtaken(FaultyStore):
        def replace(self, key, data, old):
            if key == RECORD:
                results.append(Attempt(store, "cccccccc-000001", value=3.0).commit().result)
            super().replace(key, data, old)

    results = []
    assert Attempt(Overtaken(store), "bbbbbbbb-000001", value=2.0).commit().result == "exists"
    assert results == ["committed"]
    assert value(store) == 3.0


def test_a_commit_never_deletes_anything():
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
    mark_damaged(store, STEP)
    watched = FaultyStore(store, operations={"delete", "remove"})
    assert Attempt(watched, "bbbbbbbb-000001", value=2.0).commit().result == "committed"
    assert watched.calls == []


def test_a_404_for_a_record_that_stands_does_not_cost_it_its_place():
    """A gateway that caches 404s: every reading of the record says that there is none."""
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()

    class Blind(FaultyStore):
        def get_version(self, key, *, max_bytes):
            raise errors.ObjectNotFoundError("cached", key=key)

    with pytest.raises(errors.TransientStoreError, match="5 readings found no object"):
        Attempt(Blind(store), "bbbbbbbb-000001", value=2.0).commit()
    assert value(store) == 1.0


def test_a_step_whose_record_was_removed_meanwhile_is_taken():
    store = MemoryStore()
    first = Attempt(store, "aaaaaaaa-000001", value=1.0)
    first.commit()

    class Removed(FaultyStore):
        def get_version(self, key, *, max_bytes):
            store.delete([RECORD])
            return super().get_version(key, max_bytes=max_bytes)

    assert Attempt(Removed(store), "bbbbbbbb-000001", value=2.0).commit().result == "committed"
    assert value(store) == 2.0


# -- a record without its index


def stump(store):
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
    store.delete([entry.key for entry in store.list(keys.folder(STEP, "aaaaaaaa-000001"))])


def test_a_record_whose_index_is_gone_for_five_seconds_is_replaced():
    store, slept = MemoryStore(), []
    stump(store)
    again = Attempt(store, "bbbbbbbb-000001", value=2.0, sleep=slept.append)
    assert not commits.exists(store, again.job)
    assert again.commit().result == "committed"
    assert slept == [5.0]
    assert value(store) == 2.0


def test_one_wrong_404_never_costs_a_checkpoint():
    """Of the index at the first reading; of the index, while the listing shows it; of a record that changed meanwhile."""
    for wrong in ({1}, {1, 2}):
        store = MemoryStore()
        Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
        blind = FaultyStore(
            store, wrong, operations={"get_into"}, error=lambda: errors.ObjectNotFoundError("not there")
        )
        again = Attempt(blind, "bbbbbbbb-000001", value=2.0, sleep=lambda _: None)
        assert again.commit().result == "exists"
        assert value(store) == 1.0


def test_a_stump_that_was_replaced_while_it_was_judged_is_judged_anew():
    store = MemoryStore()
    stump(store)
    third = Attempt(store, "cccccccc-000001", value=3.0, sleep=lambda _: None)
    again = Attempt(store, "bbbbbbbb-000001", value=2.0, sleep=lambda _: third.commit())
    assert again.commit().result == "exists"
    assert value(store) == 3.0


# -- a record that was sent without an answer


def lost(store, *, after, fail):
    """A store whose record's put has no answer. `after`: it took effect."""
    error = errors.TransientStoreError
    return FaultyStore(
        store, fail, after=after, operations={"put", "replace", "get_version"}, error=lambda: error("no answer")
    )


PUTS = 3  # state and index side by side, then the record


def test_a_record_without_an_answer_that_a_reading_shows_is_committed():
    store = MemoryStore()
    assert Attempt(lost(store, after=True, fail={PUTS + 1})).commit().result == "committed"
    assert value(store) == 1.0


def test_a_record_without_an_answer_that_no_reading_shows_is_unknown():
    store = MemoryStore()
    faulty = lost(store, after=False, fail={PUTS + 1})
    attempt = Attempt(faulty)
    with pytest.raises(errors.CommitUnknownError, match="may still appear, complete") as raised:
        attempt.commit()
    assert raised.value.step == STEP
    assert isinstance(raised.value.__cause__, errors.TransientStoreError)


def test_a_record_that_arrives_late_is_complete_and_a_later_save_of_the_step_finds_it():
    store = MemoryStore()
    late = []

    class Late(FaultyStore):
        def put(self, key, data, *, if_absent=False):
            if key == RECORD:
                late.append(bytes(data[0]))
                raise errors.DeadlineExceededError("no answer for ten minutes")
            super().put(key, data, if_absent=if_absent)

    with pytest.raises(errors.CommitUnknownError):
        Attempt(Late(store), "aaaaaaaa-000001", value=1.0).commit()
    store.put(RECORD, late, if_absent=True)
    assert value(store) == 1.0
    again = Attempt(store, "aaaaaaaa-000002", value=1.0)
    assert commits.exists(store, again.job)
    assert again.commit().result == "exists"


def test_a_refusal_is_an_answer_and_no_outcome_is_unknown():
    store = MemoryStore()
    faulty = FaultyStore(store, {PUTS + 1}, operations={"put"}, error=lambda: errors.StoreAuthError("no"))
    with pytest.raises(errors.StoreAuthError):
        Attempt(faulty).commit()


def test_a_refusal_after_a_send_without_an_answer_leaves_the_outcome_unknown():
    def error():
        failure = errors.StoreAuthError("the token has expired meanwhile")
        failure.unanswered = True
        return failure

    store = MemoryStore()
    with pytest.raises(errors.CommitUnknownError):
        Attempt(FaultyStore(store, {PUTS + 1}, operations={"put"}, error=error)).commit()


def test_a_race_lost_with_a_send_that_had_no_answer_says_that_its_record_may_appear():
    def error():
        failure = errors.ObjectExistsError("taken")
        failure.unanswered = True
        return failure

    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001", value=1.0).commit()
    faulty = FaultyStore(store, {PUTS + 1}, operations={"put"}, error=error)
    outcome = Attempt(faulty, "bbbbbbbb-000001").commit()
    assert (outcome.result, outcome.may_appear) == ("exists", True)
    outcome = Attempt(store, "cccccccc-000001").commit()
    assert (outcome.result, outcome.may_appear) == ("exists", False)


def test_a_commit_whose_worker_died_does_not_put_its_record_again_where_the_key_was_seen_free():
    """The dead worker's record may have stood, and have been removed with its folder by whoever may."""

    class Vanishing(FaultyStore):
        def put(self, key, data, *, if_absent=False):
            if key == RECORD:
                records.append(key)
                raise errors.ObjectExistsError("taken", key=key)
            super().put(key, data, if_absent=if_absent)

    records = []
    with pytest.raises(errors.CommitUnknownError):
        Attempt(Vanishing(MemoryStore())).commit(again=True)
    assert len(records) == 1


def test_a_record_too_large_to_be_replaced_does_not_hide_that_ours_may_still_arrive(monkeypatch):
    store = MemoryStore()
    store.put(RECORD, [b" " * 5000])
    monkeypatch.setattr(limits, "RECORD_BYTES", 4000)
    monkeypatch.setattr(standing, "_HELD_BYTES", 4500)
    with pytest.raises(errors.ResourceLimitError, match="left alone"):
        Attempt(store).commit()
    with pytest.raises(errors.CommitUnknownError, match="left alone"):
        Attempt(store).commit(again=True)


def test_a_name_that_was_given_before_its_sync_failed_is_not_told_as_committed_and_not_removed(tmp_path):
    """The record may be gone after a loss of power, and stands until then."""

    class Failing(LocalStore):
        def _sync_folders(self, folder):
            if folder == tmp_path and (tmp_path / RECORD).exists():
                raise OSError(errno.EIO, "fsync")
            super()._sync_folders(folder)

    store = Failing(tmp_path)
    with pytest.raises(errors.CommitUnknownError, match="may still appear") as raised:
        Attempt(store).commit()
    assert isinstance(raised.value.__cause__, errors.LocalIOError)
    with pytest.raises(errors.CommitUnknownError):
        Attempt(store).commit(again=True)
    assert value(store) == 1.0


def test_a_mark_for_no_checkpoint_is_not_written():
    store = MemoryStore()
    mark_damaged(store, STEP)
    assert names(store) == []


def test_a_store_that_ignores_conditions_is_refused_before_a_record_stands():
    store = ForgivingStore()
    attempt = Attempt(store, probe=True)
    with pytest.raises(errors.UnsafeStoreError, match="single_writer=True") as raised:
        attempt.commit()
    assert raised.value.key is not None
    assert RECORD not in names(store)
    removal.abandon(store, attempt.job.step, attempt.job.attempt)
    assert names(store) == []


def test_a_store_that_honours_conditions_passes_the_probe():
    class Unproven(MemoryStore):
        conditional_puts = "unproven"

    store = Unproven()
    assert Attempt(store, probe=True).commit().result == "committed"
    assert value(store) == 1.0


def test_a_promised_single_writer_is_not_probed_and_is_told_when_the_promise_was_broken():
    class Intruded(ForgivingStore):
        conditional_puts = "single_writer"

        def put(self, key, data, *, if_absent=False):
            super().put(key, data)
            if key == RECORD and intruder is not None:
                super().put(key, [intruder])

    intruder = None
    store = Intruded()
    assert Attempt(store, "bbbbbbbb-000001", probe=True).commit().result == "committed"
    intruder = store.get(RECORD, max_bytes=2**20)
    with pytest.raises(errors.CheckpointConflictError, match="single_writer") as raised:
        Attempt(store, "aaaaaaaa-000001", probe=True).commit()
    assert raised.value.step == STEP
    assert raised.value.key == RECORD


def test_abandon_leaves_nothing_of_the_attempt_and_touches_no_other():
    store = MemoryStore()
    Attempt(store, "aaaaaaaa-000001").commit()
    kept = names(store)
    loser = Attempt(store, "bbbbbbbb-000001")
    loser.put_shards()
    assert len(names(store)) > len(kept)
    removal.abandon(store, loser.job.step, loser.job.attempt)
    assert names(store) == kept


def test_abandon_keeps_what_was_committed_after_all():
    """The answer to the record's put was lost for good: the save is reported as failed, and yet it stands."""
    store = MemoryStore()
    attempt = Attempt(store)
    attempt.commit()
    removal.abandon(store, attempt.job.step, attempt.job.attempt)
    assert value(store) == 1.0


def test_abandon_after_a_restart_keeps_what_an_earlier_attempt_committed():
    store = MemoryStore()
    first = Attempt(store, "aaaaaaaa-000001")
    first.commit()
    again = Attempt(store, "aaaaaaaa-000002", earlier_attempts=("aaaaaaaa-000001",))
    again.put_shards()
    removal.abandon(store, again.job.step, again.job.attempt)
    assert value(store) == 1.0
    assert not [key for key in names(store) if "000002" in key]


@pytest.mark.parametrize("taken", [False, True])
def test_exists_tells_whether_the_step_is_taken(taken):
    store = MemoryStore()
    if taken:
        Attempt(store, "bbbbbbbb-000001").commit()
    job = Attempt(store).job
    assert commits.exists(store, job) is taken
    assert not commits.exists(store, replace(job, step=11))


@pytest.mark.parametrize("limit", ["INDEX_BYTES", "INDEX_BASE_BYTES", "INDEX_VALUES"])
def test_an_index_that_no_reader_would_take_is_never_committed(monkeypatch, limit):
    store = MemoryStore()
    attempt = Attempt(store)
    monkeypatch.setattr(limits, "INDEX_RATIO", 0)
    monkeypatch.setattr(limits, limit, 10)
    with pytest.raises(errors.ResourceLimitError):
        attempt.commit()
    assert RECORD not in names(store)
