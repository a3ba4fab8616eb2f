"""Which checkpoints stay."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt import KeepEvery, KeepLast, errors
from asyncckpt.checkpoints.marks import mark_damaged
from asyncckpt.engine.catalog import find_checkpoints
from asyncckpt.engine.retention import Retention, doomed
from asyncckpt.format import keys
from asyncckpt.restore import load
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.records import change_record
from tests.writer import write_checkpoint

rules = st.lists(
    st.one_of(st.builds(KeepLast, st.integers(1, 5)), st.builds(KeepEvery, st.integers(1, 50))), max_size=3
)


LINEAGE = "00000000"  # that checkpoints of these tests have, unless they say another


def retain(store, rules, *, committed, lineage=LINEAGE):
    return list(Retention(store, rules).retain(committed=committed, lineage=lineage).removed)


def recorded_steps(store):
    found = find_checkpoints(store)
    return sorted((*found.good, *found.marked))


def filled(store, steps, **fields):
    for step in steps:
        write_checkpoint(store, step, {"x": torch.full((4,), float(step))}, **fields)
    return store


def steps_with_objects(store):
    return {keys.parse_folder(entry.key) for entry in store.list() if keys.parse_record_key(entry.key) is None}


def test_no_rules_keep_everything():
    assert doomed([1, 2, 3], []) == []


def test_a_checkpoint_stays_if_any_rule_keeps_it():
    steps = [10, 20, 30, 40, 50, 60]
    assert doomed(steps, [KeepLast(2)]) == [10, 20, 30, 40]
    assert doomed(steps, [KeepEvery(30)]) == [10, 20, 40, 50]
    assert doomed(steps, [KeepLast(2), KeepEvery(30)]) == [10, 20, 40]


@given(st.sets(st.integers(0, 1000)), rules)
def test_the_newest_always_stays_and_the_order_is_from_the_oldest(steps, chosen):
    gone = doomed(steps, chosen)
    assert gone == sorted(set(gone) & steps)
    if steps:
        assert max(steps) not in gone
    kept = steps - set(gone)
    for rule in chosen:
        if isinstance(rule, KeepLast):
            assert set(sorted(steps)[-rule.count :]) <= kept
        else:
            assert {step for step in steps if step % rule.steps == 0} <= kept


@given(st.sets(st.integers(0, 1000)), rules)
def test_what_is_left_is_stable(steps, chosen):
    kept = steps - set(doomed(steps, chosen))
    if any(isinstance(rule, KeepLast) for rule in chosen):
        assert doomed(kept, chosen) == []


@pytest.mark.parametrize("count", [0, -1])
def test_a_rule_that_keeps_nothing_raises(count):
    with pytest.raises(ValueError):
        KeepLast(count)
    with pytest.raises(ValueError):
        KeepEvery(count)


def test_what_is_removed_is_removed_whole_and_what_stays_restores(tmp_path):
    for store in (MemoryStore(), LocalStore(tmp_path)):
        filled(store, [10, 20, 30, 40])
        assert retain(store, [KeepLast(2)], committed=40) == [10, 20]
        assert recorded_steps(store) == [30, 40]
        assert steps_with_objects(store) == {30, 40}
        for step in (30, 40):
            assert load("memory://unused", step=step, store=store)["x"][0].item() == step


def test_a_pinned_checkpoint_stays_and_what_is_known_is_not_read_again():
    store = MemoryStore()
    filled(store, [10], pinned=True)
    filled(store, [20, 30])
    counted = FaultyStore(store, operations={"get", "get_into"})
    retention = Retention(counted, [KeepLast(1)])
    assert retention.retain(committed=30, lineage=LINEAGE).removed == (20,)
    assert recorded_steps(store) == [10, 30]
    counted.calls.clear()
    assert retention.retain(committed=30, lineage=LINEAGE).removed == ()
    assert counted.calls == []


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint():
    """The record goes first: whatever comes after, the step is absent."""
    calls = 0
    while True:
        calls += 1
        store = MemoryStore()
        filled(store, [10, 20, 30])
        cut = FaultyStore(store, {calls}, operations={"delete", "remove"}, error=lambda: errors.StoreAuthError("cut"))
        done = Retention(cut, [KeepLast(1)]).retain(committed=30, lineage=LINEAGE)
        for step in recorded_steps(store):
            assert load("memory://unused", step=step, store=store)["x"][0].item() == step
        if not done.lapses:
            break
        assert (done.removed, done.lapses[0].steps) in [((20,), (10,)), ((10,), (20,))]
    assert calls > 4


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest():
    store = filled(MemoryStore(), [10, 20, 30])
    mark_damaged(store, 20)
    mark_damaged(store, 30)
    filled(store, [15])  # restored from 10, and went on
    assert retain(store, [KeepLast(2)], committed=15) == []
    assert load("memory://unused", step=10, store=store)["x"][0].item() == 10


def test_a_damaged_checkpoint_goes_when_its_time_has_come():
    store = filled(MemoryStore(), [10, 20, 30, 40])
    mark_damaged(store, 10)
    assert retain(store, [KeepLast(2)], committed=40) == [10, 20]
    assert recorded_steps(store) == [30, 40]
    assert [entry.key for entry in store.list() if "damaged" in entry.key] == []


def test_what_was_just_committed_stays_below_newer_steps_too():
    """A Saver that restored an old step by its number and goes on from there."""
    store = filled(MemoryStore(), [10, 20, 30])
    filled(store, [11])
    retain(store, [KeepLast(2)], committed=11)
    assert 11 in recorded_steps(store)
    assert load("memory://unused", step=11, store=store)["x"][0].item() == 11


def test_an_unreadable_record_is_left_alone():
    store = filled(MemoryStore(), [20, 30])
    store.put(keys.record_key(10), [b"{"])
    assert retain(store, [KeepLast(1)], committed=30) == [20]
    assert recorded_steps(store) == [10, 30]


def test_checkpoints_of_another_lineage_are_neither_counted_nor_removed_and_told_once():
    store = filled(MemoryStore(), [10, 20, 30, 100], lineage="aaaaaaaa")
    filled(store, [11, 12, 13], lineage="bbbbbbbb")
    retention = Retention(store, [KeepLast(2)])
    first = retention.retain(committed=13, lineage="bbbbbbbb")
    assert first.removed == (11,)
    assert first.foreign == (10, 20, 30, 100)
    filled(store, [14], lineage="bbbbbbbb")
    filled(store, [110], lineage="cccccccc")
    second = retention.retain(committed=14, lineage="bbbbbbbb")
    assert second.removed == (12,)
    assert second.foreign == (110,), "the others were told before"
    assert recorded_steps(store) == [10, 13, 14, 20, 30, 100, 110]


def test_a_step_that_another_lineage_took_meanwhile_is_not_removed():
    store = filled(MemoryStore(), [10, 20, 30])

    class Retaken(FaultyStore):
        def get_version(self, key, *, max_bytes):
            reads.append(key)
            if reads.count(keys.record_key(10)) == 2:  # once to count it, and now to remove it
                change_record(store, 10, lineage="ffffffff")
            return super().get_version(key, max_bytes=max_bytes)

    reads = []
    assert retain(Retaken(store), [KeepLast(1)], committed=30) == [20]
    assert recorded_steps(store) == [10, 30]


NEWER = {
    "a later format": {"format": 2},
    "something it requires": {"requires": ["delta"]},
    "more levels than this reader takes": {"config": functools.reduce(lambda inner, _: [inner], range(40), [])},
}


@pytest.mark.parametrize("change", NEWER.values(), ids=NEWER.keys())
def test_a_newer_checkpoint_is_neither_counted_nor_removed(change):
    store = filled(MemoryStore(), [10, 20, 30, 40])
    change_record(store, 10, **change)
    before = {entry.key for entry in store.list("step-0000000010")}
    assert retain(store, [KeepLast(2)], committed=40) == [20]
    assert {entry.key for entry in store.list("step-0000000010")} == before


def test_a_newer_checkpoint_at_the_top_takes_nobodys_place():
    store = filled(MemoryStore(), [10, 20, 30])
    change_record(store, 30, requires=["delta"])
    assert retain(store, [KeepLast(1)], committed=20) == [10]
    assert load("memory://unused", step=20, store=store)["x"][0].item() == 20


def test_below_a_checkpoint_of_another_format_everything_stays():
    """Only a reader of that format can tell what it needs."""
    store = filled(MemoryStore(), [10, 20, 30, 40, 50])
    change_record(store, 30, format=2)
    assert retain(store, [KeepLast(1)], committed=50) == [40]
    assert {10, 20, 30, 50} <= steps_with_objects(store)


@pytest.mark.parametrize("change", [{}, {"requires": ["delta"]}, {"lineage": "ffffffff"}, {"pinned": True}])
def test_a_folder_that_a_kept_record_names_stays(change):
    store = filled(MemoryStore(), [10, 20, 30])
    folders = [find_folder(store, 10), find_folder(store, 20)]
    change_record(store, 20, folders=folders, **change)
    before = [entry.key for entry in store.list(folders[0])]
    assert retain(store, [KeepLast(1), KeepEvery(20)], committed=30) == [10]
    assert [entry.key for entry in store.list(folders[0])] == before


def test_a_folder_goes_with_the_last_record_that_names_it():
    store = filled(MemoryStore(), [10, 20, 30])
    change_record(store, 20, folders=[find_folder(store, 10), find_folder(store, 20)])
    assert retain(store, [KeepLast(2)], committed=30) == [10]
    assert 10 in steps_with_objects(store)
    filled(store, [40])
    assert retain(store, [KeepLast(2)], committed=40) == [20]
    assert steps_with_objects(store) == {30, 40}


def test_a_folder_that_a_damaged_record_still_names_stays():
    store = filled(MemoryStore(), [10, 20, 30])
    named = find_folder(store, 10)
    change_record(store, 20, folders=[named, find_folder(store, 20)])
    key = keys.record_key(20)
    store.put(key, [store.get(key, max_bytes=2**20).replace(b'"epoch": null', b'"epoch": nuIl')])
    assert retain(store, [KeepLast(1)], committed=30) == [10]
    assert list(store.list(named))


def test_a_record_without_its_index_is_not_counted():
    """A stump at the top must not cost the last good one its place."""
    store = filled(MemoryStore(), [10, 20, 30])
    store.delete([find_folder(store, 30) + "index.json.zst"])
    assert retain(store, [KeepLast(1)], committed=20) == [10]
    assert load("memory://unused", step=20, store=store)["x"][0].item() == 20


class Refusing(FaultyStore):
    """Says no to operations on steps that a test chooses."""

    def __init__(self, inner, operation, steps, error=errors.StoreAuthError):
        super().__init__(inner, operations={operation})
        self.operation, self.steps, self.kind = operation, set(steps), error

    def run(self, operation, key, call):
        step = keys.parse_folder(key) or keys.parse_record_key(key) or keys.parse_damaged_key(key)
        if operation == self.operation and step in self.steps:
            self.calls.append((operation, key))
            raise self.kind("no", key=key)
        return call()


@pytest.mark.parametrize("operation", ["remove", "delete"])
def test_a_step_that_cannot_be_removed_does_not_keep_the_others(operation):
    store = filled(MemoryStore(), [10, 20, 30, 40])
    done = Retention(Refusing(store, operation, [20]), [KeepLast(1)]).retain(committed=40, lineage=LINEAGE)
    assert done.removed == (10, 30)
    ((steps, error),) = [(lapse.steps, lapse.error) for lapse in done.lapses]
    assert (steps, type(error)) == ((20,), errors.StoreAuthError)
    assert load("memory://unused", step=40, store=store)["x"][0].item() == 40


def test_a_store_that_refuses_every_removal_is_asked_three_times_and_every_step_is_told():
    store = filled(MemoryStore(), range(10, 110, 10))
    locked = Refusing(store, "remove", range(200))
    (lapse,) = Retention(locked, [KeepLast(1)]).retain(committed=100, lineage=LINEAGE).lapses
    assert lapse.steps == tuple(range(10, 100, 10))
    assert len(locked.calls) == 3


def test_a_store_that_does_not_answer_is_asked_once_a_run():
    store = filled(MemoryStore(), range(10, 110, 10))
    away = Refusing(store, "remove", range(200), errors.DeadlineExceededError)
    (lapse,) = Retention(away, [KeepLast(1)]).retain(committed=100, lineage=LINEAGE).lapses
    assert lapse.steps == tuple(range(10, 100, 10))
    assert len(away.calls) == 1


def test_old_checkpoints_that_are_locked_do_not_keep_later_ones():
    """The oldest come first, and three refusals in a row end a run: what was refused before waits behind the others."""
    store = filled(MemoryStore(), [1, 2, 3, 4, 50])
    locked = Refusing(store, "remove", [1, 2, 3, 4])
    retention = Retention(locked, [KeepLast(1)])
    assert retention.retain(committed=50, lineage=LINEAGE).removed == ()
    for step in (60, 70, 80):
        filled(store, [step])
        retention.retain(committed=step, lineage=LINEAGE)
    assert recorded_steps(store) == [1, 2, 3, 4, 80]
    locked.steps.clear()
    filled(store, [90])
    assert retention.retain(committed=90, lineage=LINEAGE).removed == (1, 2, 3, 4, 80)


def test_what_stands_below_a_record_that_may_not_be_read_stays_and_above_it_retention_goes_on():
    store = filled(MemoryStore(), [10, 20, 30, 40])
    closed = Refusing(store, "get", [20])
    done = Retention(closed, [KeepLast(1)]).retain(committed=40, lineage=LINEAGE)
    assert done.removed == (30,)
    assert [(lapse.steps, type(lapse.error)) for lapse in done.lapses] == [((20,), errors.StoreAuthError)]
    assert recorded_steps(store) == [10, 20, 40]


def test_of_thousands_of_records_that_may_not_be_read_a_few_are_tried():
    store = filled(MemoryStore(), [1])
    record = store.get(keys.record_key(1), max_bytes=2**20)
    for step in range(2, 2000):
        store.put(keys.record_key(step), [record])
    closed = Refusing(store, "get", range(3000))
    done = Retention(closed, [KeepLast(1)]).retain(committed=1999, lineage=LINEAGE)
    assert done.removed == ()
    assert len(closed.calls) < 30
    assert done.lapses[0].steps == tuple(range(1, 2000))


def test_a_mark_that_cannot_be_read_costs_no_good_checkpoint_its_place():
    store = filled(MemoryStore(), [10, 20, 30])
    mark_damaged(store, 30)
    filled(store, [40])
    mark_damaged(store, 40)
    filled(store, [50])

    class Hiding(FaultyStore):
        def get(self, key, *, max_bytes):
            if key == keys.damaged_key(30):
                raise errors.StoreAuthError("no", key=key)
            return super().get(key, max_bytes=max_bytes)

    retention = Retention(Hiding(store), [KeepLast(2)])
    done = retention.retain(committed=50, lineage=LINEAGE)
    assert done.removed == ()
    assert [lapse.steps for lapse in done.lapses] == [(30,)]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda store: store.put(keys.record_key(10), [b"{"]), errors.RecordError),
        (lambda store: change_record(store, 10, format=2), errors.FormatVersionError),
    ],
    ids=["damaged", "newer"],
)
def test_a_record_that_is_left_alone_is_told_once(spoil, kind):
    store = filled(MemoryStore(), [10, 20, 30])
    retention = Retention(store, [KeepLast(2)])
    assert retention.retain(committed=20, lineage=LINEAGE).lapses == ()
    spoil(store)
    filled(store, [40])
    (lapse,) = retention.retain(committed=40, lineage=LINEAGE).lapses
    assert lapse.steps == (10,)
    assert isinstance(lapse.error, kind)
    filled(store, [50])
    assert retention.retain(committed=50, lineage=LINEAGE).lapses == ()
    assert recorded_steps(store) == [10, 40, 50]


def find_folder(store, step):
    (folder,) = {entry.key.rpartition("/")[0] + "/" for entry in store.list(f"step-{step:010d}/")}
    return folder
