"""What follows a save is told: what was removed, what could not be, and each cause in one warning."""

import logging

import pytest
import torch

from asyncckpt import KeepLast, Saver, errors, events
from asyncckpt.engine.upkeep import events_of, told_of_failure
from asyncckpt.format import keys
from asyncckpt.run import Run
from asyncckpt.store.base import OpenUpload
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.processes import eventually

DAY_S = 24 * 3600.0


class Denying(FaultyStore):
    """Refuses operations by name, like a bucket's policy."""

    def __init__(self, inner, *denied):
        super().__init__(inner)
        self.denied = set(denied)

    def run(self, operation, key, call):
        if operation in self.denied:
            raise errors.StoreAuthError(f"{operation}: Access Denied", key=key)
        return call()


def state(step):
    return {"x": torch.full((4,), float(step))}


def save_all(store, steps, *, keep=(), before_last=lambda seen: None):
    """Events of a Saver that saves these steps one after the other."""
    seen = []
    with Saver("memory://unused", store=store, keep=list(keep), hooks=[seen.append]) as saver:
        for step in steps:
            if step == steps[-1]:
                before_last(seen)
            saver.save(step, state(step)).result(30)
    return seen


def of(seen, kind):
    return [event for event in seen if isinstance(event, kind)]


@pytest.fixture
def warnings_(caplog):
    caplog.set_level(logging.WARNING, "asyncckpt")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("operation", ["remove", "delete"])
def test_retention_that_may_not_delete_is_an_event_each_time_and_one_warning(operation, warnings_):
    store = MemoryStore()
    seen = save_all(Denying(store, operation), [1, 2, 3, 4], keep=[KeepLast(1)])
    failed = of(seen, events.RetentionFailed)
    assert len(failed) >= 2, "two may be one: retention runs beside the next save"
    assert {step for event in failed for step in event.steps} == {1, 2, 3}
    assert all(isinstance(event.error, errors.StoreAuthError) for event in failed)
    (warning,) = [line for line in warnings_() if "retention" in line]
    assert "Access Denied" in warning
    assert "1" in warning


def test_retention_that_may_not_list_is_an_event_and_one_warning(warnings_):
    store = Denying(MemoryStore())

    def deny(seen):
        eventually(lambda: of(seen, events.CheckpointsRemoved), "retention of the save before is over")
        store.denied.add("list")

    seen = save_all(store, [1, 2, 3], keep=[KeepLast(1)], before_last=deny)
    assert of(seen, events.SaveFailed) == []
    (event,) = of(seen, events.RetentionFailed)
    assert event.steps == ()
    assert isinstance(event.error, errors.StoreAuthError)
    (warning,) = [line for line in warnings_() if "retention" in line]
    assert "could not look" in warning


def test_each_damaged_record_that_is_left_alone_is_one_warning(warnings_):
    store = MemoryStore()
    save_all(store, [1, 2, 3, 4, 5])
    for step in (1, 2):
        store.put(keys.record_key(step), [b"{"])
    seen = []
    with Saver("memory://unused", store=store, keep=[KeepLast(1)], hooks=[seen.append]) as saver:
        saver.restore(state(0))
        for step in (6, 7, 8):
            saver.save(step, state(step)).result(30)
    assert sorted(event.steps for event in of(seen, events.RetentionFailed)) == [(1,), (2,)]
    assert len([line for line in warnings_() if "retention leaves" in line]) == 2
    assert [checkpoint.step for checkpoint in Run("memory://unused", store=store).checkpoints()][-1] == 8
    assert {3, 4, 5, 6, 7} == {step for event in of(seen, events.CheckpointsRemoved) for step in event.steps}


class Aging(MemoryStore):
    """Objects that are put while `old` are two days old."""

    def __init__(self):
        self.old = False
        super().__init__(clock=lambda: 1.8e9 - (2 * DAY_S if self.old else 0))


def test_a_saver_collects_what_dead_writers_left_once_and_says_so(warnings_):
    store = Aging()
    store.old = True
    dead = keys.folder(7, "0123abcd-000001")
    for name in ("x-00001-of-00001.safetensors", "state.pt"):
        store.put(dead + name, [b"12345"])
    store.old = False
    store.put(keys.folder(8, "0123abcd-000002") + "state.pt", [b"of a writer that may live"])
    seen = save_all(store, [9, 10])
    assert of(seen, events.LeftoversRemoved) == [events.LeftoversRemoved((dead,), (), 10)]
    assert {keys.parse_folder(entry.key) for entry in store.list() if "/" in entry.key} == {8, 9, 10}
    assert warnings_() == []


def test_leftovers_that_may_not_be_removed_are_an_event_and_one_warning(warnings_):
    store = Aging()
    store.old = True
    for step in (5, 6):
        store.put(keys.folder(step, "0123abcd-000001") + "state.pt", [b"x"])
    store.old = False
    seen = save_all(Denying(store, "delete"), [7])
    assert [type(event.error) for event in of(seen, events.LeftoversRemain)] == [errors.StoreAuthError] * 2
    (warning,) = warnings_()
    assert "Access Denied" in warning
    assert of(seen, events.SaveFailed) == []


def test_folders_are_collected_where_uploads_may_not_be_listed():
    store = Aging()
    store.old = True
    dead = keys.folder(7, "0123abcd-000001")
    store.put(dead + "state.pt", [b"x"])
    store.old = False
    seen = save_all(Denying(store, "open_uploads"), [9])
    assert [event.folders for event in of(seen, events.LeftoversRemoved)] == [(dead,)]
    assert len(of(seen, events.LeftoversRemain)) == 1


def test_what_a_failed_save_stored_and_cannot_be_removed_is_told(warnings_):
    class Full(Denying):
        def put(self, key, data, *, if_absent=False):
            if key.endswith("state.pt"):
                raise errors.DiskFullError("full")
            super().put(key, data, if_absent=if_absent)

    seen = []
    saver = Saver("memory://unused", store=Full(MemoryStore(), "delete"), hooks=[seen.append])
    with pytest.raises(errors.DiskFullError):
        saver.save(1, state(1)).result(30)
    saver.close()
    (event,) = of(seen, events.LeftoversRemain)
    assert isinstance(event.error, errors.StoreAuthError)
    assert len([line for line in warnings_() if "Access Denied" in line]) == 1


def test_uploads_that_a_failed_save_left_open_are_ended_at_once():
    class Holding(MemoryStore):
        def __init__(self):
            super().__init__()
            self.open = [OpenUpload("elsewhere", "1")]

        def put(self, key, data, *, if_absent=False):
            self.open.append(OpenUpload(keys.folder(1, key.split("/")[1]) + "x", "of a dead worker"))
            raise errors.DiskFullError("full")

        def open_uploads(self, prefix="", *, idle_since_s=None):
            return [upload for upload in self.open if upload.key.startswith(prefix)]

        def abort_upload(self, upload):
            self.open = [one for one in self.open if one != upload]

    store = Holding()
    saver = Saver("memory://unused", store=store)
    with pytest.raises(errors.DiskFullError):
        saver.save(1, state(1)).result(30)
    saver.close()
    assert [upload.token for upload in store.open] == ["1"]


@pytest.mark.parametrize(("kind", "told"), [("retain", events.RetentionFailed), ("collect", events.LeftoversRemain)])
def test_a_task_that_kills_its_workers_is_told(kind, told):
    (event,) = events_of(kind, told_of_failure(errors.to_json(errors.WorkerDiedError("three in a row"))))
    assert isinstance(event, told)
    assert isinstance(event.error, errors.WorkerDiedError)
