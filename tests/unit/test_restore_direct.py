"""Large tensors of a folder are read into the live objects without a buffer, after all of them were verified."""

import copy
import weakref

import pytest
import torch
from torch import nn

from asyncckpt import errors, events
from asyncckpt.format import keys
from asyncckpt.restore import restore, restore_from
from asyncckpt.state.homes import Homes, memory_of
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.writer import tensor_bytes, write_checkpoint

LARGE = 600  # a matrix of so many rows and columns has 1.4 MB
URL = "memory://unused"


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, tied=False):
        super().__init__()
        self.first = nn.Linear(LARGE, LARGE, dtype=dtype)
        self.second = nn.Linear(LARGE, LARGE, dtype=dtype)
        self.register_buffer("seen", torch.zeros(LARGE, LARGE))
        if tied:
            self.second.weight = self.first.weight


def training(seed, *, dtype=torch.float32, steps=1, optimizer=torch.optim.AdamW, **model):
    torch.manual_seed(seed)
    module = Model(dtype, **model)
    nn.init.normal_(module.seen)
    chosen = optimizer(module.parameters(), lr=1e-3)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        chosen.step()
        chosen.zero_grad()
    return {"model": module, "optimizer": chosen, "extra": torch.randn(LARGE, LARGE)}


def contents(state):
    found = {f"model/{name}": tensor_bytes(value) for name, value in state["model"].state_dict().items()}
    for number, slot in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer/{number}/{name}": (value.dtype, tensor_bytes(value)) for name, value in slot.items()}
    return found | {"extra": tensor_bytes(state["extra"])}


def stored(state, *steps, codec="none"):
    store = MemoryStore()
    for step in steps or (1,):
        write_checkpoint(store, step, state, codec=codec)
    return store


def homes_taken(monkeypatch):
    """What `Homes.choose` gave, in all restores from now on."""
    taken = {}
    choose = Homes.choose

    def spy(self, *args):
        found = choose(self, *args)
        taken.update(found)
        return found

    monkeypatch.setattr(Homes, "choose", spy)
    return taken


def flip(store, key, position):
    data = bytearray(store.get(key, max_bytes=2**30))
    data[position] ^= 1
    store.delete([key])
    store.put(key, [bytes(data)])


def shards(store, step=1):
    return [entry.key for entry in store.list(keys.folder(step, "")[:-1]) if entry.key.endswith(".safetensors")]


def test_a_training_state_is_read_into_its_own_tensors(monkeypatch):
    source, target = training(1), training(2)
    taken = homes_taken(monkeypatch)
    moments = {id(value) for slot in target["optimizer"].state.values() for value in slot.values()}
    restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)
    assert taken["model/first.weight"] is target["model"].first.weight
    assert taken["model/seen"] is target["model"].seen
    assert taken["extra"] is target["extra"]
    assert id(taken["optimizer/state/#0/exp_avg"]) in moments
    assert {id(value) for slot in target["optimizer"].state.values() for value in slot.values()} == moments


def test_state_that_an_optimizer_does_not_have_yet_is_read_into_new_tensors_that_it_keeps(monkeypatch):
    source, target = training(1), training(2, steps=0)
    taken = homes_taken(monkeypatch)
    restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)
    first = target["model"].first.weight
    assert target["optimizer"].state[first]["exp_avg"] is taken["optimizer/state/#0/exp_avg"]
    target["optimizer"].step()  # it is whole: a step with it works


def test_moments_of_another_type_than_their_parameter_keep_it():
    source, target = training(1, dtype=torch.bfloat16), training(2, dtype=torch.bfloat16, steps=0)
    for slot in source["optimizer"].state.values():
        slot["exp_avg"] = torch.randn(slot["exp_avg"].shape)
    for state in (target, training(3, dtype=torch.bfloat16)):
        restore(URL, state, store=stored(source))
        assert contents(state) == contents(source)


def test_training_goes_on_as_it_would_have():
    source, target = training(1), training(2)
    restore(URL, target, store=stored(source))
    for state in (source, target):
        torch.manual_seed(9)
        for parameter in state["model"].parameters():
            parameter.grad = torch.randn_like(parameter)
        state["optimizer"].step()
    assert contents(target) == contents(source)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_before_any_value_changes(where):
    source, target = training(1), training(2)
    store = stored(source)
    key = shards(store)[0 if where == "first" else -1]
    flip(store, key, -1)
    before = contents(target)
    with pytest.raises(errors.DigestMismatchError) as caught:
        restore(URL, target, store=store, step=1)
    assert (caught.value.key, caught.value.step) == (key, 1)
    assert contents(target) == before


def test_damage_falls_back_to_the_step_before():
    source, target = training(1), training(2)
    store = stored(source, 1, 2)
    flip(store, shards(store, 2)[0], -1)
    with pytest.warns(UserWarning, match="checkpoint 2 cannot be restored"):
        assert restore(URL, target, store=store).step == 1
    assert contents(target) == contents(source)


def test_bytes_that_change_after_they_were_verified_are_noticed_and_said():
    seen = set()

    class Turning(CountingStore):
        """Flips a bit in what is read once all has been read once."""

        rereads = True

        def get_into(self, key, start, target):
            super().get_into(key, start, target)
            if (key, start) in seen and len(target) > 10**6:
                target[5] ^= 1
            seen.add((key, start))

    target = training(2)
    with pytest.raises(errors.DigestMismatchError, match="partly overwritten"):
        restore(URL, target, store=Turning(stored(training(1))), step=1)


def test_every_byte_is_read_twice_and_no_buffer_is_needed():
    source = training(1)
    near = CountingStore(stored(source))
    near.rereads = True
    far = CountingStore(stored(source))
    for store in (near, far):
        restore(URL, training(2), store=store)
    assert 1.9 * far.read_bytes < near.read_bytes < 2.1 * far.read_bytes


def test_a_far_store_is_read_once(monkeypatch):
    taken = homes_taken(monkeypatch)
    restore(URL, training(2), store=CountingStore(stored(training(1))))
    assert not taken


@pytest.mark.parametrize("codec", ["planes", "zstd"])
def test_what_is_compressed_is_restored_through_a_buffer(codec, monkeypatch):
    source, target = training(1), training(2)
    taken = homes_taken(monkeypatch)
    restore(URL, target, store=stored(source, codec=codec))
    assert contents(target) == contents(source)
    assert not taken


def test_tied_parameters_are_read_once_and_stay_tied(monkeypatch):
    source, target = training(1, tied=True), training(2, tied=True)
    taken = homes_taken(monkeypatch)
    restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)
    assert target["model"].first.weight is target["model"].second.weight
    assert sum(path.endswith("weight") for path in taken) == 1


def test_tied_targets_with_different_values_are_refused_and_nothing_changes():
    target = training(2, tied=True)
    before = contents(target)
    del target["optimizer"]
    store = stored({"model": training(1)["model"], "extra": torch.randn(LARGE, LARGE)})
    with pytest.raises(errors.StateMismatchError, match="tied in the state"):
        restore(URL, target, store=store)
    assert tensor_bytes(target["extra"]) == before["extra"]
    assert tensor_bytes(target["model"].first.weight) == before["model/first.weight"]


def test_views_of_one_memory_go_through_a_buffer(monkeypatch):
    memory = torch.randn(2 * LARGE, LARGE)
    source = {"all": memory, "half": memory[:LARGE].clone()}
    whole = torch.zeros(2 * LARGE, LARGE)
    taken = homes_taken(monkeypatch)
    restore(URL, {"all": whole, "half": whole[:LARGE]}, store=stored(source))
    assert not taken
    assert torch.equal(whole, memory)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(LARGE, LARGE).t(),
        torch.zeros(LARGE, 2 * LARGE)[:, ::2],
        nn.Parameter(torch.zeros(LARGE, LARGE)).detach().t(),
    ],
)
def test_memory_that_is_not_one_run_goes_through_a_buffer(target, monkeypatch):
    taken = homes_taken(monkeypatch)
    source = torch.randn(LARGE, LARGE)
    restore(URL, {"x": target}, store=stored({"x": source}))
    assert torch.equal(target, source)
    assert not taken


def test_inference_tensors_go_through_a_buffer():
    with torch.inference_mode():
        target = torch.zeros(LARGE, LARGE)
    source = torch.randn(LARGE, LARGE)
    restore(URL, {"x": target}, store=stored({"x": source}))
    assert torch.equal(target, source)


def test_a_module_whose_hooks_look_at_the_values_gets_them_as_before(monkeypatch):
    source, target = training(1), training(2)
    seen = []
    target["model"].register_load_state_dict_pre_hook(
        lambda module, state, *_: seen.append(torch.equal(state["first.weight"], module.first.weight))
    )
    taken = homes_taken(monkeypatch)
    restore(URL, target, store=stored(source))
    assert seen == [False]
    assert "model/first.weight" not in taken
    assert contents(target) == contents(source)


def test_an_optimizer_whose_hooks_change_what_is_loaded_is_obeyed():
    source, target = training(1), training(2)

    def forget_momentum(_, state):
        for slot in state["state"].values():
            slot["exp_avg"] = torch.zeros_like(slot["exp_avg"])
        return state

    target["optimizer"].register_load_state_dict_pre_hook(forget_momentum)
    restore(URL, target, store=stored(source))
    for slot in target["optimizer"].state.values():
        assert not slot["exp_avg"].any()
        assert slot["exp_avg_sq"].any()


def test_autograd_is_told_that_values_changed():
    source, target = training(1), training(2)
    weight = target["model"].first.weight
    version = weight._version
    loss = (weight * weight).sum()
    restore(URL, target, store=stored(source))
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_progress_goes_from_nothing_to_all_bytes_over_both_passes():
    told = []
    source = training(1)
    restore_from(stored(source), training(2), url=URL, hooks=events.Hooks((told.append,)))
    done = [event.done_bytes for event in told]
    assert done == sorted(done)
    assert len(set(done)) >= 3
    assert {event.total_bytes for event in told} == {done[-1]}
    assert done[-1] == sum(len(value[1] if isinstance(value, tuple) else value) for value in contents(source).values())


def test_a_copy_of_a_state_is_not_touched():
    source, target = training(1), training(2)
    other = copy.deepcopy(target["model"])
    before = tensor_bytes(other.first.weight)
    restore(URL, target, store=stored(source))
    assert tensor_bytes(other.first.weight) == before


class Average:
    """An object of the user's whose loading also writes to the model."""

    def __init__(self, model):
        self.model = model
        self.shadow = torch.zeros(LARGE, LARGE)

    def state_dict(self):
        return {"shadow": self.shadow}

    def load_state_dict(self, state):
        self.shadow = state["shadow"].clone()
        with torch.no_grad():
            self.model.first.weight.copy_(self.shadow)


@pytest.mark.parametrize("order", [("average", "model"), ("model", "average")])
def test_groups_are_restored_in_their_order_whatever_their_own_code_writes(order):
    source, target = training(1), training(2)
    averages = [Average(state["model"]) for state in (source, target)]
    averages[0].shadow = torch.randn(LARGE, LARGE)
    stored_one = stored({name: {"average": averages[0], "model": source["model"]}[name] for name in order})
    restore(URL, {name: {"average": averages[1], "model": target["model"]}[name] for name in order}, store=stored_one)
    expected = source["model"].first.weight if order[-1] == "model" else averages[0].shadow
    assert torch.equal(target["model"].first.weight, expected)


def test_a_module_with_extra_state_of_its_own_is_restored_through_a_buffer(monkeypatch):
    class Scaled(Model):
        def get_extra_state(self):
            return {"scale": 2}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    taken = homes_taken(monkeypatch)
    source, target = Scaled(), Scaled()
    nn.init.normal_(source.first.weight)
    restore(URL, {"model": target}, store=stored({"model": source}))
    assert not taken
    assert torch.equal(target.first.weight, source.first.weight)


def test_what_is_tied_to_a_parameter_is_restored_as_a_plain_tensor():
    source, target = training(1), training(2)
    best = {"model": target["model"], "best": None}
    restore(URL, best, store=stored({"model": source["model"], "best": source["model"].first.weight}))
    assert torch.equal(best["best"], source["model"].first.weight)
    assert not best["best"].requires_grad
    assert best["best"].data_ptr() != target["model"].first.weight.data_ptr()


def test_new_state_stands_in_host_memory_whatever_the_default_device():
    source, target = training(1), training(2, steps=0)
    torch.set_default_device("meta")
    try:
        restore(URL, target, store=stored(source))
    finally:
        torch.set_default_device("cpu")
    assert contents(target) == contents(source)


def test_two_optimizers_that_were_one_have_state_of_their_own():
    source = training(1)
    twice = {"model": source["model"], "a": source["optimizer"], "b": source["optimizer"]}
    models = [training(seed, steps=0) for seed in (2, 3)]
    target = {"model": models[0]["model"], "a": models[0]["optimizer"], "b": models[1]["optimizer"]}
    restore(URL, target, store=stored(twice))
    (first, *_), (second, *_) = (list(target[name].state.values()) for name in "ab")
    assert torch.equal(first["exp_avg"], second["exp_avg"])
    assert first["exp_avg"].data_ptr() != second["exp_avg"].data_ptr()


def test_a_view_of_a_tensors_memory_keeps_the_tensor():
    tensor = torch.full((LARGE, LARGE), 3.0)
    view = memory_of(tensor)
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is not None
    assert bytes(view[:4]) == torch.tensor(3.0).numpy().tobytes()
    del view
    assert gone() is None


@pytest.mark.parametrize("strict", [True, False])
def test_a_failure_between_the_two_readings_says_that_the_state_is_partly_overwritten(strict):
    class Vanishing(CountingStore):
        rereads = True

        def get_into(self, key, start, target):
            if (key, start) in seen and len(target) > 10**6:
                raise errors.ObjectNotFoundError("no such object", key=key)
            seen.add((key, start))
            super().get_into(key, start, target)

    seen = set()
    store = Vanishing(stored(training(1), 1, 2))
    if strict:  # the step before is whole, and overwrites everything
        store.inner.delete([keys.record_key(2)])
        seen.clear()
        with pytest.raises(errors.CheckpointError, match="partly overwritten"):
            restore(URL, training(2), store=store, step=1)
    else:
        with pytest.raises(errors.CheckpointError, match="partly overwritten"):
            restore(URL, training(2), store=store, strict=False)


@pytest.mark.parametrize("codec", ["planes", "none"])
def test_large_state_that_an_optimizer_does_not_have_yet_is_fetched_into_memory_of_its_own(codec, monkeypatch):
    made = {}
    make = Homes.make

    def spy(self, path):
        made[path] = make(self, path)
        return made[path]

    monkeypatch.setattr(Homes, "make", spy)
    monkeypatch.setattr(MemoryStore, "rereads", False)  # as a far store
    source, target = training(1), training(2, steps=0)
    restore(URL, target, store=stored(source, codec=codec))
    assert set(made) == {f"optimizer/state/{n}/{name}" for n in ("#0", "#2") for name in ("exp_avg", "exp_avg_sq")}
    slot = target["optimizer"].state[target["model"].first.weight]
    assert slot["exp_avg"] is made["optimizer/state/#0/exp_avg"]
    for value in slot.values():
        assert value.untyped_storage().nbytes() == value.nbytes  # it holds nothing else
        assert value.untyped_storage().resizable()
    assert contents(target) == contents(source)
    target["optimizer"].step()  # it is whole: a step with it works


@pytest.mark.parametrize("rereads", [True, False])
@pytest.mark.parametrize("codec", ["planes", "none"])
def test_new_state_has_the_strides_of_its_parameter(codec, rereads, monkeypatch):
    def training():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 128, 8, 8).to(memory_format=torch.channels_last))
        return {"w": weight, "o": torch.optim.AdamW([weight], lr=0.1, fused=True)}

    def step(state, seed):
        state["w"].grad = torch.randn(64, 128, 8, 8, generator=torch.Generator().manual_seed(seed))
        state["w"].grad = state["w"].grad.to(memory_format=torch.channels_last)
        state["o"].step()

    monkeypatch.setattr(MemoryStore, "rereads", rereads)
    source, target = training(), training()
    step(source, 1)
    restore(URL, target, store=stored(source, codec=codec))
    assert target["o"].state[target["w"]]["exp_avg"].stride() == target["w"].stride()
    step(source, 2)
    step(target, 2)
    assert torch.equal(source["w"], target["w"])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_restore_in_inference_mode_leaves_an_optimizer_that_can_step(steps):
    source, target = training(1), training(2, steps=steps)
    with torch.inference_mode():
        restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)
    for parameter in target["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    target["optimizer"].step()


@pytest.mark.parametrize("codec", ["planes", "none"])
def test_two_optimizers_that_were_one_share_no_state_that_was_fetched(codec, monkeypatch):
    monkeypatch.setattr(MemoryStore, "rereads", False)
    source = training(1)
    source["other"] = source["optimizer"]
    model = Model()
    target = {"model": model, "extra": torch.zeros(LARGE, LARGE)}
    target |= {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name in ("optimizer", "other")}
    restore(URL, target, store=stored(source, codec=codec))
    for one, other in zip(target["optimizer"].state.values(), target["other"].state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert one["exp_avg"].data_ptr() != other["exp_avg"].data_ptr()


def test_progress_is_told_of_handed_tensors_too(monkeypatch):
    monkeypatch.setattr(MemoryStore, "rereads", False)
    told = []
    restore(URL, training(2, steps=0), store=stored(training(1)), hooks=[told.append])
    done = [event.done_bytes for event in told if isinstance(event, events.BytesRestored)]
    assert done == sorted(done)
    assert done[-1] == told[-1].total_bytes


@pytest.mark.parametrize("rereads", [True, False])
@pytest.mark.parametrize("other", ["state", "parameter", "view"])
def test_state_that_shares_memory_gets_memory_of_its_own_where_the_checkpoint_has_another_value(
    other, rereads, monkeypatch
):
    monkeypatch.setattr(MemoryStore, "rereads", rereads)
    source, target = training(1), training(2)
    for slot in source["optimizer"].state.values():
        slot["anchor"] = torch.randn(slot["exp_avg"].shape)
    for parameter, slot in target["optimizer"].state.items():
        whole = {"state": slot["exp_avg"], "parameter": parameter.detach(), "view": slot["exp_avg"].view(-1)}[other]
        slot["anchor"] = whole.view(parameter.shape)
    restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)


@pytest.mark.parametrize("rereads", [True, False])
def test_state_that_is_tied_in_the_checkpoint_too_stays_tied_and_in_place(rereads, monkeypatch):
    monkeypatch.setattr(MemoryStore, "rereads", rereads)
    source, target = training(1), training(2)
    for state in (source, target):
        for slot in state["optimizer"].state.values():
            slot["anchor"] = slot["exp_avg"]
    first = target["model"].first.weight
    held = target["optimizer"].state[first]["exp_avg"]
    restore(URL, target, store=stored(source))
    assert contents(target) == contents(source)
    assert target["optimizer"].state[first]["exp_avg"] is held
    assert target["optimizer"].state[first]["anchor"] is held


@pytest.mark.parametrize("codec", ["planes", "none"])
def test_a_module_made_in_inference_mode_is_restored_outside_of_it(codec):
    source, target = {"m": nn.Linear(LARGE, LARGE)}, {}
    with torch.inference_mode():
        target["m"] = nn.Linear(LARGE, LARGE)
    restore(URL, target, store=stored(source, codec=codec))
    assert torch.equal(target["m"].weight, source["m"].weight)
