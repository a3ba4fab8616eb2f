"""Modules whose own loading code knows old names: a restore says how to run it, and what is restored then is right."""

import warnings

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt.errors import StateMismatchError
from asyncckpt.state.tree import unflatten
from tests.unit.state.pocket import Pocket, snapshot


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


def new_weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


class Renamed(nn.Module):
    """Was once called otherwise inside, and its hook knows."""

    def __init__(self, *, old):
        super().__init__()
        self.old = old
        setattr(self, "proj" if old else "projection", nn.Linear(3, 3))
        if not old:
            self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state, prefix, *_):
        for name in [name for name in state if name.startswith(prefix + "proj.")]:
            state[name.replace("proj.", "projection.")] = state.pop(name)

    def forward(self, x):
        return (self.proj if self.old else self.projection)(x)


class Migrates(Renamed):
    """The same, in `_load_from_state_dict`."""

    def __init__(self, *, old):
        super().__init__(old=old)
        self._load_state_dict_pre_hooks.clear()

    def _load_from_state_dict(self, state, prefix, *rest):
        self._rename(state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)


class Grows(nn.Module):
    """Has a buffer of whatever size the checkpoint has."""

    def __init__(self, *, old):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.ones(5 if old else 0))

    def _load_from_state_dict(self, state, prefix, *rest):
        self.seen = torch.empty_like(state[prefix + "seen"])
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x):
        return self.layer(x)


MODULES = {
    "weight_norm": (old_weight_norm, new_weight_norm),
    "pre hook": (lambda: Renamed(old=True), lambda: Renamed(old=False)),
    "_load_from_state_dict": (lambda: Migrates(old=True), lambda: Migrates(old=False)),
    "another shape": (lambda: Grows(old=True), lambda: Grows(old=False)),
}


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(("old", "new"), MODULES.values(), ids=MODULES)
def test_the_way_out_of_an_old_name_restores_weights_and_moments(old, new):
    source, model = stepped(old()), new()
    target = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), 0.1)}
    before = snapshot(model.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        Pocket.of(source).restore(target)
    assert "module.load_state_dict(asyncckpt.load(url, prefix='model')); then leave 'model' out of the state" in str(
        caught.value
    )
    assert snapshot(model.state_dict()) == before
    pocket = Pocket.of(source)
    loaded = unflatten(pocket.tree["dict"]["model"], lambda path: pocket.data[path].clone(), pocket.values, "model")
    model.load_state_dict(loaded)
    pocket.restore({"optimizer": target["optimizer"]})
    again = [parameter.grad for parameter in source["model"].parameters()]
    for parameter, grad in zip(model.parameters(), again, strict=True):
        parameter.grad = grad.clone()
    for state in (source, target):
        state["optimizer"].step()
    assert torch.equal(model(torch.ones(2, 3)), source["model"](torch.ones(2, 3)))


def test_a_module_without_loading_code_of_its_own_is_not_sent_there():
    with pytest.raises(StateMismatchError) as caught:
        Pocket.of({"m": nn.Linear(2, 2)}).restore({"m": nn.Sequential(nn.Linear(2, 2))})
    assert "load_state_dict" not in str(caught.value)


def test_load_gives_what_the_way_out_needs(tmp_path):
    source = stepped(old_weight_norm())
    with asyncckpt.Saver(tmp_path, engine="inline") as saver:
        saver.save(2, source)
        saver.wait()
        model = new_weight_norm()
        with pytest.raises(StateMismatchError, match="Loading code of its own in 'model'"):
            saver.restore({"model": model})
        model.load_state_dict(asyncckpt.load(tmp_path, prefix="model"))
    assert torch.equal(model(torch.ones(2, 3)), source["model"](torch.ones(2, 3)))
