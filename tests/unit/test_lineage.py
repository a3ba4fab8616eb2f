"""Whose checkpoints a run counts as its own, and what a run that begins in another's folder is told."""

import logging
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from asyncckpt import KeepLast, Run, Saver, errors, load, restore
from asyncckpt.engine.catalog import read_record
from asyncckpt.lineage import Arrival, note
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.faulty import FaultyStore
from tests.records import change_record
from tests.writer import write_checkpoint


def state_of(step):
    return {"model": {"w": torch.full((8,), float(step))}}


def saved(store, *steps, **options):
    with Saver("memory://unused", store=store, **options) as saver:
        for step in steps:
            saver.save(step, state_of(step)).result(30)


def lineages(store):
    with Run("memory://unused", store=store) as run:
        return {checkpoint.step: checkpoint.record.lineage for checkpoint in run.checkpoints()}


def of_another_process(*steps):
    """A store whose checkpoints this process never saw."""
    store = MemoryStore()
    for step in steps:
        write_checkpoint(store, step, state_of(step), lineage="0a0b0c0d")
    return store


@pytest.mark.parametrize("on_exists", ["skip", "raise"])
def test_a_first_save_below_another_runs_checkpoints_raises_and_names_three_ways_out(on_exists):
    store = of_another_process(5, 100)
    with Saver("memory://unused", store=store, on_exists=on_exists) as saver:
        with pytest.raises(errors.CheckpointConflictError, match="step 100") as raised:
            saver.save(10, state_of(10))
        assert raised.value.step == 10
        for way in ("saver.restore(state)", "Run(url).rewind(5)", "another folder", "adopt=True"):
            assert way in str(raised.value)
    assert lineages(store) == {5: "0a0b0c0d", 100: "0a0b0c0d"}


def test_the_same_process_that_trains_anew_without_a_restore_is_told_too():
    """A cell of a notebook that is run again: its own checkpoints would be removed, one by one."""
    store = MemoryStore()
    saved(store, 80, 90, 100, keep=[KeepLast(3)])
    with Saver("memory://unused", store=store, keep=[KeepLast(3)]) as saver:
        with pytest.raises(errors.CheckpointConflictError):
            saver.save(5, state_of(5))
        with pytest.raises(errors.CheckpointConflictError):
            saver.save(10, state_of(10))
    assert sorted(lineages(store)) == [80, 90, 100]


def test_where_nothing_stands_below_the_message_does_not_send_to_a_rewind_that_cannot_be():
    with (
        Saver("memory://unused", store=of_another_process(100)) as saver,
        pytest.raises(errors.CheckpointConflictError, match="empty the folder"),
    ):
        saver.save(10, state_of(10))


def test_after_a_restore_the_run_goes_on_and_inherits_the_lineage():
    store = of_another_process(10, 20)
    with Saver("memory://unused", store=store) as saver:
        assert saver.restore(state_of(0)).step == 20
        saver.save(25, state_of(25)).result(30)
    assert lineages(store)[25] == "0a0b0c0d"


def go_back_by_restore(saver, store):
    saver.restore(state_of(0), step=10)


def go_back_by_load(saver, store):
    load("memory://unused", step=10, store=store)


@pytest.mark.parametrize("go_back", [go_back_by_restore, go_back_by_load])
def test_who_goes_back_and_leaves_the_newer_ones_there_is_refused_until_they_are_taken_away(go_back):
    """Else `latest` would go on being the branch that was left, and a crash would resume there."""
    store = of_another_process(10, 20)
    with Saver("memory://unused", store=store, keep=[KeepLast(1)]) as saver:
        go_back(saver, store)
        for _ in range(2):
            with pytest.raises(errors.CheckpointConflictError, match=r"rewind\(10\)"):
                saver.save(15, state_of(15))
        Run("memory://unused", store=store).rewind(10)
        saver.save(15, state_of(15)).result(30)
    assert lineages(store) == {15: "0a0b0c0d"}


def test_who_adopts_and_saves_beneath_newer_ones_keeps_its_own():
    store = of_another_process(10, 100, 200)
    with Saver("memory://unused", store=store, keep=[KeepLast(2)], adopt=True) as saver:
        assert saver.restore(state_of(0), step=10).step == 10
        for step in (20, 30, 40):
            saver.save(step, state_of(step)).result(30)
            saver.wait()
    assert sorted(lineages(store)) == [30, 40, 100, 200]


def test_after_a_rewind_the_same_saver_saves():
    store = of_another_process(10, 100)
    with Saver("memory://unused", store=store) as saver:
        with pytest.raises(errors.CheckpointConflictError):
            saver.save(20, state_of(20))
        Run("memory://unused", store=store).rewind(10)
        saver.save(20, state_of(20)).result(30)
    assert sorted(lineages(store)) == [10, 20]


def read_by_restore(store):
    restore("memory://unused", state_of(0), store=store)


def read_by_load(store):
    load("memory://unused", store=store)


def read_by_checkpoint(store):
    Run("memory://unused", store=store).latest().load()


@pytest.mark.parametrize("read", [read_by_restore, read_by_load, read_by_checkpoint])
def test_whoever_read_a_checkpoint_in_this_process_knows_what_it_does(read):
    """Loops that resume by other means than `Saver.restore`."""
    store = of_another_process(10, 20)
    read(store)
    saved(store, 15)
    assert lineages(store)[15] == "0a0b0c0d"


def test_a_folder_is_known_by_its_url_however_it_is_written(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(20, state_of(20)).result(30)
    before = Run(tmp_path).latest().record.lineage
    load(f"file://{tmp_path}")
    with Saver(str(tmp_path), engine="inline") as saver:
        saver.save(10, state_of(10)).result(30)
    assert Run(tmp_path).get(10).record.lineage == before


def test_adopt_goes_on_with_the_newest_checkpoints_lineage():
    store = of_another_process(10, 20)
    saved(store, 15, adopt=True)
    assert lineages(store)[15] == "0a0b0c0d"


def test_adopt_in_an_empty_folder_draws_a_lineage():
    store = MemoryStore()
    saved(store, 15, adopt=True)
    assert len(lineages(store)[15]) == 8


def test_a_run_above_all_others_draws_a_lineage_of_its_own():
    store = of_another_process(10)
    saved(store, 20)
    assert lineages(store)[20] != "0a0b0c0d"


def test_savers_that_follow_each_other_in_one_process_are_one_run():
    """Or a loop that makes a Saver each epoch would never remove anything."""
    store = MemoryStore()
    for step in (1, 2, 3, 4):
        saved(store, step, keep=[KeepLast(2)])
    assert sorted(lineages(store)) == [3, 4]
    assert len(set(lineages(store).values())) == 1


def test_a_damaged_or_marked_checkpoint_above_is_no_conflict():
    store = of_another_process(10, 20, 30)
    store.put("step-0000000030.json", [b"{"])
    store.put("step-0000000020.damaged", [read_record(store, 20).attempt.encode()])
    saved(store, 15)
    assert 15 in lineages(MemoryStoreWithout(store, 20, 30))


class MemoryStoreWithout(FaultyStore):
    """Hides the records of some steps."""

    def __init__(self, inner, *steps):
        super().__init__(inner)
        self.hidden = tuple(f"step-{step:010d}.json" for step in steps)

    def list(self, prefix="", *, delimiter=False, start_after=""):
        lines = self.inner.list(prefix, delimiter=delimiter, start_after=start_after)
        return (line for line in lines if line.key not in self.hidden)


def test_a_newer_checkpoint_above_is_a_conflict_too():
    store = of_another_process(10, 20)
    change_record(store, 20, requires=["delta"])
    with Saver("memory://unused", store=store) as saver, pytest.raises(errors.CheckpointConflictError):
        saver.save(15, state_of(15))


def test_an_ordinary_save_asks_once_whether_its_step_is_free_and_then_only_puts():
    """Each request more is 30 ms on S3, and money."""
    store = FaultyStore(MemoryStore())
    with Saver("memory://unused", store=store) as saver:
        for step in (1, 2):
            store.calls.clear()
            saver.save(step, state_of(step)).result(30)
    # the collection of leftovers, once behind the first commit, may still be under way
    calls = [call for call in store.calls if call[0] not in ("clock", "open_uploads") and call != ("list", "step-")]
    assert [operation for operation, _ in calls] == ["get", "put", "put", "put", "put"]
    assert calls[0] == ("get", "step-0000000002.json")
    assert calls[-1] == ("put", "step-0000000002.json")


def test_only_the_first_save_looks():
    store = CountingStore(MemoryStore())
    with Saver("memory://unused", store=store) as saver:
        saver.save(1, state_of(1)).result(30)
        assert store.keys.count("") == 1, "the listing of the root"
        saver.save(2, state_of(2)).result(30)
    assert store.keys.count("") == 1
    assert store.keys.count("step-") == 1, "that of the collection"


def test_a_store_that_does_not_answer_lets_training_go_on_and_the_engine_looks_instead():
    faulty = FaultyStore(of_another_process(100), {1}, operations={"list"})
    with Saver("memory://unused", store=faulty) as saver:
        save = saver.save(10, state_of(10))
        with pytest.raises(errors.CheckpointConflictError, match="step 100"):
            save.result(30)
        later = saver.save(110, state_of(110))
        assert not later.result(30).skipped
        saver.save(105, state_of(105)).result(30)  # by now this run has checkpoints of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            saver.wait()


def test_a_store_that_hangs_holds_the_first_save_up_for_a_bounded_time_and_no_later_one():
    answer = threading.Event()

    class Hanging(FaultyStore):
        def list(self, prefix="", *, delimiter=False, start_after=""):
            answer.wait(30)
            return super().list(prefix, delimiter=delimiter, start_after=start_after)

    store = Hanging(of_another_process(100))
    arrival = Arrival(store, lambda: nullcontext(store), adopt=False, wait_s=0.05)
    arrival.begin(10)
    arrival.admit(10)
    assert arrival.newcomer, "the engine must look"
    arrival.begin(20)
    arrival.admit(20)
    answer.set()
    arrival.close()
    arrival._wait_s = 30.0
    with pytest.raises(errors.CheckpointConflictError):  # the answer came, if late
        arrival.admit(20)


def test_a_look_that_was_begun_for_another_step_says_nothing_of_this_one():
    """The save that it was begun for was refused, or skipped because every arena was in flight."""
    with Saver("memory://unused", store=of_another_process(100)) as saver:
        with pytest.raises(errors.UnsupportedObjectError):
            saver.save(10, {"model": {"w": object()}})
        assert saver.save(110, state_of(110)).result(30).step == 110
    with Saver("memory://unused", store=of_another_process(100)) as saver:
        with pytest.raises(errors.UnsupportedObjectError):
            saver.save(110, {"model": {"w": object()}})
        with pytest.raises(errors.CheckpointConflictError, match="step 100"):
            saver.save(10, state_of(10))


def test_where_no_thread_can_be_started_the_engine_looks(monkeypatch):
    store = of_another_process(100)
    arrival = Arrival(store, lambda: nullcontext(store), adopt=False, wait_s=15.0)

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for step in (10, 20):
        arrival.begin(step)
        arrival.admit(step)
        assert arrival.newcomer
    arrival.close()


def test_a_later_save_of_the_same_saver_is_no_other_run_for_the_engine_that_looks():
    """An outage: the first save's look waits between two tries while the second save is committed."""
    faulty = FaultyStore(MemoryStore(), {1}, operations={"list"})  # the trainer's own look
    second = threading.Event()

    class Late(FaultyStore):
        def list(self, prefix="", *, delimiter=False, start_after=""):
            lines = list(faulty.list(prefix, delimiter=delimiter, start_after=start_after))
            if threading.current_thread().name.startswith("asyncckpt-upload") and not second.is_set():
                second.set()
                return self.inner_after_commit()
            return lines

        def inner_after_commit(self):
            committed.wait(30)
            return list(faulty.inner.list(delimiter=True))

    committed = threading.Event()
    with Saver("memory://unused", store=Late(faulty), pending=2) as saver:
        first = saver.save(1, state_of(1))
        assert second.wait(30)
        saver.save(2, state_of(2)).result(30)
        committed.set()
        assert not first.result(30).skipped


def test_whatever_the_look_meets_no_traceback_is_printed_and_the_save_tells():
    """An error of a user's store that is none of ours; pytest makes one that ends a thread a failure."""
    faulty = FaultyStore(of_another_process(100), {1}, operations={"list"}, error=lambda: KeyError("vendor's"))
    with Saver("memory://unused", store=faulty) as saver, pytest.raises(errors.CheckpointConflictError):
        saver.save(10, state_of(10)).result(30)


def test_whoever_leaves_in_a_hurry_does_not_wait_for_a_store_that_is_away():
    """Ctrl-C while the first save waits for the listing."""
    answer = threading.Event()

    class Hanging(FaultyStore):
        def list(self, prefix="", *, delimiter=False, start_after=""):
            answer.wait(30)
            return super().list(prefix, delimiter=delimiter, start_after=start_after)

    saver = Saver("memory://unused", store=Hanging(MemoryStore()))
    saver._launcher.arrival.begin(10)
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
    assert time.monotonic() - started_s < 10
    answer.set()
    saver._launcher.arrival.close()


def test_an_adopting_saver_asks_again_while_nobody_answers():
    faulty = FaultyStore(of_another_process(100), {1}, operations={"list"})
    arrival = Arrival(faulty, lambda: nullcontext(faulty), adopt=True, wait_s=15.0)
    for step in (10, 20):
        arrival.begin(step)
        arrival.admit(step)
        arrival.close()
    assert not arrival.newcomer
    assert arrival.lineage == "0a0b0c0d"


def test_what_a_process_knows_of_one_store_says_nothing_of_another():
    store, other = of_another_process(10), of_another_process(10)
    note(store, "0a0b0c0d", restored=10)
    saved(store, 5)
    with Saver("memory://unused", store=other) as saver, pytest.raises(errors.CheckpointConflictError):
        saver.save(5, state_of(5))


@pytest.mark.parametrize("engine", ["inline", "service"])
def test_retention_leaves_another_runs_checkpoints_alone_and_says_so_once(engine, tmp_path, caplog):
    for step in (1, 2, 3):
        with Run(tmp_path) as run:
            write_checkpoint(run._store, step, state_of(step), lineage="0a0b0c0d")
    with (
        caplog.at_level(logging.WARNING, "asyncckpt"),
        Saver(tmp_path, keep=[KeepLast(1)], engine=engine, workers=2) as saver,
    ):
        for step in (10, 11, 12, 13):
            saver.save(step, state_of(step)).result(30)
    with Run(tmp_path) as run:
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2, 3, 13]
    told = [line for line in caplog.messages if "another run" in line]
    assert len(told) == 1
    assert "1, 2, 3" in told[0]


def test_a_users_store_that_has_no_hash_is_known_and_its_damage_is_passed_over_like_any_others():
    @dataclass
    class Plain(MemoryStore):
        name: str = "a dataclass compares by value, and so has no hash"

        def __post_init__(self):
            super().__init__()

    store, other = Plain(), Plain()
    for step in (10, 20, 30):
        write_checkpoint(store, step, state_of(step), lineage="0a0b0c0d")
    write_checkpoint(other, 10, state_of(10), lineage="0a0b0c0d")
    store.put("step-0000000030.json", [b"{"])
    with Saver("memory://unused", store=store) as saver:
        with pytest.warns(UserWarning, match="checkpoint 30 cannot be restored"):
            assert saver.restore(state_of(0)).step == 20
        saver.save(25, state_of(25)).result(30)
    assert lineages(MemoryStoreWithout(store, 30))[25] == "0a0b0c0d"
    with Saver("memory://unused", store=other) as saver, pytest.raises(errors.CheckpointConflictError):
        saver.save(5, state_of(5))
