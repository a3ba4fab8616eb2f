"""The front door to saving, in this process: a store in memory and the in-process engine."""

import copy
import gc
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import torch

import asyncckpt
from asyncckpt import Best, KeepEvery, KeepLast, Run, Saver, errors, events
from asyncckpt.engine.client import ServiceEngine
from asyncckpt.engine.inline import InlineEngine
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.processes import PATIENCE_S, descriptors, eventually
from tests.training import Training, assert_numbered, assert_same, numbered

names = itertools.count()


@pytest.fixture
def url():
    return f"memory://saver-{next(names)}"


class GatedStore(FaultyStore):
    """Puts wait until `gate` is set."""

    def __init__(self, inner=None, **options):
        super().__init__(inner or MemoryStore(), **options)
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def put(self, key, data, *, if_absent=False):
        self.waiting.set()
        assert self.gate.wait(PATIENCE_S)
        super().put(key, data, if_absent=if_absent)


def loaded(store, step):
    return asyncckpt.load("memory://", step=step, store=store)


def test_what_was_saved_is_what_stood_at_the_call(url):
    training = Training().step(3)
    with Saver(url) as saver:
        saver.save(3, training.state)
        expected = training.facts()
        training.step(4)
        saver.wait()
        other = Training(seed=1).step()
        assert saver.restore(other.state).step == 3
    assert_same(other.facts(), expected)


def test_a_run_that_resumes_ends_bit_for_bit_where_an_uninterrupted_one_does(url):
    training = Training().step(5)
    with Saver(url) as saver:
        saver.save(5, training.state)
    training.step(5)
    resumed = Training(seed=7)
    with Saver(url) as saver:
        assert saver.restore(resumed.state).step == 5
    assert_same(resumed.step(5).facts(), training.facts())


def test_nothing_to_restore_is_none(url):
    with Saver(url) as saver:
        assert saver.restore(Training().state) is None


def test_a_metric_that_no_checkpoint_has_is_no_new_run(url):
    training = Training().step(1)
    with Saver(url) as saver:
        saver.save(1, training.state, metrics={"val_loss": 1.0})
        saver.wait()
        before = training.facts()
        with pytest.raises(errors.CheckpointNotFoundError, match=r"1 are there \(the last: 1\).*metrics=\{'val_los'"):
            saver.restore(training.state, step=Best("val_los"))
        assert_same(training.facts(), before)
        assert saver.restore(training.state, step=Best("val_loss", mode="min")).step == 1


def test_every_codec_restores_exactly(url):
    for step, codec in enumerate(("auto", "planes", "zstd", "none")):
        training = Training(seed=step).step(2)
        with Saver(url, codec=codec) as saver:
            saver.save(step, training.state)
        expected = training.facts()
        other = Training(seed=99).step()
        asyncckpt.restore(url, other.state, step=step)
        assert_same(other.facts(), expected)


def test_the_report_tells_where_time_and_bytes_went(url):
    seen = []
    with Saver(url, codec="planes", hooks=[seen.append]) as saver:
        report = saver.save(1, numbered(1)).result(PATIENCE_S)
    assert report.raw_bytes == 600_000
    assert 0 < report.stored_bytes < 600_000
    assert report.total_s >= report.commit_s > 0
    assert report.staged_s > 0
    assert report.encode_s > 0
    assert report.skipped is None
    kinds = [type(event) for event in seen]
    assert events.SaveStaged in kinds
    assert kinds.count(events.ShardStored) == 1
    assert kinds[-1] is events.SaveCommitted


def test_metrics_epoch_tags_and_config_stand_in_the_record(url):
    with Saver(url, config={"lr": 0.1, "layers": [1, 2]}) as saver:
        saver.save(1, numbered(1), metrics={"loss": 0.5, "nan": float("nan")}, epoch=4, tags=["best"])
    checkpoint = Run(url).get(1)
    assert checkpoint.metrics["loss"] == 0.5
    assert (checkpoint.epoch, checkpoint.tags) == (4, ("best",))
    assert checkpoint.config == {"lr": 0.1, "layers": [1, 2]}
    assert checkpoint.record.versions["torch"] == torch.__version__
    assert checkpoint.record.versions["asyncckpt"] == asyncckpt.__version__


@pytest.mark.parametrize("config", [{1: 2}, object(), {"a": float("nan")}, (1, 2)])
def test_a_config_that_a_record_cannot_hold_raises_at_once(url, config):
    with pytest.raises(ValueError, match="config"):
        Saver(url, config=config)


def test_a_step_that_exists_is_skipped_reported_and_warned_of(url):
    with Saver(url) as saver:
        saver.save(1, numbered(1)).result(PATIENCE_S)
    seen = []
    with Saver(url, hooks=[seen.append]) as saver:
        report = saver.save(1, numbered(2)).result(PATIENCE_S)
        assert report.skipped == "the step exists already"
        assert saver.skipped_saves == 1
        with pytest.warns(RuntimeWarning, match="step 1 was skipped"):
            saver.save(2, numbered(2))
    assert events.SaveSkipped(1, "the step exists already") in seen
    assert_numbered(asyncckpt.load(url, step=1), 1)


def test_a_step_that_exists_raises_if_so_chosen(url):
    with Saver(url) as saver:
        saver.save(1, numbered(1))
    saver = Saver(url, on_exists="raise")
    save = saver.save(1, numbered(2))
    with pytest.raises(errors.CheckpointConflictError) as raised:
        save.result(PATIENCE_S)
    assert raised.value.step == 1
    saver.close()
    assert_numbered(asyncckpt.load(url, step=1), 1)


def test_the_same_step_twice_in_flight_is_committed_once():
    store = GatedStore()
    with Saver("memory://", store=store, pending=2) as saver:
        first, second = saver.save(1, numbered(1)), saver.save(1, numbered(1))
        store.gate.set()
        reports = [save.result(PATIENCE_S) for save in (first, second)]
    assert sorted(bool(report.skipped) for report in reports) == [False, True]
    assert_numbered(loaded(store, 1), 1)


def test_a_saver_that_restored_below_the_newest_raises_until_the_newer_ones_are_taken_away(url):
    with Saver(url) as saver:
        for step in (1, 2, 3):
            saver.save(step, numbered(step))
    with Saver(url) as saver:
        saver.restore(numbered(0), step=1)
        with pytest.raises(errors.CheckpointConflictError, match="rewind"):
            saver.save(2, numbered(9))
        Run(url).rewind(1)
        assert saver.save(2, numbered(9)).result(PATIENCE_S).skipped is None
    loaded_again = asyncckpt.load(url, step=2)
    assert loaded_again["step"] == 9


def test_a_full_queue_raises_if_so_chosen_and_the_save_in_flight_is_untouched():
    store = GatedStore()
    with Saver("memory://", store=store, when_full="raise") as saver:
        first = saver.save(1, numbered(1))
        with pytest.raises(errors.QueueFullError) as raised:
            saver.save(2, numbered(2))
        assert raised.value.step == 2
        store.gate.set()
        assert first.result(PATIENCE_S).step == 1
        saver.save(3, numbered(3)).result(PATIENCE_S)
    assert_numbered(loaded(store, 1), 1)


def test_a_full_queue_skips_if_so_chosen_counted_and_reported():
    store = GatedStore()
    with Saver("memory://", store=store, when_full="skip") as saver:
        saver.save(1, numbered(1))
        skipped = saver.save(2, numbered(2))
        assert skipped.done()
        assert "in flight" in skipped.result().skipped
        assert saver.skipped_saves == 1
        with pytest.warns(RuntimeWarning, match="step 2 was skipped"):
            saver.save(3, numbered(3))
        store.gate.set()
        saver.wait(PATIENCE_S)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saver.save(4, numbered(4))
    assert [entry.key for entry in store.list(delimiter=True) if entry.key.endswith(".json")] == [
        "step-0000000001.json",
        "step-0000000004.json",
    ]


def test_a_full_queue_waits_by_default():
    store = GatedStore()
    with Saver("memory://", store=store) as saver:
        saver.save(1, numbered(1))
        timer = threading.Timer(0.05, store.gate.set)
        timer.start()
        saver.save(2, numbered(2))  # returns when the first one's arena is free
        assert store.gate.is_set()
        saver.wait(PATIENCE_S)
    timer.join()
    assert_numbered(loaded(store, 2), 2)


def test_two_snapshots_may_be_in_flight_and_both_are_kept_apart():
    store = GatedStore()
    with Saver("memory://", store=store, pending=2, when_full="raise") as saver:
        saves = [saver.save(step, numbered(step)) for step in (1, 2)]
        with pytest.raises(errors.QueueFullError):
            saver.save(3, numbered(3))
        store.gate.set()
        for save in saves:
            save.result(PATIENCE_S)
    for step in (1, 2):
        assert_numbered(loaded(store, step), step)


def test_a_timeout_of_wait_raises_and_the_save_goes_on():
    store = GatedStore()
    with Saver("memory://", store=store) as saver:
        save = saver.save(1, numbered(1))
        with pytest.raises(TimeoutError, match="step 1"):
            saver.wait(0.01)
        with pytest.raises(TimeoutError, match="step 1"):
            save.result(0.01)
        saver.wait_staged(PATIENCE_S)
        store.gate.set()
        saver.wait(PATIENCE_S)
        assert save.done()
    assert_numbered(loaded(store, 1), 1)


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_a_failed_save_warns_at_the_next_is_raised_once_by_wait_and_the_store_is_clean(codec):
    store = FaultyStore(MemoryStore(), {1}, operations={"put"}, error=lambda: errors.DiskFullError("full"))
    saver = Saver("memory://", store=store, codec=codec)
    failed = saver.save(1, numbered(1))
    failed._ended.wait(PATIENCE_S)
    with pytest.warns(RuntimeWarning, match="step 1 failed: DiskFullError: full"):
        saver.save(2, numbered(2))
    with pytest.raises(errors.SaveFailedError) as raised:
        saver.wait(PATIENCE_S)
    assert list(raised.value.failures) == [1]
    assert isinstance(raised.value.failures[1], errors.DiskFullError)
    assert raised.value.failures[1].step == 1
    saver.wait(PATIENCE_S)
    saver.close()
    assert {key.split("/")[0].split(".")[0] for key in (entry.key for entry in store.list())} == {"step-0000000002"}
    assert_numbered(loaded(store, 2), 2)


def test_close_raises_what_nobody_was_told_and_frees_everything():
    store = FaultyStore(MemoryStore(), {1}, operations={"put"}, error=lambda: errors.DiskFullError("full"))
    before = descriptors(), threading.active_count()
    saver = Saver("memory://", store=store, codec="none")
    saver.save(1, numbered(1))
    with pytest.raises(errors.SaveFailedError):
        saver.close()
    saver.close()
    assert (descriptors(), threading.active_count()) == before


def test_the_nth_failure_in_a_row_raises_at_save():
    store = FaultyStore(MemoryStore(), range(1, 3), operations={"put"}, error=lambda: errors.DiskFullError("full"))
    with Saver("memory://", store=store, max_failed_saves=2) as saver:
        saver.save(1, numbered(1))._ended.wait(PATIENCE_S)
        with pytest.warns(RuntimeWarning):
            saver.save(2, numbered(2))._ended.wait(PATIENCE_S)
        with pytest.raises(errors.SaveFailedError) as raised:
            saver.save(3, numbered(3))
        assert list(raised.value.failures) == [1, 2]
        saver.save(4, numbered(4)).result(PATIENCE_S)


def test_retention_keeps_the_newest_the_regular_and_the_pinned(url):
    seen = []
    with Saver(url, keep=[KeepLast(2), KeepEvery(4)], hooks=[seen.append]) as saver:
        for step in range(1, 10):
            saver.save(step, numbered(step, 1000), pin=step == 3)
    assert [checkpoint.step for checkpoint in Run(url).checkpoints()] == [3, 4, 8, 9]
    removed = [step for event in seen if isinstance(event, events.CheckpointsRemoved) for step in event.steps]
    assert sorted(removed) == [1, 2, 5, 6, 7]
    for step in (3, 4, 8, 9):
        assert_numbered(asyncckpt.load(url, step=step), step, 1000)


def test_an_unsupported_state_raises_before_anything_starts(url):
    with Saver(url) as saver:
        for bad in ({"a": torch.empty(2, device="meta")}, {"a": object()}):
            with pytest.raises(errors.SnapshotError) as raised:
                saver.save(1, bad)
            assert "a" in (raised.value.key or str(raised.value))
        saver.wait(PATIENCE_S)
        saver.save(1, numbered(1)).result(PATIENCE_S)


def test_a_state_that_grows_shrinks_and_changes_is_saved_each_time(url):
    with Saver(url) as saver:
        for step, elements in enumerate((100, 100_000, 10, 100_000, 300_000)):
            saver.save(step, numbered(step, elements))
    for step, elements in enumerate((100, 100_000, 10, 100_000, 300_000)):
        assert_numbered(asyncckpt.load(url, step=step), step, elements)


def test_auto_measures_the_other_codec_in_the_third_save_and_every_save_restores(tmp_path):
    state = {f"t{number}": torch.randn(2_000_000) for number in range(5)}  # 40 MB: enough to be measured
    stored = []
    with Saver(tmp_path) as saver:
        for step in range(5):
            state["t0"].fill_(step)
            stored.append(saver.save(step, state).result(PATIENCE_S).stored_bytes)
    raw_bytes = sum(tensor.nbytes for tensor in state.values())
    assert [size < raw_bytes for size in stored[:3]] == [False, False, True]
    for step in range(5):
        assert asyncckpt.load(tmp_path, step=step)["t0"][0] == step
        assert torch.equal(asyncckpt.load(tmp_path, step=step)["t1"], state["t1"])


def test_one_arena_serves_both_codecs(tmp_path):
    state = {"cut": torch.randn(20_000_000), "small": [torch.randn(77) for _ in range(50)]}
    with Saver(tmp_path) as saver:
        for step in range(4):
            saver.save(step, state)
            saver.wait()
        assert saver._launcher._arenas._next == 1


@pytest.mark.parametrize("name", ["index.json.zst", "state.pt"])
def test_a_commit_that_fails_for_good_is_told_and_leaves_no_view_of_the_arena(name):
    class Full(MemoryStore):
        def put(self, key, data, *, if_absent=False):
            if key.endswith(name):
                raise errors.DiskFullError("no space", key=key)
            super().put(key, data, if_absent=if_absent)

    gc.disable()
    try:
        saver = Saver("unused", store=Full())
        saver.save(1, numbered(1, 1_000_000))
        with pytest.raises(errors.SaveFailedError, match="no space"):
            saver.close()
    finally:
        gc.enable()


def test_many_structures_in_turn_do_not_accumulate(url):
    with Saver(url) as saver:
        for step in range(30):
            saver.save(step, {f"group{step % 12}": torch.full((10,), float(step))})
        assert len(saver._launcher._planner._known) <= 16
    for step in range(30):
        assert asyncckpt.load(url, step=step)[f"group{step % 12}"][0] == step


def test_states_without_a_tensor_or_without_anything_are_saved(url):
    with Saver(url) as saver:
        saver.save(1, {"progress": {"steps": 5}})
        saver.save(2, {})
        saver.save(3, {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)})
    assert asyncckpt.load(url, step=1) == {"progress": {"steps": 5}}
    assert asyncckpt.load(url, step=2) == {}
    found = asyncckpt.load(url, step=3)
    assert found["empty"].shape == (0, 3)
    assert found["scalar"] == 2.5


def test_several_threads_may_save_at_once(url):
    with Saver(url, pending=2) as saver:
        threads = [
            threading.Thread(target=lambda step=step: saver.save(step, numbered(step, 1000))) for step in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    for step in range(12):
        assert_numbered(asyncckpt.load(url, step=step), step, 1000)


def test_a_torn_snapshot_fails_its_save_and_the_next_ones_are_eager(url):
    training = Training(width=64).step()
    saver = Saver(url)
    saver._launcher._copier._before_copy = lambda: training.model.embed.weight.data.add_(1)
    save = saver.save(1, training.state)
    with pytest.raises(errors.TornSnapshotError, match="optimizer") as raised:
        save.result(PATIENCE_S)
    assert raised.value.step == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saver._launcher._copier._before_copy = None
        saver.save(2, training.state)
    assert saver._launcher.overlap is False
    saver.close()
    assert [checkpoint.step for checkpoint in Run(url).checkpoints()] == [2]


def test_prepare_does_ahead_what_the_first_save_would_do(url):
    training = Training().step()
    with Saver(url, pending=2) as saver:
        saver.prepare(training.state)
        assert len(saver._launcher._arenas.all()) == 2
        arenas = saver._launcher._arenas.all()
        saver.save(1, training.state)
        assert set(saver._launcher._arenas.all()) == set(arenas)
    assert Run(url).latest().step == 1


def test_a_second_save_of_the_same_structure_plans_nothing(url):
    training = Training().step()
    with Saver(url) as saver:
        saver.save(1, training.state)
        plans = dict(saver._launcher._planner._known)
        for step in range(2, 6):
            training.step()
            saver.save(step, training.state)
        assert all(saver._launcher._planner._known[key] is known for key, known in plans.items())
        assert len(saver._launcher._planner._known) <= 2  # one for each codec that may be chosen
        assert len(saver._launcher._arenas.all()) == 1


def test_a_body_that_fails_keeps_its_own_error_and_the_save_is_finished(url):
    with pytest.raises(ZeroDivisionError), Saver(url) as saver:
        saver.save(1, numbered(1))
        raise ZeroDivisionError
    assert_numbered(asyncckpt.load(url), 1)


def test_an_interrupted_close_hands_over_and_leaves(monkeypatch):
    store = GatedStore()
    saver = Saver("memory://", store=store)
    save = saver.save(1, numbered(1))
    threading.Timer(0.05, store.gate.set).start()

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(saver._ledger, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.close()
    assert save.done()
    assert_numbered(loaded(store, 1), 1)


def test_a_dropped_saver_finishes_what_it_was_given_and_leaves_no_thread(url):
    before = set(threading.enumerate())
    save = Saver(url).save(1, numbered(1))
    assert save.result(PATIENCE_S).step == 1  # whoever holds the Save has its answer
    assert_numbered(asyncckpt.load(url), 1)
    eventually(lambda: set(threading.enumerate()) <= before, "its threads have ended")


def test_a_dropped_saver_that_never_saved_starts_nothing(url):
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Saver(url).restore({})
        assert threading.active_count() == before


def test_a_saver_that_was_saved_with_is_freed_with_its_last_reference(url):
    saver = Saver(url, hooks=[lambda event: None])
    saver.save(1, Training().step().state).result(PATIENCE_S)
    gone = weakref.ref(saver)
    del saver
    assert gone() is None, "something of ours still leads to it"


def test_after_close_every_call_says_so(url):
    saver = Saver(url)
    saver.close()
    for call in (lambda: saver.save(1, {}), saver.wait, saver.wait_staged, lambda: saver.prepare({})):
        with pytest.raises(errors.CheckpointError, match="closed"):
            call()
    saver.close()


def test_a_saver_cannot_be_pickled_or_copied(url):
    with Saver(url) as saver:
        for make in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="belongs to one process"):
                make(saver)


@pytest.mark.parametrize("step", [-1, 2**53 + 1, 1.0, True, "1"])
def test_a_step_is_a_whole_number(url, step):
    with Saver(url) as saver, pytest.raises(ValueError, match="step"):
        saver.save(step, {})


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "gzip"},
        {"when_full": "drop"},
        {"on_exists": "overwrite"},
        {"engine": "thread"},
        {"engine": "service"},  # a store in memory lives in this process
        {"pending": 0},
        {"workers": 0},
    ],
)
def test_a_choice_that_does_not_exist_raises_at_once(url, options):
    with pytest.raises(ValueError):
        Saver(url, **options)


def test_an_arena_that_memory_cannot_hold_raises_and_the_next_save_works(url, monkeypatch):
    from asyncckpt.engine.arena import Arena

    def no_memory(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    with Saver(url) as saver:
        with monkeypatch.context() as patched:
            patched.setattr(Arena, "create", no_memory)
            with pytest.raises(errors.SnapshotError, match="memory"):
                saver.save(1, numbered(1))
        saver.save(2, numbered(2)).result(PATIENCE_S)


def test_an_engine_that_cannot_start_raises_and_the_next_save_works(url, monkeypatch):
    with Saver(url) as saver:
        with monkeypatch.context() as patched:
            for engine in (InlineEngine, ServiceEngine):
                patched.setattr(engine, "start", lambda _: (_ for _ in ()).throw(OSError("no process")))
            with pytest.raises(errors.CheckpointError, match="no process"):
                saver.save(1, numbered(1))
        saver.save(2, numbered(2)).result(PATIENCE_S)
        saver.wait(PATIENCE_S)


def test_retries_are_counted_and_told():
    seen = []
    name = f"saver-{next(names)}"
    from asyncckpt.store import opening

    opening._memories[name] = FaultyStore(MemoryStore(), {1, 2}, operations={"put"})
    with Saver(f"memory://{name}", hooks=[seen.append]) as saver:
        report = saver.save(1, numbered(1)).result(PATIENCE_S)
    assert report.retries == 2
    assert len([event for event in seen if isinstance(event, events.StoreRetried)]) == 2


def test_a_step_set_aside_by_an_earlier_run_is_no_newer_branch(tmp_path):
    with Saver(tmp_path) as saver:
        for step in (1, 2):
            saver.save(step, numbered(step))
            saver.wait()
    for shard in tmp_path.glob("step-0000000002/*/*.safetensors*"):
        shard.write_bytes(b"damaged")
    with Saver(tmp_path) as saver, pytest.warns(UserWarning, match="passed over"):
        assert saver.restore(numbered(0)).step == 1
    with Saver(tmp_path) as saver:
        assert saver.restore(numbered(0)).step == 1
        assert saver.save(1, numbered(1)).result().skipped
        with pytest.warns(RuntimeWarning, match="exists already"):
            assert not saver.save(2, numbered(2)).result().skipped
    assert_numbered(asyncckpt.load(tmp_path), 2)


def test_a_damaged_step_that_cannot_be_set_aside_is_warned_about_and_the_one_before_is_restored():
    inner = MemoryStore()
    with Saver("memory://", store=inner) as saver:
        for step in (1, 2):
            saver.save(step, numbered(step))
            saver.wait()
    for entry in list(inner.list("step-0000000002/")):
        if "safetensors" in entry.key:
            inner.put(entry.key, [b"damaged"])
    full = FaultyStore(inner, range(99), operations={"put"}, error=lambda: errors.DiskFullError("no space left"))
    with Saver("memory://", store=full) as saver:
        state = numbered(0)
        with pytest.warns(UserWarning, match="passed over|set aside") as told:
            restored = saver.restore(state)
        assert restored.step == 1
        assert_numbered(state, 1)
        expected = (
            "checkpoint 2 is damaged and could not be set aside (DiskFullError: no space left), so a save of step 2 will be skipped "
            "as if it were good: delete it, or rewind to step 1 with Run(url).rewind(1), once the store takes writes"
        )
        assert expected in [str(one.message) for one in told]
        full.fail = ()
        assert saver.save(2, numbered(2)).result().skipped
        with pytest.warns(RuntimeWarning, match="exists already"):
            assert saver.save(3, numbered(3)).result().skipped is None
