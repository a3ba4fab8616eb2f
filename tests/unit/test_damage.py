"""What is damage and what is only misread, by every road that reads a checkpoint; and which checkpoints a Saver sets aside."""

import warnings

import pytest
import torch

import asyncckpt
from asyncckpt import Best, Run, Saver, errors
from asyncckpt.checkpoints.marks import mark_damaged, read_mark
from asyncckpt.format import keys
from asyncckpt.store.memory import MemoryStore
from tests.records import change_record
from tests.unreliable import BadPath
from tests.writer import write_checkpoint

URL = "memory://unused"
LARGE = 600_000  # elements: more than is read side by side with others


def state_of(step):
    torch.manual_seed(step)
    return {"model": {"w": torch.randn(LARGE), "b": torch.randn(7)}, "other": {"v": torch.randn(50)}, "n": step}


def blank():
    return {"model": {"w": torch.zeros(LARGE), "b": torch.zeros(7)}, "other": {"v": torch.zeros(50)}, "n": 0}


def stored_run(*steps, codec="none"):
    store = MemoryStore()
    for step in steps:
        write_checkpoint(store, step, state_of(step), codec=codec, metrics={"loss": 100.0 - step})
    return store


def is_step(state, step):
    expected = state_of(step)
    return torch.equal(state["model"]["w"], expected["model"]["w"]) and state["n"] == step


def restored(store, tmp_path):
    state = blank()
    asyncckpt.restore(URL, state, step=20, store=store)
    assert is_step(state, 20)


def loaded(store, tmp_path):
    assert is_step(asyncckpt.load(URL, step=20, store=store), 20)


def loaded_by_run(store, tmp_path):
    assert is_step(Run(URL, store=store).get(20).load(), 20)


def one_tensor(store, tmp_path):
    assert torch.equal(Run(URL, store=store).get(20).tensor("model/w"), state_of(20)["model"]["w"])


def exported(store, tmp_path):
    Run(URL, store=store).get(20).export(tmp_path / "weights.safetensors")


def verified(store, tmp_path):
    Run(URL, store=store).get(20).verify()


ROADS = [restored, loaded, loaded_by_run, one_tensor, exported, verified]
PARTS = ["step-0000000020.json", "index.json", "model-", "state.pt"]
cases = pytest.mark.parametrize(
    ("road", "part"),
    [
        (road, part)
        for road in ROADS
        for part in PARTS
        if not (part == "state.pt" and road in (one_tensor, exported))  # they read no values
    ],
)
codecs = pytest.mark.parametrize("codec", ["none", "planes"])
kinds = pytest.mark.parametrize(("codec", "near"), [("none", True), ("none", False), ("planes", False)])


def path_to(codec, near, **faults):
    path = BadPath(stored_run(10, 20, codec=codec), **faults)
    path.rereads = near
    return path


def flip(data, position=0):
    data[position % len(data)] ^= 0x20


@cases
@kinds
def test_a_flip_or_a_404_at_the_first_reading_of_an_object_costs_that_range_alone(road, part, codec, near, tmp_path):
    path = path_to(codec, near)
    road(path, tmp_path)
    usual_bytes = path.read_bytes
    for fault in ("spoil", "hide"):
        path = path_to(codec, near)
        if fault == "spoil":
            path.spoil = lambda key, data, number, connection: part in key and number == 1 and flip(data)
        else:
            path.hide = lambda key, number, connection: part in key and number == 1
        road(path, tmp_path)
        assert 0 < path.opened <= 2, "the header of a shard may be read before its tensors"
        assert path.read_bytes < 2 * usual_bytes


@cases
@kinds
def test_bytes_that_stay_wrong_are_damage(road, part, codec, near, tmp_path):
    path = path_to(codec, near, spoil=lambda key, data, number, connection: part in key and flip(data))
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        road(path, tmp_path)
    assert caught.value.step == 20
    assert part in caught.value.key
    assert path.time.now_s < 60


@cases
@kinds
def test_bytes_that_change_are_the_paths_fault(road, part, codec, near, tmp_path):
    path = path_to(codec, near)
    path.spoil = lambda key, data, number, connection: part in key and flip(data, number)
    with pytest.raises(errors.StoreError, match="bytes change on the way") as caught:
        road(path, tmp_path)
    assert caught.value.step == 20
    assert path.time.now_s > 50


@cases
@kinds
def test_an_object_that_only_GET_does_not_find_is_the_stores_fault(road, part, codec, near, tmp_path):
    path = path_to(codec, near, hide=lambda key, number, connection: part in key)
    with pytest.raises(errors.StoreError, match="contradicts itself"):
        road(path, tmp_path)


@codecs
def test_a_changing_answer_is_never_a_reason_to_fall_back_and_leaves_the_state_alone(codec):
    path = path_to(codec, near=False, spoil=lambda key, data, number, connection: "20/" in key and flip(data, number))
    state = blank()
    with warnings.catch_warnings(), Saver(URL, store=path) as saver:
        warnings.simplefilter("error")
        with pytest.raises(errors.StoreError, match="bytes change"):
            saver.restore(state)
    assert not state["model"]["w"].any()
    assert marks(path) == []


@codecs
def test_what_changes_under_a_restore_that_began_to_overwrite_says_so(codec):
    path = path_to(codec, near=True)
    path.spoil = lambda key, data, number, connection: (
        "model" in key and len(data) > 10**5 and number > 4 and flip(data)
    )
    if codec == "planes":  # read once, through a buffer
        restored(path, None)
        return
    state = blank()
    with pytest.raises(errors.CheckpointError, match="partly overwritten") as caught:
        asyncckpt.restore(URL, state, step=20, store=path)
    assert caught.value.overwritten


@pytest.mark.parametrize("part", ["index.json", "state.pt", "model-"])
def test_a_machine_without_memory_is_no_damage(part):
    class Short(BadPath):
        def get(self, key, *, max_bytes):
            if part in key:
                raise MemoryError
            return super().get(key, max_bytes=max_bytes)

        def get_into(self, key, start, target):
            if part in key:
                raise MemoryError
            super().get_into(key, start, target)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(errors.CheckpointError, match="no memory") as caught:
            asyncckpt.load(URL, store=Short(stored_run(10, 20)))
    assert (type(caught.value), caught.value.step) == (errors.CheckpointError, 20)


# -- marks


def marks(store):
    return [entry.key for entry in store.list() if entry.key.endswith(".damaged")]


def damage(store, step, part="model-"):
    key = next(entry.key for entry in store.list(f"step-{step:010d}/") if part in entry.key)
    data = bytearray(store.get(key, max_bytes=2**30))
    good = bytes(data)
    flip(data, len(data) // 2)
    store.put(key, [data])
    return key, good


def resumed(store, **options):
    state = blank()
    with Saver(URL, store=store) as saver:
        return saver.restore(state, **options), state


def test_a_saver_that_restored_another_one_sets_the_damaged_aside_and_says_what_was_wrong():
    store = stored_run(10, 20)
    key, _ = damage(store, 20)
    with pytest.warns(UserWarning, match="passed over"):
        outcome, state = resumed(store)
    assert outcome.step == 10
    assert is_step(state, 10)
    text = store.get(keys.damaged_key(20), max_bytes=2**20).decode()
    assert text.startswith(keys.folder(20, text.partition("\n")[0]) and read_mark(store, 20))
    for fact in (key, "bytes ", "is stated", "was read"):
        assert fact in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(store)[0].step == 10, "passed over in silence from now on"


@pytest.mark.parametrize("front_door", [asyncckpt.restore, asyncckpt.load])
def test_only_a_saver_marks(front_door):
    store = stored_run(10, 20)
    damage(store, 20)
    with pytest.warns(UserWarning, match="passed over"):
        front_door(URL, *([blank()] if front_door is asyncckpt.restore else []), store=store)
    assert marks(store) == []


def test_nothing_is_marked_when_all_fail():
    store = stored_run(10, 20)
    damage(store, 10)
    damage(store, 20)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(errors.CorruptCheckpointError) as caught:
        resumed(store)
    assert caught.value.step == 20
    assert marks(store) == []


def test_nothing_is_marked_when_a_step_is_asked_for_by_its_number():
    store = stored_run(10, 20)
    damage(store, 20)
    with pytest.raises(errors.CorruptCheckpointError):
        resumed(store, step=20)
    assert marks(store) == []


@pytest.mark.parametrize("rank", [1, 0])
def test_only_rank_0_marks(rank, monkeypatch):
    monkeypatch.setattr("asyncckpt.saver.rank", lambda: rank)
    store = stored_run(10, 20)
    damage(store, 20)
    with pytest.warns(UserWarning, match="passed over"):
        resumed(store)
    assert bool(marks(store)) is (rank == 0)


def test_a_step_that_was_saved_anew_meanwhile_is_not_marked():
    store = stored_run(10, 20)
    damage(store, 20)
    saved = []

    class Racing(BadPath):
        """Another process rewinds and saves step 20 while this one falls back."""

        def get(self, key, *, max_bytes):
            if "0000000010/" in key and not saved:
                saved.append(20)
                store.delete([keys.record_key(20)])
                write_checkpoint(store, 20, state_of(20))
            return super().get(key, max_bytes=max_bytes)

    with pytest.warns(UserWarning, match="passed over"):
        resumed(Racing(store))
    assert marks(store) == []
    assert Run(URL, store=store).latest().step == 20


def test_marked_ones_are_tried_where_all_others_turn_out_to_be_damaged_and_a_good_one_loses_its_mark():
    store = stored_run(10, 20)
    mark_damaged(store, 20)
    damage(store, 10)
    with pytest.warns(UserWarning, match="checkpoint 10 cannot be restored"):
        outcome, state = resumed(store)
    assert outcome.step == 20
    assert is_step(state, 20)
    assert marks(store) == [keys.damaged_key(10)]


def test_a_good_restore_by_number_takes_the_mark_away_too():
    store = stored_run(10, 20)
    mark_damaged(store, 20)
    assert resumed(store, step=20)[0].step == 20
    assert marks(store) == []


def test_a_good_restore_of_a_part_proves_nothing_about_the_rest_and_leaves_the_mark():
    store = stored_run(10, 20)
    mark_damaged(store, 20)
    with Saver(URL, store=store) as saver:
        assert saver.restore({"other": {"v": torch.zeros(50)}}, step=20).step == 20
    assert marks(store) == [keys.damaged_key(20)]


def test_a_mark_that_cannot_be_taken_away_is_a_warning():
    store = stored_run(10, 20)
    mark_damaged(store, 20)

    class ReadOnly(BadPath):
        def delete(self, keys):
            raise errors.StoreAuthError("no right to delete")

    with pytest.warns(UserWarning, match="checkpoint 20 is good, and its mark of damage could not be removed"):
        assert resumed(ReadOnly(store), step=20)[0].step == 20


# -- the choice


def flip_metric(store, step, old, new):
    key = keys.record_key(step)
    text = store.get(key, max_bytes=2**20)
    assert old in text
    store.put(key, [text.replace(old, new, 1)])


def test_best_chooses_among_the_sound_with_a_warning_and_a_saver_sets_the_others_aside():
    store = stored_run(10, 20, 30)
    flip_metric(store, 10, b'"loss": 90.0', b'"loss": 10.0')
    with pytest.warns(UserWarning, match="checkpoint 10 .* passed over: DigestMismatchError"):
        outcome, _ = resumed(store, step=Best("loss"))
    assert outcome.step == 30
    assert marks(store) == [keys.damaged_key(10)]
    assert Run(URL, store=store).best("loss").step == 30


def test_a_flipped_bit_in_a_record_never_restores_other_metadata():
    store = stored_run(10, 20)
    flip_metric(store, 20, b'"epoch": null', b'"epoch": 1234')
    with pytest.warns(UserWarning, match="passed over"):
        assert asyncckpt.restore(URL, blank(), store=store).step == 10
    with pytest.raises(errors.DigestMismatchError):
        Run(URL, store=store).get(20).verify()


@pytest.mark.parametrize("choice", ["latest", Best("loss")])
def test_a_newer_checkpoint_is_raised_wherever_the_choice_meets_it_and_is_never_marked(choice):
    store = stored_run(10, 20, 30)
    damage(store, 30)
    change_record(store, 20, requires=["delta"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(errors.FormatVersionError, match="newer asyncckpt") as caught:
            resumed(store, step=choice)
    assert caught.value.step == 20
    assert marks(store) == []


def test_a_newer_checkpoint_below_the_latest_does_not_matter():
    store = stored_run(10, 20, 30)
    change_record(store, 20, requires=["delta"])
    assert resumed(store)[0].step == 30


def test_an_undamaged_checkpoint_is_read_without_any_further_request():
    path = path_to("planes", near=False)
    asyncckpt.restore(URL, blank(), store=path)
    assert path.gets["list"] == 1
    assert path.gets["head"] == 0
    assert path.gets["get"] == 3, "record, index, values"
    assert path.opened == 0
