"""Moments go to the parameters that they were taken from, however the optimizer is put together now."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from asyncckpt.errors import CorruptCheckpointError, StateMismatchError
from tests.unit.state.pocket import Pocket, snapshot


class Net(nn.Module):
    """Layers of equal shapes, made in the order that is asked for."""

    def __init__(self, order="abc"):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        return sum(layer(x) for _, layer in sorted(self.named_children()))


def stepped(model, optimizer, steps=2):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        for number, (_, parameter) in enumerate(sorted(model.named_parameters()), 1):
            if parameter.grad is not None:
                parameter.grad.mul_(number)
        optimizer.step()


def by_name(model, optimizer):
    """What the optimizer has of each parameter, its options among it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (
            snapshot(optimizer.state.get(parameter)),
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def decayed(model, *, swap=False, named=False):
    """The usual two groups."""
    items = list(model.named_parameters())
    chosen = [
        [item if named else item[1] for item in items if item[1].ndim > 1],
        [item if named else item[1] for item in items if item[1].ndim <= 1],
    ]
    groups = [{"params": chosen[0], "weight_decay": 0.1}, {"params": chosen[1], "weight_decay": 0.0, "lr": 0.5}]
    return torch.optim.AdamW(groups[::-1] if swap else groups, 0.01)


def saved(model, optimizer, **more):
    stepped(model, optimizer)
    return Pocket.of({"model": model, "optimizer": optimizer, **more})


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("named", [False, True])
def test_parameters_in_another_order_get_their_own_moments(steps, first, named):
    def made(model):
        return torch.optim.AdamW(model.named_parameters() if named else model.parameters(), 0.01)

    model, other = Net("abc"), Net("cab")
    optimizer, target = made(model), made(other)
    pocket = saved(model, optimizer)
    stepped(other, target, steps)
    state = {"model": other, "optimizer": target}
    pocket.restore(state if first == "model" else dict(reversed(state.items())))
    assert by_name(other, target) == by_name(model, optimizer)
    if named:
        assert target.param_groups[0]["param_names"] == [name for name, _ in other.named_parameters()]
    stepped(model, optimizer)
    stepped(other, target)
    assert by_name(other, target) == by_name(model, optimizer)


@pytest.mark.parametrize("named", [False, True])
def test_groups_in_another_order_keep_the_options_of_their_parameters(named):
    model, other = Net(), Net("bca")
    optimizer, target = decayed(model, named=named), decayed(other, swap=True, named=named)
    saved(model, optimizer).restore({"model": other, "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)


def test_one_group_that_was_split_gives_its_options_to_both():
    model, other = Net(), Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.25)
    target = torch.optim.AdamW(
        [{"params": other.c.parameters()}, {"params": [*other.a.parameters(), *other.b.parameters()]}]
    )
    saved(model, optimizer).restore({"model": other, "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)


def test_groups_of_equal_options_may_be_joined_and_others_may_not():
    model, other = Net(), Net()
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in model.children()], 0.25)
    target = torch.optim.AdamW(other.parameters())
    saved(model, optimizer).restore({"model": other, "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)
    optimizer.param_groups[1]["lr"] = 0.5
    pocket, before = saved(model, optimizer), snapshot([other.state_dict(), target.state_dict()])
    with pytest.raises(StateMismatchError, match=r"saved in the groups 0, 1, 2, whose options differ \(lr\)"):
        pocket.restore({"model": other, "optimizer": target})
    assert snapshot([other.state_dict(), target.state_dict()]) == before
    plan = pocket.restore({"model": other, "optimizer": target}, strict=False)
    assert plan.missing == ("optimizer/param_groups/#0",)
    assert {name: state for name, (state, _) in by_name(other, target).items()} == {
        name: state for name, (state, _) in by_name(model, optimizer).items()
    }
    assert target.param_groups[0]["lr"] == 0.25


def test_a_name_that_one_side_lacks_is_named_and_nothing_changes():
    model, other = Net("abc"), Net("abd")
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(other, target)
    before = snapshot([other.state_dict(), target.state_dict()])
    with pytest.raises(StateMismatchError) as raised:
        saved(model, optimizer).restore({"model": other, "optimizer": target})
    assert "optimizer/state/#4: the checkpoint's optimizer has no parameter 'model/d.weight'" in str(raised.value)
    assert "optimizer/state/#4: unexpected, the state's optimizer has no parameter 'model/c.weight'" in str(
        raised.value
    )
    assert snapshot([other.state_dict(), target.state_dict()]) == before


def test_not_strict_leaves_the_moments_of_new_parameters_alone():
    model, other = Net("abc"), Net("abd")
    optimizer, target = torch.optim.AdamW(model.parameters(), 0.25), torch.optim.AdamW(other.parameters())
    stepped(other, target, 3)
    before = by_name(other, target)
    plan = saved(model, optimizer).restore({"model": other, "optimizer": target}, strict=False)
    assert plan.missing == ("model/d.weight", "model/d.bias", "optimizer/state/#4", "optimizer/state/#5")
    assert plan.unexpected == ("model/c.weight", "model/c.bias", "optimizer/state/#4", "optimizer/state/#5")
    assert not any(path.startswith(("optimizer/state/#4", "model/c")) for path in plan.paths)
    now, then = by_name(other, target), by_name(model, optimizer)
    assert {name: now[name] for name in now if name[0] in "ab"} == {name: then[name] for name in now if name[0] in "ab"}
    assert [now[name][0] for name in ("d.weight", "d.bias")] == [before[name][0] for name in ("d.weight", "d.bias")]
    stepped(other, target)


def test_moments_of_new_parameters_keep_their_dtype():
    model, other = Net("ab").bfloat16(), Net("ad").bfloat16()
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    for one in (model, other):
        one.forward = lambda x, one=one: sum(layer(x.bfloat16()) for layer in one.children())
    stepped(other, target)
    kept = target.state[other.d.weight]["exp_avg"] = target.state[other.d.weight]["exp_avg"].float() + 1e-6
    value = kept.clone()
    saved(model, optimizer).restore({"model": other, "optimizer": target}, strict=False)
    assert target.state[other.d.weight]["exp_avg"] is kept
    assert torch.equal(kept, value)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_head_of_another_size_keeps_its_own_values_and_moments_and_is_named(steps):
    model, other = Net("ab"), Net("ba")
    other.b = nn.Linear(4, 6)
    other.forward = lambda x: other.a(x).sum(1, keepdim=True) + other.b(x)
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(other, target, steps)
    pocket, before, weight = saved(model, optimizer), by_name(other, target), other.b.weight.clone()
    with pytest.raises(StateMismatchError, match=r"model/b.weight: shape \(6, 4\) in the state, \(4, 4\)"):
        pocket.restore({"model": other, "optimizer": target})
    plan = pocket.restore({"model": other, "optimizer": target}, strict=False)
    moments = {f"optimizer/state/#{at}/{key}" for at in (2, 3) for key in ("exp_avg", "exp_avg_sq")}
    assert set(plan.reshaped) == {"model/b.weight", "model/b.bias", *moments}
    assert plan.missing == plan.unexpected == ()
    assert torch.equal(other.b.weight, weight)
    now = by_name(other, target)
    assert now["a.weight"] == by_name(model, optimizer)["a.weight"]
    assert now["b.weight"][0] == before["b.weight"][0]
    stepped(other, target)


def test_without_names_positions_count_as_before():
    model, other = Net("ab"), Net("ba")
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(model, optimizer)
    pocket = Pocket.of({"optimizer": optimizer})
    assert pocket.parameters == {}
    pocket.restore({"optimizer": target})
    assert snapshot(target.state_dict()) == snapshot(optimizer.state_dict())
    pocket = Pocket.of({"model": model, "optimizer": optimizer})
    pocket.restore({"optimizer": target})  # the state does not say whose they are
    assert snapshot(target.state_dict()) == snapshot(optimizer.state_dict())


def test_a_state_dict_in_place_of_the_module_names_its_parameters_too():
    model, other = Net("ab"), Net("ba")
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(model, optimizer)
    pocket = Pocket.of({"model": model.state_dict(), "optimizer": optimizer})
    assert pocket.parameters["optimizer"] == ("model/a.weight", "model/a.bias", "model/b.weight", "model/b.bias")
    pocket.restore({"model": other.state_dict(), "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)


def test_a_tied_parameter_is_found_by_any_of_its_names():
    def tied(order):
        model = Net(order)
        model.c.weight = model.a.weight
        return model, torch.optim.AdamW(model.parameters())

    (model, optimizer), (other, target) = tied("abc"), tied("cba")
    pocket = saved(model, optimizer)
    assert pocket.parameters["optimizer"][0] == "model/a.weight"
    assert next(iter(other.named_parameters()))[0] == "c.weight"
    pocket.restore({"model": other, "optimizer": target})
    for one, its in ((model.a.weight, other.a.weight), (model.b.weight, other.b.weight), (model.c.bias, other.c.bias)):
        assert snapshot(target.state[its]) == snapshot(optimizer.state[one])


def test_parameters_that_the_state_does_not_hold_go_by_position_unless_they_have_no_state():
    model, other = Net("abc"), Net("bac")
    model.c.requires_grad_(requires_grad=False)
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(model, optimizer)
    pocket = Pocket.of({"a": model.a, "b": model.b, "optimizer": optimizer})
    assert pocket.parameters["optimizer"][4:] == (None, None)
    pocket.restore({"a": other.a, "b": other.b, "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)
    target = torch.optim.AdamW(other.parameters())
    model.c.requires_grad_()
    stepped(model, optimizer)
    Pocket.of({"a": model.a, "b": model.b, "optimizer": optimizer}).restore(
        {"a": other.a, "b": other.b, "optimizer": target}
    )
    assert snapshot(target.state_dict()) == snapshot(optimizer.state_dict())


def test_a_scheduler_of_groups_in_another_order_is_refused_unless_all_have_one_rate():
    def made(order, *, swap):
        model = Net(order)
        optimizer = decayed(model, swap=swap)
        return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.StepLR(optimizer, 3)}

    source, target = made("abc", swap=False), made("abc", swap=True)
    stepped(source["model"], source["optimizer"])
    before = snapshot([target["model"].state_dict(), target["optimizer"].state_dict()])
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"scheduler: a scheduler knows .* by their order"):
            Pocket.of(source).restore(target, strict=strict)
    assert snapshot([target["model"].state_dict(), target["optimizer"].state_dict()]) == before
    Pocket.of(source).restore(made("cba", swap=False))
    source["scheduler"].base_lrs = [0.1, 0.1]
    Pocket.of(source).restore(target)


def test_a_warm_flattener_sees_that_parameters_changed_their_order():
    from asyncckpt.state.tree import Flattener

    model = Net("ab")
    optimizer = torch.optim.SGD(model.parameters())
    state, flattener = {"model": model, "optimizer": optimizer}, Flattener()
    first = flattener.flatten(state).structure
    assert flattener.flatten(state).structure is first
    optimizer.param_groups[0]["params"].reverse()
    assert list(flattener.flatten(state).structure.parameters["optimizer"]) == list(first.parameters["optimizer"])[::-1]


class TwoNames(nn.Module):
    """Two parameters over one memory: tied for the checkpoint, and each with moments of its own."""

    def __init__(self, order="ab"):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4))
        self.b = nn.Parameter(self.a.data)
        self.order = order

    def optimizer(self):
        return torch.optim.AdamW([getattr(self, name) for name in self.order])

    def step(self, optimizer):
        self.a.grad, self.b.grad = torch.full((4,), 1.0), torch.full((4,), 2.0)
        optimizer.step()


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("detached", [False, True])
def test_two_parameters_over_one_memory_get_their_own_moments_back(order, detached):
    model, other = TwoNames(), TwoNames("ab" if detached else order)
    optimizer, target = model.optimizer(), other.optimizer()
    model.step(optimizer)
    given, taken = (one.state_dict() if detached else one for one in (model, other))
    Pocket.of({"model": given, "optimizer": optimizer}).restore({"model": taken, "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)


def test_a_parameter_is_known_by_another_name_of_its_memory():
    model, other = Net("ab"), Net("ba")
    optimizer, target = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    stepped(model, optimizer)
    pocket = Pocket.of({"copy": model.state_dict(), "model": model, "optimizer": optimizer})
    pocket.restore({"copy": other.state_dict(), "optimizer": target})
    assert by_name(other, target) == by_name(model, optimizer)


def test_moments_that_are_kept_must_serve_the_options_that_come_with_the_group():
    model, other = Net("abc"), Net("abd")
    optimizer, target = torch.optim.AdamW(model.parameters(), amsgrad=True), torch.optim.AdamW(other.parameters())
    pocket = saved(model, optimizer)
    stepped(other, target)
    before = snapshot([other.state_dict(), target.state_dict()])
    with pytest.raises(StateMismatchError, match="need max_exp_avg_sq"):
        pocket.restore({"model": other, "optimizer": target}, strict=False)
    assert snapshot([other.state_dict(), target.state_dict()]) == before
    fresh = torch.optim.AdamW(other.parameters())
    pocket.restore({"model": other, "optimizer": fresh}, strict=False)
    stepped(other, fresh)


def test_another_kind_of_optimizer_is_refused_where_no_group_takes_options():
    model, other = Net("ab"), Net("ab")
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in model.children()])
    optimizer.param_groups[1]["lr"] = 0.5
    target = torch.optim.Adafactor(other.parameters())
    with pytest.raises(StateMismatchError, match="another kind of optimizer"):
        saved(model, optimizer).restore({"model": other, "optimizer": target}, strict=False)


def test_parameters_of_a_group_that_are_no_list_are_damage():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    pocket = saved(model, optimizer)
    pocket.values["optimizer/param_groups/#0/params"] = None
    with pytest.raises(CorruptCheckpointError, match="no list at 'optimizer/param_groups/#0/params'"):
        pocket.restore({"model": model, "optimizer": optimizer})


def told(caplog):
    return [record.getMessage() for record in caplog.records if "by the order of its parameters" in record.getMessage()]


@pytest.mark.parametrize("strict", [True, False])
def test_moments_that_go_by_position_are_told_with_the_reason(strict, caplog):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    whole = {"model": model, "optimizer": optimizer}
    plain = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    other = Net()
    fresh = {"model": other, "optimizer": torch.optim.AdamW(other.parameters())}
    alone = {"optimizer": fresh["optimizer"]}
    for source, target, why in (
        (plain, fresh, "the checkpoint does not name them"),
        ({"optimizer": optimizer}, fresh | {"model": None}, "the checkpoint does not name them"),
        (whole, alone, "the state does not hold them"),
        (whole, plain, "the state holds its state_dict()"),
        (plain, plain, "the state holds its state_dict()"),
    ):
        target.pop("model") if target.get("model", 1) is None else None
        caplog.clear()
        Pocket.of(source).restore(target, strict=strict)
        assert len(told(caplog)) == 1
        assert f"'optimizer' is restored by the order of its parameters, because {why}:" in told(caplog)[0]


def test_moments_that_go_by_name_or_cannot_be_mistaken_are_not_told(caplog):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    small = nn.Linear(2, 3)
    own = torch.optim.SGD(small.parameters(), momentum=0.9)
    small(torch.ones(1, 2)).sum().backward()
    own.step()
    for state in (
        {"model": model, "optimizer": optimizer},
        {"optimizer": own},
        {"optimizer": torch.optim.AdamW(Net().parameters())},
    ):
        Pocket.of(state).restore(state)
    Pocket.of({"model": model.state_dict(), "optimizer": optimizer}).restore(
        {"model": model.state_dict(), "optimizer": optimizer}
    )
    assert not told(caplog)
