import json

import pytest
import torch

from asyncckpt import errors
from asyncckpt.checkpoints.marks import mark_damaged
from asyncckpt.engine.catalog import read_record
from asyncckpt.format import keys
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.frames import compress, decompress
from asyncckpt.run import Run
from asyncckpt.store.base import Store
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.faulty import FaultyStore
from tests.records import change_record
from tests.writer import tensor_bytes, write_checkpoint

CODECS = ["planes", "zstd", "none"]


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(300, 100, generator=generator)
    return {"model": {"w": weight, "tied": weight, "b": torch.full((3,), float(step))}, "opt": {"n": step}}


def run_of(*steps: int, **options) -> tuple[Run, CountingStore]:
    store = CountingStore(MemoryStore())
    for step in steps:
        write_checkpoint(store, step, state_of(step), metrics={"loss": abs(25 - step)}, **options)
    return Run("memory://unused", store=store), store


def flip(store: Store, key: str, position: int) -> None:
    data = bytearray(store.get(key, max_bytes=2**30))
    data[position] ^= 0x10
    store.delete([key])
    store.put(key, [data])


def objects_of(store: Store, step: int) -> list[str]:
    return [entry.key for entry in store.list(keys.folder(step, "x")[:-2])]


def all_keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list()]


def test_checkpoints_are_sorted_by_step_and_cost_one_listing():
    run, store = run_of(30, 2, 10**10, 100)
    store.gets.clear()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 30, 100, 10**10]
    assert store.gets == {"list": 1}


def test_an_empty_run_has_nothing():
    run, _ = run_of()
    assert run.checkpoints() == []
    assert run.latest() is None
    assert run.best("loss") is None
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        run.get(3)
    assert caught.value.step == 3


def test_a_folder_without_a_record_is_no_checkpoint():
    run, store = run_of(10, 20)
    store.delete([keys.record_key(20)])
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [10]
    assert run.latest().step == 10


def test_a_marked_checkpoint_is_left_out_but_can_be_got():
    run, store = run_of(10, 20)
    mark_damaged(store, 20)
    assert run.latest().step == 10
    assert run.get(20).step == 20


def test_best_chooses_by_metric_and_ties_go_to_the_newest():
    run, store = run_of(10, 20, 30, 40)
    assert run.best("loss").step == 30
    assert run.best("loss", "max").step == 40
    assert run.best("accuracy") is None
    write_checkpoint(store, 50, state_of(50), metrics={"loss": float("nan")})
    assert run.best("loss", "max").step == 40, "NaN does not compete"


def test_best_passes_over_an_unreadable_record():
    run, store = run_of(10, 20, 30)
    store.delete([keys.record_key(30)])
    store.put(keys.record_key(30), [b"{"])
    with pytest.warns(UserWarning, match="checkpoint 30 cannot be read and was passed over: RecordError"):
        assert run.best("loss").step == 20


def test_best_raises_for_a_newer_checkpoint_since_nobody_knows_its_metrics_here():
    run, store = run_of(10, 20, 30)
    change_record(store, 20, format=9, metrics="elsewhere")
    with pytest.raises(errors.FormatVersionError, match="newer asyncckpt") as caught:
        run.best("loss")
    assert caught.value.step == 20


def test_a_good_verify_takes_the_mark_away_if_it_is_asked_to_and_a_bad_one_never_does():
    run, store = run_of(10, 20)
    mark_damaged(store, 20)
    run.get(20).verify()
    assert run.latest().step == 10
    shard = next(key for key in all_keys(store) if key.startswith("step-0000000020/") and "state.pt" in key)
    good = store.get(shard, max_bytes=2**20)
    store.put(shard, [b"damaged"])
    with pytest.raises(errors.CorruptCheckpointError):
        run.get(20).verify(unmark=True)
    assert run.latest().step == 10
    store.put(shard, [good])
    run.get(20).verify(unmark=True)
    assert run.latest().step == 20


def test_a_checkpoint_tells_what_was_saved_with_it():
    run, store = run_of()
    write_checkpoint(
        store, 5, state_of(5), metrics={"a": 1.5}, epoch=2, tags=("x", "y"), config={"lr": 0.1}, time_s=99.0
    )
    checkpoint = run.latest()
    store.gets.clear()
    assert (checkpoint.metrics, checkpoint.epoch, checkpoint.tags) == ({"a": 1.5}, 2, ("x", "y"))
    assert (checkpoint.config, checkpoint.time) == ({"lr": 0.1}, 99.0)
    assert store.gets == {"get": 1}, "the record is read once and kept"


def test_names_hold_tied_tensors_too():
    run, _ = run_of(5)
    assert sorted(run.latest().names()) == ["model/b", "model/tied", "model/w"]


@pytest.mark.parametrize("codec", CODECS)
def test_one_tensor_is_read_alone(codec):
    run, store = run_of(5, codec=codec)
    checkpoint = run.latest()
    checkpoint.names()
    store.read_bytes = 0
    assert tensor_bytes(checkpoint.tensor("model/b")) == tensor_bytes(torch.full((3,), 5.0))
    assert store.read_bytes < 1000
    assert torch.equal(checkpoint.tensor("model/tied"), state_of(5)["model"]["w"])


def test_a_tensor_that_is_not_there_is_named():
    run, _ = run_of(5)
    with pytest.raises(errors.StateMismatchError, match="model/q"):
        run.latest().tensor("model/q")


def test_load_gives_the_state_or_a_part():
    run, _ = run_of(5)
    assert run.latest().load()["opt"] == {"n": 5}
    assert set(run.latest().load("model")) == {"w", "tied", "b"}


# -- verify


@pytest.mark.parametrize("codec", CODECS)
def test_verify_reads_every_stored_byte(codec):
    run, store = run_of(5, codec=codec, shard_bytes=50_000)
    store.read_bytes = 0
    run.get(5).verify()
    stored = sum(entry.stored_bytes for entry in store.list())
    assert store.read_bytes >= stored


@pytest.mark.parametrize("codec", CODECS)
def test_verify_notices_a_flip_anywhere(codec):
    run, store = run_of(5, codec=codec)
    for key in objects_of(store, 5):
        data = store.get(key, max_bytes=2**30)
        for position in sorted({0, 9, 70, len(data) // 2, len(data) - 1}):
            flip(store, key, position)
            with pytest.raises(errors.CorruptCheckpointError) as caught:
                run.get(5).verify()
            assert (caught.value.step, caught.value.key) == (5, key), position
            store.delete([key])
            store.put(key, [data])
    run.get(5).verify()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda data: None, errors.MissingShardError),
        (lambda data: data[:-1], errors.CorruptCheckpointError),
        (lambda data: data + b"x", errors.CorruptCheckpointError),
        (lambda data: b"", errors.CorruptCheckpointError),
    ],
    ids=["gone", "shorter", "longer", "empty"],
)
def test_verify_notices_a_changed_object(change, kind):
    run, store = run_of(5)
    for key in objects_of(store, 5):
        data = store.get(key, max_bytes=2**30)
        store.delete([key])
        if (changed := change(data)) is not None:
            store.put(key, [changed])
        with pytest.raises(kind) as caught:
            run.get(5).verify()
        assert (caught.value.step, caught.value.key) == (5, key)
        store.put(key, [data])
    run.get(5).verify()


def test_a_checkpoint_removed_meanwhile_is_not_found():
    run, store = run_of(5)
    checkpoint = run.latest()
    checkpoint.names()
    store.delete(all_keys(store))
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        checkpoint.load()
    assert caught.value.step == 5


# -- rewind


def test_rewind_removes_everything_newer_and_nothing_else():
    run, store = run_of(10, 20, 30, 40)
    before = [key for key in all_keys(store) if "0000000010" in key or "0000000020" in key]
    mark_damaged(store, 30)
    assert run.rewind(20) == [40, 30]
    assert all_keys(store) == before
    run.get(20).verify()
    write_checkpoint(store, 30, state_of(31))
    run.get(30).verify()


def test_rewind_to_the_newest_removes_nothing():
    run, store = run_of(10, 20)
    before = all_keys(store)
    assert run.rewind(20) == []
    assert all_keys(store) == before


def test_rewind_to_a_step_that_does_not_exist_deletes_nothing():
    run, store = run_of(10, 30)
    before = all_keys(store)
    with pytest.raises(errors.CheckpointNotFoundError):
        run.rewind(20)
    assert all_keys(store) == before


def test_rewind_spares_folders_that_a_remaining_record_names():
    run, store = run_of(10, 20, 30)
    shared = run.get(30).record.folders[0]
    name_folder(store, 20, shared)
    run.rewind(20)
    assert {key for key in all_keys(store) if key.startswith(shared)}


def test_rewind_spares_what_an_unreadable_remaining_record_still_names():
    run, store = run_of(10, 20, 30, 40)
    shared = run.get(30).record.folders[0]
    name_folder(store, 10, shared)
    key = keys.record_key(10)
    flip(store, key, store.get(key, max_bytes=2**20).index(b'"epoch"') + 2)
    assert run.rewind(20) == [40, 30]
    assert objects_of(store, 30)
    assert not objects_of(store, 40)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [10, 20]


def test_rewind_takes_what_cannot_be_read_and_what_is_newer_along():
    run, store = run_of(10, 20, 30, 40, 50)
    store.put(keys.record_key(20), [b"{"])
    change_record(store, 30, format=7)
    change_record(store, 40, requires=["delta"])
    store.put(keys.record_key(50), [bytes(65 * 2**20)])
    before = [key for key in all_keys(store) if "0000000010" in key]
    assert run.rewind(10) == [50, 40, 30, 20]
    assert all_keys(store) == before


def test_rewind_takes_folders_without_a_record_along_or_a_late_record_would_stand_again():
    run, store = run_of(10, 20, 30)
    late = store.get(keys.record_key(30), max_bytes=2**20)
    store.delete([keys.record_key(30)])
    store.put("step-0000000030.damaged", [b"x"])
    store.put("step-0000000005/aaaaaaaa-1/index.json.zst", [b"below"])
    assert run.rewind(10) == [20]
    assert not objects_of(store, 30)
    assert "step-0000000030.damaged" not in all_keys(store)
    assert objects_of(store, 5)
    store.put(keys.record_key(30), [late])
    write_checkpoint(store, 30, state_of(31), sleep=lambda _: None)
    assert run.get(30).load()["opt"] == {"n": 31}


def test_rewind_never_deletes_a_record_by_its_name_alone():
    """Between its look and its request another writer may have saved the step anew."""
    run, store = run_of(10, 20)
    deletes = FaultyStore(store, operations={"delete", "remove"})
    Run("memory://unused", store=deletes).rewind(10)
    records = [operation for operation, key in deletes.calls if keys.parse_record_key(key) is not None]
    assert records == ["remove"]
    assert run.latest().step == 10


def test_rewind_raises_where_another_process_goes_on_writing():
    run, store = run_of(10, 20)

    class Contended(FaultyStore):
        def remove(self, key, old):
            write_again(store, 20)
            super().remove(key, old)

    with pytest.raises(errors.CheckpointConflictError, match="another process"):
        Run("memory://unused", store=Contended(store)).rewind(10)
    run.get(20).verify()


def write_again(store: Store, step: int) -> None:
    change_record(store, step, time=read_record(store, step).time + 1)


@pytest.mark.parametrize("call", range(1, 5))
def test_a_rewind_cut_short_leaves_only_whole_checkpoints(call):
    _, store = run_of(10, 20, 30)
    faulty = FaultyStore(store, {call}, error=lambda: errors.StoreAuthError("no"), operations={"delete", "remove"})
    with pytest.raises(errors.StoreAuthError):
        Run("memory://unused", store=faulty).rewind(10)
    run = Run("memory://unused", store=store)
    for checkpoint in run.checkpoints():
        checkpoint.verify()
    assert run.get(10).step == 10
    run.rewind(10)
    assert run.latest().step == 10
    assert not objects_of(store, 20)
    assert not objects_of(store, 30)


def test_a_run_closes_the_store_that_it_opened_and_not_the_users(tmp_path):
    with Run(tmp_path) as run:
        assert run.checkpoints() == []
    closed = []

    class Closing(MemoryStore):
        def close(self):
            closed.append(True)

    with Run("memory://unused", store=Closing()):
        pass
    assert closed == []


def name_folder(store: Store, step: int, folder: str) -> None:
    """Make the record of a step name another folder too, as a later format of deltas will."""
    change_record(store, step, folders=[folder, *read_record(store, step).folders])


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"w": "tensor", "gone": "tensor"}, "names no tensor 'gone'"),
        ({"w": "bytes"}, "'w' as bytes"),
        ({"w": "tensor", "n": "value"}, "lacks the value 'n'"),
    ],
)
def test_verify_finds_what_no_load_could_build(tree, reason):
    store = MemoryStore()
    write_checkpoint(store, 20, {"w": torch.ones(2)})
    record = read_record(store, 20)
    fields = json.loads(decompress(store.get(record.index.key, max_bytes=2**20), 2**20))
    stored = compress(json.dumps(fields | {"tree": {"dict": tree}}).encode())
    store.put(record.index.key, [stored])
    named = {"key": record.index.key, "bytes": len(stored), "digest": hexdigest(stored)}
    change_record(store, 20, index=named)
    with pytest.raises(errors.CorruptCheckpointError, match=reason):
        Run("memory:", store=store).get(20).verify()
