"""What writers that died left is removed a day later, and nothing that a checkpoint, a save in flight or another writer needs."""

import json
import os
import time
from datetime import timedelta

import pytest
import torch

from asyncckpt import errors
from asyncckpt.checkpoints.leftovers import collect
from asyncckpt.checkpoints.marks import mark_damaged
from asyncckpt.format import keys
from asyncckpt.restore import load
from asyncckpt.run import Run
from asyncckpt.store.base import OpenUpload
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.faulty import FaultyStore
from tests.records import change_record, fields_of, record_text
from tests.writer import write_checkpoint

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
DEAD = "0123abcd-000007"  # an attempt that no record names


class Clock:
    def __init__(self):
        self.now_s = 1.8e9

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock=clock)


def checkpoint(store, step, **fields):
    return write_checkpoint(store, step, {"x": torch.full((4,), float(step))}, **fields)


def leave(store, step, attempt=DEAD, names=("x-00001-of-00001.safetensors", "index.json.zst")):
    folder = keys.folder(step, attempt)
    for name in names:
        store.put(folder + name, [b"of a writer that died"])
    return folder


def everything(store):
    return [entry.key for entry in store.list()]


def restores(store, *steps):
    return all(load("memory://unused", step=step, store=store)["x"][0].item() == step for step in steps)


def test_a_folder_that_no_record_names_goes_a_day_after_it_was_last_touched(store, clock):
    checkpoint(store, 10)
    left = [leave(store, 10), leave(store, 20)]
    clock.now_s += DAY_S - 1
    assert collect(store).leftovers.folders == ()
    clock.now_s += 2
    store.put(left[0] + "state.pt", [b"somebody still writes here"])
    assert collect(store).leftovers.folders == (left[1],)
    clock.now_s += DAY_S + 1
    before = everything(store)
    found = collect(store, dry_run=True).leftovers
    assert everything(store) == before
    assert collect(store).leftovers == found
    assert found.folders == (left[0],)
    assert found.stored_bytes == 2 * len(b"of a writer that died") + len(b"somebody still writes here")
    assert {keys.attempt_folder(key) for key in everything(store)} - {None} == {folder_of(store, 10)}
    assert restores(store, 10)


def folder_of(store, step):
    return Run("memory://unused", store=store).get(step).record.folders[0]


def test_a_removal_that_was_cut_short_is_finished(store, clock):
    folder = checkpoint(store, 10)
    checkpoint(store, 20)
    clock.now_s += 2 * DAY_S
    store.delete([keys.record_key(10)])
    assert collect(store).leftovers.folders == (folder,)
    assert [keys.parse_folder(key) for key in everything(store) if "/" in key] == [20, 20, 20]


def test_a_healthy_run_costs_one_listing_and_no_read(store, clock):
    for step in range(1, 6):
        checkpoint(store, step)
    clock.now_s += 2 * DAY_S
    counted = CountingStore(store)
    assert collect(counted).leftovers.folders == ()
    assert counted.gets == {"list": 1}


def test_a_folder_that_another_steps_record_names_stays(store, clock):
    checkpoint(store, 10)
    needed = leave(store, 5)
    change_record(store, 10, folders=[folder_of(store, 10), needed])
    clock.now_s += 2 * DAY_S
    assert collect(store).leftovers.folders == ()
    assert any(key.startswith(needed) for key in everything(store))


def test_of_a_checkpoint_that_is_set_aside_nothing_goes(store, clock):
    checkpoint(store, 10)
    mark_damaged(store, 10)
    other = leave(store, 10)
    clock.now_s += 2 * DAY_S
    assert collect(store).leftovers.folders == (other,)
    assert restores(store, 10)


UNCLEAR = {
    "cut off": lambda store: store.put(keys.record_key(20), [b"{"]),
    "damaged": lambda store: store.put(
        keys.record_key(20),
        [store.get(keys.record_key(20), max_bytes=2**20).replace(b'"epoch": null', b'"epoch": nuIl')],
    ),
    "of a later format": lambda store: change_record(store, 20, format=2),
}


@pytest.mark.parametrize("spoil", UNCLEAR.values(), ids=UNCLEAR.keys())
def test_at_and_below_a_record_that_cannot_tell_what_it_needs_everything_stays(store, clock, spoil):
    for step in (10, 20, 30):
        checkpoint(store, step)
    kept = [leave(store, 5), leave(store, 20)]
    gone = leave(store, 30)
    spoil(store)
    clock.now_s += 2 * DAY_S
    found = collect(store).leftovers
    assert found.folders == (gone,)
    assert found.undecided == (20,)
    assert all(any(key.startswith(folder) for key in everything(store)) for folder in kept)


def test_a_record_of_a_newer_program_keeps_what_it_names(store, clock):
    checkpoint(store, 20)
    needed, left = leave(store, 5), leave(store, 7)
    change_record(store, 20, requires=["delta"], folders=[folder_of(store, 20), needed])
    clock.now_s += 2 * DAY_S
    assert collect(store).leftovers.folders == (left,)


def test_at_and_below_a_record_that_may_not_be_read_everything_stays(store, clock):
    class Refusing(FaultyStore):
        def get_version(self, key, *, max_bytes):
            if key == keys.record_key(20):
                raise errors.StoreAuthError("no", key=key)
            return super().get_version(key, max_bytes=max_bytes)

    for step in (10, 20, 30):
        checkpoint(store, step)
    leave(store, 10)
    gone = leave(store, 30)
    clock.now_s += 2 * DAY_S
    assert collect(Refusing(store)).leftovers.folders == (gone,)


def test_a_record_that_comes_at_the_last_moment_keeps_its_folder(store, clock):
    """A commit between the look at the records and the removal."""
    folder = checkpoint(store, 20)
    leave(store, 10)
    record = store.get(keys.record_key(20), max_bytes=2**20)
    store.delete([keys.record_key(20)])
    clock.now_s += 2 * DAY_S

    class Late(FaultyStore):
        def delete(self, keys_):  # of the first leftover
            self.inner.put(keys.record_key(20), [record])
            super().delete(keys_)

    assert collect(Late(store)).leftovers.folders == (keys.folder(10, DEAD),)
    assert folder.startswith("step-0000000020/")
    assert restores(store, 20)


def test_what_is_not_a_writers_stays(store, clock):
    foreign = [
        "step-0000000010/eval/results.json",
        "step-0000000010/notes.txt",
        "step-10/0123abcd-1/x",
        "step-0000000010-old/0123abcd-1/x",
        "other/0123abcd-1/x",
        f"{keys.folder(30, DEAD)}notes/mine.txt",
    ]
    for key in foreign:
        store.put(key, [b"x"])
    leave(store, 30)
    gone = leave(store, 10)
    clock.now_s += 2 * DAY_S
    assert collect(store).leftovers.folders == (gone,)
    assert set(foreign) <= set(everything(store))


def test_one_folder_that_cannot_be_removed_does_not_keep_the_others(store, clock):
    left = [leave(store, step) for step in (10, 20, 30)]
    clock.now_s += 2 * DAY_S
    locked = FaultyStore(store, {2}, operations={"delete"}, error=lambda: errors.StoreAuthError("it is locked"))
    done = collect(locked)
    assert done.leftovers.folders == (left[0], left[2])
    assert [type(error) for error in done.failures] == [errors.StoreAuthError]


def test_a_store_that_does_not_answer_is_asked_once(store, clock):
    for step in (10, 20, 30):
        leave(store, step)
    clock.now_s += 2 * DAY_S
    away = FaultyStore(store, range(1, 9), operations={"delete"}, error=lambda: errors.DeadlineExceededError("away"))
    done = collect(away)
    assert done.leftovers.folders == ()
    assert len(away.calls) == 1
    assert len(done.failures) == 1


def test_a_collection_that_is_told_to_end_removes_nothing_more(store, clock):
    for step in range(10):
        leave(store, step)
    clock.now_s += 2 * DAY_S
    asked = 0

    def go_on():
        nonlocal asked
        asked += 1
        return asked < 5

    assert collect(store, go_on=go_on).leftovers.folders == ()
    assert asked < 10
    assert len(everything(store)) == 20


def test_thousands_of_checkpoints_are_listed_once_and_their_records_are_read_once(store, clock):
    """So many that a request for each step would take minutes, and all names in memory at once megabytes."""
    name = checkpoint(store, 0).split("/")[0]
    fields = json.dumps(fields_of(store.get(keys.record_key(0), max_bytes=2**20)))
    (attempt,) = {key.split("/")[1] for key in everything(store) if "/" in key}
    for step in range(1, 3000):
        folder = leave(store, step, attempt, names=("index.json.zst",))
        record = json.loads(fields.replace(name, folder.split("/")[0])) | {"step": step}
        store.put(keys.record_key(step), [record_text(record)])
    gone = leave(store, 1500)
    clock.now_s += 2 * DAY_S
    counted = CountingStore(store)
    found = collect(counted, dry_run=True).leftovers
    assert found.folders == (gone,)
    assert found.undecided == ()
    assert counted.gets == {"list": 2, "get": 3000}


def test_of_a_folder_what_is_a_day_old_by_its_own_clock_goes(tmp_path):
    """Also temporary files of writers that died; and what was written just now stays."""
    store = LocalStore(tmp_path)
    checkpoint(store, 10)
    old, young = leave(store, 10), leave(store, 20)
    upload = store.start_upload("step-0000000030/0123abcd-1/x")
    upload.write(1, 0, [b"x"])
    (temporary,) = (tmp_path / ".asyncckpt-unfinished").iterdir()
    for path in (temporary, *(tmp_path / old).iterdir()):
        os.utime(path, (time.time() - 25 * HOUR_S,) * 2)
    with Run(tmp_path) as run:
        found = run.collect_garbage()
        assert found.folders == (old,)
        assert found.uploads == (temporary.name,)
        assert run.collect_garbage() == type(found)()
        assert run.collect_garbage(timedelta(0), dry_run=True).folders == (young,)
    assert not (tmp_path / old).exists()
    assert (tmp_path / young).exists()
    assert restores(store, 10)
    upload.abort()


def test_this_hosts_clock_does_not_count(store, clock):
    clock.now_s = 0.0  # the store's, decades behind ours
    left = leave(store, 10)
    assert collect(store).leftovers.folders == ()
    clock.now_s += 2 * DAY_S
    assert collect(store).leftovers.folders == (left,)


@pytest.mark.parametrize("older_than", [86400, 0.5, None, "1d"])
def test_an_age_without_a_unit_is_refused(store, older_than):
    with pytest.raises(TypeError, match="timedelta"):
        Run("memory://unused", store=store).collect_garbage(older_than)


def test_an_age_in_the_future_is_refused(store):
    with pytest.raises(ValueError, match="passed"):
        Run("memory://unused", store=store).collect_garbage(timedelta(hours=-1))


def test_what_could_not_be_removed_is_raised_when_everything_was_tried(store, clock):
    for step in (10, 20):
        leave(store, step)
    clock.now_s += 2 * DAY_S
    locked = FaultyStore(store, {1}, operations={"delete"}, error=lambda: errors.StoreAuthError("it is locked"))
    with pytest.raises(errors.StoreAuthError) as caught:
        Run("memory://unused", store=locked).collect_garbage()
    assert "1 folder(s)" in caught.value.__notes__[0]
    assert [keys.parse_folder(key) for key in everything(store)] == [10, 10]


def test_uploads_of_attempts_are_ended_and_others_are_not(store, clock):
    class Holding(MemoryStore):
        open = [  # noqa: RUF012 - one instance
            OpenUpload("step-0000000010/0123abcd-1/x", "1"),
            OpenUpload("elsewhere/x", "2"),
            OpenUpload("step-0000000010/mine/x", "3"),
        ]
        idle_since_s = None

        def open_uploads(self, prefix="", *, idle_since_s=None):
            self.idle_since_s = idle_since_s
            return list(self.open)

        def abort_upload(self, upload):
            self.open.remove(upload)

    held = Holding(clock=clock)
    assert collect(held).leftovers.uploads == ("step-0000000010/0123abcd-1/x",)
    assert [upload.token for upload in held.open] == ["2", "3"]
    assert held.idle_since_s == clock.now_s - DAY_S
