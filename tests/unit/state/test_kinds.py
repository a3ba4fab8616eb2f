"""An object of another kind is refused before the first value changes, strict or not: loaded, it would raise or break later."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import asyncckpt
from asyncckpt.errors import StateMismatchError
from asyncckpt.state.optimizers import NEEDS
from tests.unit.state.pocket import Pocket, snapshot

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
DENSE = [name for name in OPTIMIZERS if name not in ("SparseAdam", "LBFGS")]


def stepped(name, steps=1, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), **{"lr": 0.1, **options})
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def seen(state):
    return snapshot([thing.state_dict() for thing in state.values()])


def unchanged(source, target, match, *, strict):
    before = seen(target)
    with pytest.raises(StateMismatchError, match=match):
        Pocket.of(source).restore(target, strict=strict)
    assert seen(target) == before


@pytest.mark.parametrize("name", DENSE)
def test_the_table_says_what_a_step_makes(name):
    made = stepped(name)["optimizer"].state.values()
    assert all(NEEDS.get(name, frozenset()) <= set(inner) for inner in made)
    assert set(NEEDS) <= set(OPTIMIZERS)


@pytest.mark.parametrize("source", DENSE)
def test_a_restore_into_another_kind_of_optimizer_is_refused_or_can_be_stepped(source):
    for number, target in enumerate(DENSE):
        ours, other, strict = stepped(source), stepped(target, number % 2), number % 3 == 0
        before = seen(other)
        try:
            Pocket.of(ours).restore(other, strict=strict)
        except StateMismatchError:
            assert source != target
            assert seen(other) == before
        other["model"](torch.ones(1, 3)).square().sum().backward()
        other["optimizer"].step()


@pytest.mark.parametrize("strict", [True, False])
def test_sgd_is_not_restored_into_adamw(strict):
    unchanged(stepped("SGD", momentum=0.9), stepped("AdamW", 0), "another kind of optimizer", strict=strict)
    unchanged({"optimizer": nn.Linear(1, 1)}, {"optimizer": stepped("SGD")["optimizer"]}, "else", strict=strict)


class Foreign(torch.optim.Optimizer):
    """Not torch's: only its options and its state tell what it is."""

    def __init__(self, parameters, key):
        super().__init__(parameters, {"lr": 0.1})
        self.key = key

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault(self.key, torch.zeros_like(parameter))


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_a_foreign_optimizer_that_shares_nothing_with_the_live_one_is_refused(strict):
    def made(key):
        model = nn.Linear(2, 2)
        optimizer = Foreign(model.parameters(), key)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    unchanged(made("a"), made("b"), "without b, which Foreign needs", strict=strict)
    Pocket.of(made("a")).restore(made("a"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_scheduler_of_another_kind_is_refused(strict):
    optimizer = stepped("SGD")["optimizer"]
    step, cosine = lr_scheduler.StepLR(optimizer, 3), lr_scheduler.CosineAnnealingLR(optimizer, 9)
    unchanged(
        {"s": step}, {"s": cosine}, r"s: another kind of scheduler was saved, with gamma, step_size", strict=strict
    )
    unchanged({"s": {"x": 1}}, {"s": cosine}, "another kind of scheduler", strict=strict)
    unchanged({"s": [1]}, {"s": cosine}, "something else", strict=strict)


def warmed(optimizer, *more):
    inner = [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 3), *more]
    return lr_scheduler.SequentialLR(optimizer, inner, milestones=[*range(2, 1 + len(inner))])


@pytest.mark.parametrize("strict", [True, False])
def test_a_scheduler_of_others_is_refused_beside_one_without_and_beside_another_number(strict):
    optimizer = stepped("SGD")["optimizer"]
    plain, warm = lr_scheduler.StepLR(optimizer, 3), warmed(optimizer)
    more = warmed(optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5))
    unchanged({"s": plain}, {"s": warm}, "without others inside was saved", strict=strict)
    unchanged({"s": warm}, {"s": plain}, "with others inside was saved", strict=strict)
    unchanged({"s": more}, {"s": warm}, "3 schedulers inside another were saved; the state's has 2", strict=strict)
    other = lr_scheduler.SequentialLR(optimizer, [plain, lr_scheduler.StepLR(optimizer, 3)], milestones=[2])
    unchanged({"s": other}, {"s": warm}, "another kind of scheduler", strict=strict)
    warm._schedulers[0].last_epoch = 5
    target = warmed(stepped("SGD")["optimizer"])
    Pocket.of({"s": warm}).restore({"s": target}, strict=strict)
    assert seen({"s": target}) == seen({"s": warm})


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_a_disabled_scaler_is_refused_by_one_that_is_enabled(strict):
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    unchanged({"s": off}, {"s": on}, "disabled", strict=strict)
    unchanged({"s": {"scale": 1.0}}, {"s": on}, "s: without .*growth_factor", strict=strict)
    on.scale(torch.ones(1))
    on.update(2.0)
    Pocket.of({"s": on}).restore({"s": (other := torch.amp.GradScaler("cpu"))})
    assert other.get_scale() == 2.0


class StatefulDataLoader:
    """torchdata's: the state of one with workers names their number."""

    def __init__(self, num_workers, yielded=0):
        self.num_workers, self.yielded = num_workers, yielded

    def state_dict(self):
        if not self.num_workers:
            return {"_num_yielded": self.yielded, "_iterator_finished": False}
        return {"_snapshot": {"_main_snapshot": {"_num_workers": self.num_workers}, "_snapshot_step": self.yielded}}

    def load_state_dict(self, state):
        inner = state.get("_snapshot")
        self.yielded = inner["_snapshot_step"] if inner else state["_num_yielded"]


StatefulDataLoader.__module__ = "torchdata.stateful_dataloader.stateful_dataloader"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("saved", "own"), [(2, 4), (0, 2), (2, 0)])
def test_a_loader_with_another_number_of_workers_is_refused_before_anything_changes(saved, own, strict):
    source = {"model": nn.Linear(2, 2), "loader": StatefulDataLoader(saved, 3)}
    target = {"model": nn.Linear(2, 2), "loader": StatefulDataLoader(own)}
    unchanged(source, target, f"loader: .*num_workers={saved} and has {own}.*leave it out", strict=strict)
    target["loader"] = StatefulDataLoader(saved)
    Pocket.of(source).restore(target, strict=strict)
    assert target["loader"].yielded == 3


def test_the_number_of_workers_is_torchdatas_own():
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 2):
        loader = loaders.StatefulDataLoader([1, 2, 3, 4], num_workers=workers)
        next(iter(loader))
        with pytest.raises(StateMismatchError, match=f"num_workers={workers} and has 1"):
            Pocket.of({"l": loader}).restore({"l": loaders.StatefulDataLoader([1], num_workers=1)})


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_state_of_all_generators_is_refused(strict):
    before = torch.get_rng_state()
    for wrong in ({"torch": before}, [1], {}):
        with pytest.raises(StateMismatchError, match="rng"):
            Pocket.of({"rng": wrong, "t": torch.ones(1)}).restore(
                {"rng": asyncckpt.RNG(), "t": torch.zeros(1)}, strict=strict
            )
    assert torch.equal(torch.get_rng_state(), before)


def test_not_strict_with_nothing_in_common_raises_and_names_both_sides():
    source = {"model": nn.Linear(2, 2), "n": 1}
    for target in (
        {"model": nn.Sequential(nn.Linear(2, 2))},
        {"net": nn.Linear(2, 2)},
        {"net": nn.Linear(2, 2), "opt": stepped("SGD")["optimizer"]},
        {"model": nn.Linear(3, 3)},
    ):
        with pytest.raises(StateMismatchError, match="nothing in common"):
            Pocket.of(source).restore(target, strict=False)
    Pocket.of(source).restore({}, strict=False)
    Pocket.of({"model": nn.ReLU()}).restore({"model": nn.ReLU()}, strict=False)


def test_not_strict_tells_what_it_left_alone():
    source = {"m": nn.Linear(2, 2), "d": {"gone": 1, "both": 2}, "not asked for": 1}
    target = {"m": nn.Linear(2, 3, bias=False), "d": {"both": 0, "more": 5}, "new": torch.zeros(1)}
    plan = Pocket.of(source).restore(target, strict=False)
    assert plan.missing == ("d/more", "new")
    assert plan.unexpected == ("m/bias",)
    assert plan.reshaped == ("m/weight",)
    assert target["d"] == {"both": 2, "more": 5, "gone": 1}


class Own(nn.Linear):
    """Its own loading counts on every name."""

    def load_state_dict(self, state, **_):
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])


def test_a_module_with_loading_code_of_its_own_gets_every_name():
    source, target = nn.Linear(2, 2, bias=False), Own(2, 2)
    bias = target.bias.clone()
    Pocket.of({"m": source}).restore({"m": target}, strict=False)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, bias)
