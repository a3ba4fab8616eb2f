"""Which checkpoints stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt import KeepEvery, KeepLast, errors
from asyncckpt.engine.catalog import find_checkpoints
from asyncckpt.engine.marks import mark_damaged
from asyncckpt.engine.retention import doomed, retain
from asyncckpt.format import keys
from asyncckpt.restore import load
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.writer import write_checkpoint

rules = st.lists(
    st.one_of(st.builds(KeepLast, st.integers(1, 5)), st.builds(KeepEvery, st.integers(1, 50))), max_size=3
)


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
        assert retain(store, [KeepLast(2)], known_pinned=set(), committed=40) == [10, 20]
        assert recorded_steps(store) == [30, 40]
        assert steps_with_objects(store) == {30, 40}
        for step in (30, 40):
            assert load("memory://unused", step=step, store=store)["x"][0].item() == step


def test_a_pinned_checkpoint_stays_and_is_read_only_once():
    store = MemoryStore()
    filled(store, [10], pinned=True)
    filled(store, [20, 30])
    pinned = set()
    assert retain(store, [KeepLast(1)], known_pinned=pinned, committed=30) == [20]
    assert recorded_steps(store) == [10, 30]
    counted = FaultyStore(store, operations={"get"})
    assert retain(counted, [KeepLast(1)], known_pinned=pinned, committed=30) == []
    assert counted.calls == []


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint():
    """The record goes first: whatever comes after, the step is absent."""
    calls = 0
    while True:
        calls += 1
        store = MemoryStore()
        filled(store, [10, 20, 30])
        cut = FaultyStore(store, {calls}, operations={"delete"}, error=lambda: errors.StoreAuthError("cut"))
        try:
            retain(cut, [KeepLast(1)], known_pinned=set(), committed=30)
        except errors.StoreAuthError:
            for step in recorded_steps(store):
                assert load("memory://unused", step=step, store=store)["x"][0].item() == step
        else:
            break
    assert calls > 4


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest():
    store = filled(MemoryStore(), [10, 20, 30])
    mark_damaged(store, 20)
    mark_damaged(store, 30)
    filled(store, [15])  # restored from 10, and went on
    assert retain(store, [KeepLast(2)], known_pinned=set(), committed=15) == []
    assert load("memory://unused", step=10, store=store)["x"][0].item() == 10


def test_a_damaged_checkpoint_goes_when_its_time_has_come():
    store = filled(MemoryStore(), [10, 20, 30, 40])
    mark_damaged(store, 10)
    assert retain(store, [KeepLast(2)], known_pinned=set(), committed=40) == [10, 20]
    assert recorded_steps(store) == [30, 40]
    assert [entry.key for entry in store.list() if "damaged" in entry.key] == []


def test_what_was_just_committed_stays_below_newer_steps_too():
    """A Saver that restored an old step by its number and goes on from there."""
    store = filled(MemoryStore(), [10, 20, 30])
    filled(store, [11])
    retain(store, [KeepLast(2)], known_pinned=set(), committed=11)
    assert 11 in recorded_steps(store)
    assert load("memory://unused", step=11, store=store)["x"][0].item() == 11


def test_an_unreadable_record_is_left_alone():
    store = filled(MemoryStore(), [20, 30])
    store.put(keys.record_key(10), [b"{"])
    assert retain(store, [KeepLast(1)], known_pinned=set(), committed=30) == [20]
    assert recorded_steps(store) == [10, 30]
