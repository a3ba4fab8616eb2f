import errno
import gc
import traceback
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import Run, Saver, errors, events
from asyncckpt.checkpoints.marks import mark_damaged
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.format import keys
from asyncckpt.options import Best
from asyncckpt.restore import load, restore, restore_from
from asyncckpt.state.dtypes import BY_NAME
from asyncckpt.store.base import Store
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.faulty import FaultyStore
from tests.records import change_record
from tests.writer import tensor_bytes, write_checkpoint

URL = "memory://unused"
CODECS = ["planes", "zstd", "none"]


class Tied(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(300, 64, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.head = nn.Linear(64, 300, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(0))


def training(seed: int, steps: int = 1) -> dict:
    """A bf16 model with fp32 moments, tied, after `steps` steps."""
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.randn(parameter.shape),
            "exp_avg_sq": torch.rand(parameter.shape),
        }
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    model.seen += seed
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": seed, "order": [seed, 2, 3]}


def contents(state: dict) -> dict[str, bytes | object]:
    """Every bit of a training state, for comparing."""
    found = {f"model/{name}": tensor_bytes(value) for name, value in state["model"].state_dict().items()}
    for number, slot in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer/{number}/{name}": (value.dtype, tensor_bytes(value)) for name, value in slot.items()}
    plain = (state["optimizer"].state_dict()["param_groups"], state["scheduler"].state_dict())
    return found | {"plain": repr(plain), "epoch": state["epoch"], "order": list(state["order"])}


def stored_run(*steps: int, codec: str = "planes") -> MemoryStore:
    """A run whose checkpoint of step n holds `training(n)`."""
    store = MemoryStore()
    for step in steps:
        write_checkpoint(store, step, training(step), codec=codec, metrics={"loss": 100.0 - step}, epoch=step // 10)
    return store


def replace(store: Store, key: str, data: bytes) -> None:
    store.delete([key])
    store.put(key, [data])


def flip(store: Store, key: str, position: int | None = None) -> None:
    data = bytearray(store.get(key, max_bytes=2**30))
    data[len(data) // 2 if position is None else position] ^= 0x20
    replace(store, key, bytes(data))


def objects_of(store: Store, step: int) -> list[str]:
    return [entry.key for entry in store.list(keys.folder(step, "x")[:-2])]


@contextmanager
def untouched(state: dict):
    before = contents(state)
    yield
    assert contents(state) == before


@pytest.mark.parametrize("codec", CODECS)
def test_a_training_state_comes_back_bit_exact_in_place(codec):
    store = stored_run(20, codec=codec)
    state = training(1)
    weight = state["model"].embed.weight
    restored = restore(URL, state, store=store)
    assert (restored.step, restored.epoch, restored.metrics) == (20, 2, {"loss": 80.0})
    assert contents(state) == contents(training(20))
    assert state["model"].embed.weight is weight
    assert state["model"].head.weight is weight, "tied as before"
    moment = state["optimizer"].state[weight]["exp_avg"]
    assert moment.dtype is torch.float32, "moments keep the precision they were stored with"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("codec", CODECS)
def test_every_dtype_comes_back_bit_exact(codec):
    raw = torch.randint(0, 256, (3, 16 * 9000), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    state = {}
    for name, dtype in BY_NAME.items():
        bits = raw % 2 if dtype is torch.bool else raw
        state |= {f"{name}-large": bits.view(dtype), f"{name}-small": bits[:, :16].contiguous().view(dtype)[1:]}
        state |= {f"{name}-empty": torch.empty(0, 3, dtype=dtype), f"{name}-0d": bits[0, :16].view(dtype)[0].clone()}
    store = MemoryStore()
    write_checkpoint(store, 1, {"t": state}, codec=codec)
    loaded = load(URL, store=store, prefix="t")
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert tensor_bytes(loaded[name]) == tensor_bytes(tensor), name


def test_load_gives_the_whole_state_without_objects():
    store = stored_run(5)
    loaded = load(URL, store=store)
    assert set(loaded) == {"model", "optimizer", "scheduler", "epoch", "order"}
    assert loaded["order"] == [5, 2, 3]
    assert loaded["model"]["head.weight"] is loaded["model"]["embed.weight"], "tied tensors are one"
    model = Tied()
    model.load_state_dict(loaded["model"])
    assert tensor_bytes(model.head.weight) == tensor_bytes(training(5)["model"].head.weight)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("model", dict), ("optimizer/param_groups", list), ("optimizer/param_groups/#0/lr", float), ("order", list)],
)
def test_load_of_a_prefix_gives_that_part(prefix, kind):
    store = stored_run(5)
    part = load(URL, store=store, prefix=prefix)
    whole = load(URL, store=store)
    for key in keys.split(prefix):
        whole = whole[key]
    assert isinstance(part, kind)
    if kind is dict:
        assert {name: tensor_bytes(one) for name, one in part.items()} == {
            name: tensor_bytes(one) for name, one in whole.items()
        }
    else:
        assert part == whole


def test_a_prefix_that_is_not_there_says_what_is():
    with pytest.raises(errors.StateMismatchError, match="optimizer"):
        load(URL, store=stored_run(5), prefix="modle")


def test_the_model_alone_does_not_download_the_optimizer():
    counting = CountingStore(stored_run(5))
    load(URL, store=counting, prefix="model")
    state = training(1)
    restore(URL, {"model": state["model"]}, store=counting)
    assert not [key for key in counting.keys if "optimizer" in key]
    assert tensor_bytes(state["model"].norm.weight) == tensor_bytes(training(5)["model"].norm.weight)


def test_loaded_tensors_outlive_the_call_and_do_not_share_elements():
    store = MemoryStore()
    write_checkpoint(store, 1, {"a": torch.arange(3), "b": torch.arange(3)})
    loaded = load(URL, store=store)
    loaded["a"] += 1
    assert loaded["a"].tolist() == [1, 2, 3]
    assert loaded["b"].tolist() == [0, 1, 2]


def test_map_location_moves_the_tensors():
    loaded = load(URL, store=stored_run(5), prefix="model", map_location="meta")
    assert {tensor.device.type for tensor in loaded.values()} == {"meta"}


@pytest.mark.parametrize(("choice", "step"), [("latest", 30), (20, 20), (Best("loss"), 30), (Best("loss", "max"), 10)])
def test_the_chosen_step_is_restored(choice, step):
    state = training(1)
    assert restore(URL, state, step=choice, store=stored_run(10, 20, 30)).step == step
    assert contents(state) == contents(training(step))


def test_without_a_checkpoint_restore_raises_and_the_savers_way_returns_nothing(caplog):
    with pytest.raises(errors.CheckpointNotFoundError):
        restore(URL, {}, store=MemoryStore())
    with pytest.raises(errors.CheckpointNotFoundError):
        load(URL, store=MemoryStore(), step=Best("loss"))
    with caplog.at_level("INFO", logger="asyncckpt"):
        assert restore_from(MemoryStore(), {}, url=URL).restored is None
    assert f"nothing to restore at {URL}" in caplog.text
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        restore_from(stored_run(5), {}, url=URL, step=6)
    assert caught.value.step == 6


def test_a_local_folder_is_opened_by_its_path(tmp_path):
    write_checkpoint(LocalStore(str(tmp_path)), 3, training(3))
    state = training(1)
    assert asyncckpt.restore(tmp_path, state).step == 3
    assert contents(state) == contents(training(3))


def test_an_object_that_refuses_its_state_is_named_and_the_rest_restored_without_it():
    class Loader:
        def __init__(self, workers):
            self.workers = workers

        def state_dict(self):
            return {"workers": self.workers}

        def load_state_dict(self, state):
            assert state["workers"] == self.workers, "another number of workers"

    store = MemoryStore()
    write_checkpoint(store, 20, training(20) | {"loader": Loader(2)})
    state = training(1) | {"loader": Loader(4)}
    with pytest.raises(
        errors.CheckpointError, match=r"'loader' \(a Loader\) raised AssertionError: another number"
    ) as caught:
        restore(URL, state, store=store)
    assert (caught.value.step, caught.value.key, caught.value.overwritten) == (20, "loader", True)
    assert (
        "overwritten by now: 'model', 'optimizer', 'scheduler', 'epoch', 'order'; perhaps in part: 'loader'.\n"
        in str(caught.value)
    )
    rest = training(2)
    assert restore(URL, rest, store=store).step == 20
    assert contents(rest) == contents(training(20))


def test_an_address_that_can_be_no_folder_is_no_empty_run(tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "not mounted")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    state = training(1)
    for name, why in {
        "file": "file is a file",
        "file/run": "file is a file",
        "to-file": "to-file is a file",
        "dangling": "dangling is a link that leads nowhere",
        "dangling/run": "dangling is a link that leads nowhere",
        "loop": "loop is a link that leads nowhere",
    }.items():
        place = tmp_path / name
        with Saver(place, engine="inline") as saver, Run(place) as run:
            for ask in (
                lambda place=place: restore(place, state),
                lambda place=place: restore(place, state, step=3),
                lambda place=place: load(place),
                lambda saver=saver: saver.restore(state),
                run.latest,
                lambda run=run: run.get(3),
                lambda run=run: run.best("loss"),
            ):
                with untouched(state), pytest.raises(errors.StoreNotFoundError, match=why):
                    ask()
            with pytest.raises(errors.StoreNotFoundError, match=why):
                saver.save(1, {"t": torch.zeros(1)}).result()
    with Saver(tmp_path / "new" / "run", engine="inline") as saver:
        assert saver.restore(state) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop", "to-file"]


# -- damage


def damage_flip_shard(store, step):
    key = next(key for key in objects_of(store, step) if "optimizer" in key)
    flip(store, key)
    return key, errors.CorruptCheckpointError


def damage_flip_index(store, step):
    key = next(key for key in objects_of(store, step) if "index" in key)
    flip(store, key)
    return key, errors.DigestMismatchError


def damage_flip_state(store, step):
    key = next(key for key in objects_of(store, step) if key.endswith("state.pt"))
    flip(store, key)
    return key, errors.DigestMismatchError


def damage_record(store, step):
    key = keys.record_key(step)
    replace(store, key, store.get(key, max_bytes=2**20)[:-30])
    return key, errors.RecordError


def damage_record_of_another_step(store, step):
    key = keys.record_key(step)
    replace(store, key, store.get(keys.record_key(10), max_bytes=2**20))
    return key, errors.RecordError


def damage_delete_shard(store, step):
    key = next(key for key in objects_of(store, step) if "model" in key)
    store.delete([key])
    return key, errors.MissingShardError


def damage_delete_index(store, step):
    key = next(key for key in objects_of(store, step) if "index" in key)
    store.delete([key])
    return key, errors.MissingShardError


def damage_truncate_shard(store, step):
    key = next(key for key in objects_of(store, step) if "model" in key)
    replace(store, key, store.get(key, max_bytes=2**30)[:-1])
    return key, errors.CorruptCheckpointError


def damage_empty_state(store, step):
    key = next(key for key in objects_of(store, step) if key.endswith("state.pt"))
    replace(store, key, b"")
    return key, errors.CorruptCheckpointError


def damage_swap_shards(store, step):
    model = next(key for key in objects_of(store, step) if "model" in key)
    optimizer = next(key for key in objects_of(store, step) if "optimizer" in key)
    one, other = (store.get(key, max_bytes=2**30) for key in (model, optimizer))
    replace(store, model, other)
    replace(store, optimizer, one)
    return None, errors.CorruptCheckpointError


def damage_unsafe_key(store, step):
    change_record(store, step, index={"key": "../" * 5 + "passwd", "bytes": 5, "digest": "0" * 64})
    return keys.record_key(step), errors.UnsafeCheckpointError


DAMAGES = {name.removeprefix("damage_"): found for name, found in dict(globals()).items() if name.startswith("damage_")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_asked_for_raises_naming_step_and_key_and_touches_nothing(damage):
    store = stored_run(10, 20)
    key, kind = damage(store, 20)
    state = training(1)
    with untouched(state), pytest.raises(kind) as caught:
        restore(URL, state, step=20, store=store)
    assert caught.value.step == 20
    assert key is None or caught.value.key == key


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_latest_falls_back_to_the_one_before_with_a_warning(damage):
    store = stored_run(10, 20)
    _, kind = damage(store, 20)
    state = training(1)
    seen = []
    with pytest.warns(UserWarning, match="checkpoint 20") as warned:
        outcome = restore_from(store, state, url=URL, hooks=events.Hooks((seen.append,)))
    assert outcome.restored.step == 10
    assert list(outcome.damaged) == [20]
    assert contents(state) == contents(training(10))
    found = [event for event in seen if isinstance(event, events.DamageFound)]
    assert [event.step for event in found] == [20]
    assert isinstance(found[0].error, kind)
    assert type(found[0].error).__name__ in str(warned[0].message)


@pytest.mark.parametrize("step", [20, "latest"])
def test_a_newer_checkpoint_raises_also_as_the_latest_and_touches_nothing(step):
    store = stored_run(10, 20)
    change_record(store, 20, format=9, index="elsewhere")
    state = training(1)
    with untouched(state), pytest.raises(errors.FormatVersionError, match="newer asyncckpt") as caught:
        restore(URL, state, step=step, store=store)
    assert caught.value.step == 20


def test_when_all_are_damaged_the_newest_error_is_raised():
    store = stored_run(10, 20)
    damage_flip_index(store, 10)
    key, _ = damage_delete_shard(store, 20)
    state = training(1)
    with (
        untouched(state),
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(errors.MissingShardError) as caught,
    ):
        restore(URL, state, store=store)
    assert (caught.value.step, caught.value.key) == (20, key)


def test_best_passes_over_damage_too():
    store = stored_run(10, 20, 30)
    damage_record(store, 30)
    damage_flip_shard(store, 20)
    state = training(1)
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert restore(URL, state, step=Best("loss"), store=store).step == 10
    assert len(warned) == 2


def test_a_checkpoint_marked_as_damaged_is_passed_over_in_silence():
    store = stored_run(10, 20)
    mark_damaged(store, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(URL, training(1), store=store).step == 10


def test_a_run_of_marked_checkpoints_does_not_look_empty():
    store = stored_run(20)
    damage_flip_state(store, 20)
    mark_damaged(store, 20)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(errors.DigestMismatchError):
        restore(URL, training(1), store=store)


def test_a_mark_of_an_earlier_attempt_does_not_count():
    store = stored_run(10, 20)
    mark_damaged(store, 20)
    store.delete([keys.record_key(20)])
    write_checkpoint(store, 20, training(20))
    assert restore(URL, training(1), store=store).step == 20


def test_a_state_that_does_not_fit_never_falls_back():
    store = stored_run(10, 20)
    state = training(1)
    state["model"].norm = nn.LayerNorm(65)
    with untouched(state), pytest.raises(errors.StateMismatchError) as caught:
        restore(URL, state, store=store)
    assert caught.value.step == 20


@pytest.mark.parametrize("kind", [errors.StoreAuthError, errors.DeadlineExceededError, errors.TransientStoreError])
def test_a_failing_store_never_falls_back(kind):
    store = FaultyStore(stored_run(10, 20), range(1, 100), error=lambda: kind("no"), operations={"get_into"})
    state = training(1)
    with untouched(state), pytest.raises(kind):
        restore(URL, state, store=store)


def test_every_flipped_byte_is_an_error_or_changes_nothing():
    store = MemoryStore()
    original = {"t": {"a": torch.randn(50), "b": torch.arange(9)}, "n": 5}
    write_checkpoint(store, 1, original)
    failed = 0
    for key in objects_of(store, 1):
        data = store.get(key, max_bytes=2**20)
        for position in range(0, len(data), 5):
            flip(store, key, position)
            state = {"t": {"a": torch.zeros(50), "b": torch.zeros(9, dtype=torch.int64)}, "n": 0}
            error = failure_of(state, store)
            if error is None:  # a byte that nothing depends on, such as the shard's header
                assert tensor_bytes(state["t"]["a"]) == tensor_bytes(original["t"]["a"]), (key, position)
                assert (state["t"]["b"].tolist(), state["n"]) == (list(range(9)), 5)
            else:
                failed += 1
                assert isinstance(error, errors.CorruptCheckpointError), (key, position)
                assert (error.step, error.key) == (1, key)
                assert (bool(state["t"]["a"].any()), state["n"]) == (False, 0)
            replace(store, key, data)
    assert failed > 300


def failure_of(state: dict, store: Store) -> errors.CheckpointError | None:
    try:
        restore(URL, state, step=1, store=store)
    except errors.CheckpointError as error:
        return error
    return None


def test_a_checkpoint_that_was_passed_over_keeps_no_memory():
    store = stored_run(10, 20)
    damage_flip_shard(store, 20)
    seen = []
    with pytest.warns(UserWarning, match="passed over"):
        restore(URL, training(1), store=store, hooks=[seen.append])
    error = next(event.error for event in seen if isinstance(event, events.DamageFound))
    frames = [
        frame for frame, _ in traceback.walk_tb(error.__traceback__) if "engine/fetch" in frame.f_code.co_filename
    ]
    assert frames
    assert not any(frame.f_locals for frame in frames)


# -- retention under the reader's hands


class RemovingStore(CountingStore):
    """Retention takes a checkpoint (record first) just before its shards are read."""

    def __init__(self, inner, step, then=lambda store: None):
        super().__init__(inner)
        self.step = step
        self.then = then

    def get_into(self, key, start, target):
        if self.step is not None and keys.parse_folder(key) == self.step:
            step, self.step = self.step, None
            self.inner.delete([keys.record_key(step)])
            self.inner.delete(objects_of(self.inner, step))
            self.then(self.inner)
        super().get_into(key, start, target)


def test_a_checkpoint_that_retention_takes_away_is_no_damage():
    store = RemovingStore(stored_run(10, 20), 20, then=lambda inner: write_checkpoint(inner, 30, training(30)))
    state = training(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = restore_from(store, state, url=URL)
    assert (outcome.restored.step, dict(outcome.damaged)) == (30, {})
    assert contents(state) == contents(training(30))


def test_a_step_asked_for_that_retention_takes_away_is_not_found():
    store = RemovingStore(stored_run(10, 20), 10)
    state = training(1)
    with untouched(state), pytest.raises(errors.CheckpointNotFoundError) as caught:
        restore(URL, state, step=10, store=store)
    assert caught.value.step == 10


def test_a_listing_that_never_agrees_with_the_records_is_no_empty_run():
    class Forgetful(CountingStore):
        def get(self, key, *, max_bytes):
            raise errors.ObjectNotFoundError("no such object", key=key)

    with pytest.raises(errors.StoreError, match="contradicts itself") as caught:
        restore_from(Forgetful(stored_run(10)), {}, url=URL)
    assert caught.value.step == 10


def test_progress_is_told_in_events():
    store = stored_run(5)
    _, index = read_checkpoint(store, 5)
    seen = []
    restore(URL, training(1), store=store, hooks=[seen.append])
    moved = [event for event in seen if isinstance(event, events.BytesRestored)]
    assert moved[-1].done_bytes == moved[-1].total_bytes == sum(one.raw_bytes for one in index.tensors.values())


@pytest.mark.parametrize("threshold", [700, 0, 10**6])
@pytest.mark.parametrize("step", [1, 7])
def test_the_garbage_collector_is_rare_during_a_restore_and_then_as_it_was(threshold, step):
    during = []

    class Watched(nn.Linear):
        def _load_from_state_dict(self, *args):
            during.append(gc.get_threshold()[0])
            super()._load_from_state_dict(*args)

    store = MemoryStore()
    write_checkpoint(store, 1, {"m": Watched(2, 2)})
    before = gc.get_threshold()
    try:
        gc.set_threshold(threshold, 11, 12)
        with nullcontext() if step == 1 else pytest.raises(errors.CheckpointNotFoundError):
            restore(URL, {"m": Watched(2, 2)}, step=step, store=store)
        assert gc.get_threshold() == (threshold, 11, 12)
    finally:
        gc.set_threshold(*before)
    assert set(during) <= {0, 200_000, 10**6}, "a collector that is off stays off, one that is rarer stays so"


def test_what_other_threads_drop_is_freed_while_a_restore_downloads():
    class Ring:
        def __init__(self):
            self.me = self

    class Slow(CountingStore):
        """While the restore waits for bytes, somebody drops many objects that refer to themselves."""

        def get_into(self, key, offset, target):
            for _ in range(300_000):
                Ring()
            left.append(sum(type(one) is Ring for one in gc.get_objects()))
            super().get_into(key, offset, target)

    left = []
    restore(URL, training(1), store=Slow(stored_run(5)))
    assert left
    assert max(left) < 250_000


def test_what_is_whole_at_the_second_reading_is_not_given_up():
    class Flipping(CountingStore):
        """A bit flips on its way, once."""

        flipped = False

        def get_into(self, key, offset, target):
            super().get_into(key, offset, target)
            if not self.flipped and "step-0000000020" in key:
                target[0] ^= 1
                self.flipped = True

    state = training(1)
    restored = restore_from(Flipping(stored_run(10, 20)), state, url=URL)
    assert restored.restored.step == 20
    assert not restored.damaged
    assert contents(state) == contents(training(20))


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(errors.CheckpointNotFoundError, match="there is none at all"):
        restore(URL, {}, store=MemoryStore())
    store = stored_run(5, 10)
    with pytest.raises(errors.CheckpointNotFoundError, match="the last that are there: 5, 10"):
        restore(URL, {}, step=7, store=store)
    with pytest.raises(errors.CheckpointNotFoundError, match=r"2 are there \(the last: 5, 10\).*metrics=\{'val_loss'"):
        restore(URL, {}, step=Best("val_loss"), store=store)


def test_strict_false_tells_of_an_object_that_gets_nothing(caplog):
    store = stored_run(10)
    state = training(1)
    with caplog.at_level("WARNING", "asyncckpt"):
        restored = restore(URL, {"net": state["model"], "optimizer": state["optimizer"]}, strict=False, store=store)
    assert "net" in restored.missing
    assert [record.getMessage() for record in caplog.records if "nothing is loaded into 'net'" in record.getMessage()]
    caplog.clear()
    with caplog.at_level("WARNING", "asyncckpt"):
        restore(URL, training(2), strict=False, store=store)
    assert not [record for record in caplog.records if "nothing is loaded" in record.getMessage()]


@pytest.mark.parametrize("failure", [MemoryError, lambda: OSError(errno.ENOMEM, "Cannot allocate memory")])
@pytest.mark.parametrize(("operation", "call"), [("get", 2), ("get_into", 1)])  # the index, and a tensor
def test_no_memory_for_what_is_read_is_an_error_of_ours_and_no_damage(failure, operation, call):
    inner = MemoryStore()
    with asyncckpt.Saver("memory://", store=inner) as saver:
        saver.save(1, {"model": {"w": torch.ones(1000)}})
    for use in (
        lambda store: load("memory://", store=store),
        lambda store: restore("memory://", {"model": {"w": torch.zeros(1000)}}, store=store),
        lambda store: asyncckpt.Run("memory://", store=store).latest().tensor("model/w"),
    ):
        store = FaultyStore(inner, {call}, operations={operation}, error=failure)
        with pytest.raises(errors.CheckpointError, match="no memory for what is read") as caught:
            use(store)
        assert type(caught.value) is errors.CheckpointError
        assert caught.value.step == 1
