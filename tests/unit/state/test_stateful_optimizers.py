import itertools

import pytest
import torch
from torch.optim import lr_scheduler

import asyncckpt
from asyncckpt.errors import StateMismatchError
from tests.unit.state.pocket import Pocket, snapshot

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "AdamW": {"amsgrad": True}}


class Training:
    def __init__(self, name, dtype=torch.float32, steps=0, **options):
        torch.manual_seed(0)
        self.name, self.dtype = name, dtype
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
        parameters = [p for p in self.model.parameters() if name != "Muon" or p.dim() == 2]
        self.optimizer = getattr(torch.optim, name)(parameters, lr=0.01, **{**OPTIONS.get(name, {}), **options})
        for _ in range(steps):
            self.step()

    def step(self):
        def loss():
            self.optimizer.zero_grad()
            value = self.model(torch.ones(2, 4, dtype=self.dtype)).square().sum()
            value.backward()
            if self.name == "SparseAdam":
                for parameter in self.model.parameters():
                    parameter.grad = parameter.grad.to_sparse()
            return value

        self.optimizer.step(loss)

    @property
    def state(self):
        return {"m": self.model, "o": self.optimizer}

    def seen(self):
        return snapshot([dict(self.model.state_dict()), self.optimizer.state_dict()])


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_with_every_optimizer(name, steps):
    source, target = Training(name, steps=2), Training(name, steps=steps)
    Pocket.of(source.state).restore(target.state)
    assert target.seen() == source.seen()
    source.step()
    target.step()
    assert target.seen() == source.seen()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_state_keeps_its_stored_dtype_beside_narrow_parameters(name, steps):
    source, target = Training(name, torch.bfloat16, steps=2), Training(name, torch.bfloat16, steps=steps)
    for inner in source.optimizer.state.values():
        for key, value in inner.items():
            inner[key] = value.float() + 1e-6
    Pocket.of(source.state).restore(target.state)
    assert target.seen() == source.seen()
    dtypes = {value.dtype for inner in target.optimizer.state.values() for value in inner.values()}
    assert dtypes == {torch.float32}


def test_state_tensors_that_exist_are_copied_into():
    source, target = Training("AdamW", steps=2), Training("AdamW", steps=1)
    held = [tensor for inner in target.optimizer.state.values() for tensor in inner.values()]
    Pocket.of(source.state).restore(target.state)
    now = [tensor for inner in target.optimizer.state.values() for tensor in inner.values()]
    assert all(one is other for one, other in zip(held, now, strict=True))


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    source, target = Training("AdamW", steps=1), Training("AdamW")
    source.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    rate = target.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    Pocket.of(source.state).restore(target.state)
    assert target.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_parameter_groups_must_agree_in_number_and_length():
    source, target = Training("SGD"), Training("SGD")
    target.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(StateMismatchError, match="o/param_groups: 2 in the state, 1 in the checkpoint"):
        Pocket.of(source.state).restore(target.state)
    shorter = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(StateMismatchError, match="o/param_groups/#0/params: 1 in the state, 4 in the checkpoint"):
        Pocket.of(source.state).restore({"o": shorter})


def test_existing_state_of_another_shape_is_a_mismatch_and_changes_nothing():
    source, target = Training("AdamW", steps=1), Training("AdamW", steps=2)
    first = next(iter(target.optimizer.state.values()))
    first["exp_avg"] = torch.zeros(7)
    before = target.seen()
    with pytest.raises(StateMismatchError, match=r"o/state/#0/exp_avg: shape \(7,\) in the state, \(3, 4\)"):
        Pocket.of(source.state).restore(target.state)
    assert target.seen() == before


def test_hooks_of_an_optimizer_run_and_may_reorder_parameters():
    source, target = Training("AdamW", steps=2), Training("AdamW")
    order = [3, 2, 1, 0]
    target.optimizer = torch.optim.AdamW([list(target.model.parameters())[at] for at in order], lr=0.01)

    def reorder(optimizer, state):
        groups = [{**state["param_groups"][0], "params": [0, 1, 2, 3]}]
        return {"state": {at: state["state"][order[at]] for at in range(4)}, "param_groups": groups}

    done = []
    target.optimizer.register_load_state_dict_pre_hook(reorder)
    target.optimizer.register_load_state_dict_post_hook(done.append)
    Pocket.of(source.state).restore(target.state)
    assert done == [target.optimizer]
    for left, right in zip(source.model.parameters(), target.model.parameters(), strict=True):
        assert snapshot(source.optimizer.state[left]) == snapshot(target.optimizer.state[right])


def test_state_that_belongs_to_no_parameter_comes_back_as_a_private_copy():
    source, target = Training("SGD", steps=1), Training("SGD")
    source.optimizer.state["mine"] = {"t": torch.ones(2), "n": 3}
    Pocket.of(source.state).restore(target.state)
    assert snapshot(target.optimizer.state["mine"]) == snapshot({"t": torch.ones(2), "n": 3})


def test_an_optimizer_with_a_state_dict_of_its_own_is_loaded_as_any_object():
    class Own(torch.optim.SGD):
        def state_dict(self):
            return {"mine": torch.ones(2)}

        def load_state_dict(self, state):
            self.got = state["mine"]

    parameters = [torch.zeros(1, requires_grad=True)]
    target = Own(parameters)
    Pocket.of({"o": Own(parameters)}).restore({"o": target})
    assert target.got.tolist() == [1.0, 1.0]


def schedulers():
    inner = [
        lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    ]
    return {
        "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lr_lambda=lambda epoch: 0.9**epoch),
        "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lr_lambda=lambda epoch: 0.9),
        "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
        "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
        "ConstantLR": inner[0],
        "LinearLR": lr_scheduler.LinearLR,
        "ExponentialLR": inner[1],
        "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
        "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
        "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([make(o) for make in inner]),
        "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [make(o) for make in inner], milestones=[2]),
        "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
    }


def test_every_scheduler_of_torch_is_listed_here():
    kinds = {
        name
        for name in lr_scheduler.__all__
        if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler) and name != "LRScheduler"
    }
    assert kinds <= set(schedulers())


@pytest.mark.parametrize("name", schedulers())
def test_every_scheduler_goes_on_where_it_stood(name):
    def training(steps):
        run = Training("SGD")
        scheduler = schedulers()[name](run.optimizer)
        for _ in range(steps):
            tick(run, scheduler)
        return run, scheduler

    def tick(run, scheduler):
        run.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return [group["lr"] for group in run.optimizer.param_groups]

    (run, scheduler), (other, fresh) = training(3), training(0)
    Pocket.of({**run.state, "s": scheduler}).restore({**other.state, "s": fresh})
    assert snapshot(fresh.state_dict()) == snapshot(scheduler.state_dict())
    rates = [(tick(run, scheduler), tick(other, fresh)) for _ in range(4)]
    assert all(left == right for left, right in rates)
    assert other.seen() == run.seen()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_grad_scaler_comes_back(enabled):
    source = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
    target = torch.amp.GradScaler("cpu", enabled=enabled)
    Pocket.of({"g": source}).restore({"g": target})
    assert target.state_dict() == source.state_dict()


def test_two_optimizers_over_one_model_come_back():
    source, target = Training("SGD", steps=1), Training("SGD")
    states = []
    for run in (source, target):
        second = torch.optim.AdamW(itertools.islice(run.model.parameters(), 2))
        states.append({**run.state, "second": second})
    states[0]["second"].step()
    Pocket.of(states[0]).restore(states[1])
    assert target.seen() == source.seen()
    assert snapshot(states[0]["second"].state_dict()) == snapshot(states[1]["second"].state_dict())


def test_every_parameter_of_every_group_gets_its_own_state_back() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleDict(
            {"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3), "c": torch.nn.Linear(3, 3)}
        )
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed[:1]}, {"params": plain, "weight_decay": 0.0}, {"params": decayed[1:], "lr": 0.5}]
        return model, torch.optim.AdamW(groups, lr=1e-2)

    model, optimizer = build()
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()
    with asyncckpt.Saver("memory://groups-of-parameters") as saver:
        saver.save(1, {"model": model, "optimizer": optimizer})
    fresh, other = build()
    asyncckpt.restore("memory://groups-of-parameters", {"model": fresh, "optimizer": other})
    for old, new in zip(model.parameters(), fresh.parameters(), strict=True):
        assert set(optimizer.state[old]) == set(other.state[new])
        assert all(torch.equal(optimizer.state[old][name], other.state[new][name]) for name in optimizer.state[old])
    assert [group["lr"] for group in other.param_groups] == [1e-2, 1e-2, 0.5]


def test_the_state_of_another_kind_of_optimizer_is_a_mismatch() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with asyncckpt.Saver("memory://another-kind-of-optimizer") as saver:
        saver.save(1, {"optimizer": optimizer})
    other = torch.optim.SGD(model.parameters(), lr=7.0)
    with pytest.raises(asyncckpt.errors.StateMismatchError, match="betas"):
        asyncckpt.restore("memory://another-kind-of-optimizer", {"optimizer": other})
    assert other.param_groups[0]["lr"] == 7.0


def test_loading_takes_time_in_proportion_to_the_parameters(monkeypatch):
    """torch looks for each value's parameter among all ids of its group: with a plain list that is quadratic."""
    seen = []

    def look(param, value, param_id, param_groups, key=None):
        seen.append([hasattr(group["params"], "_known") for group in param_groups])
        assert param_id in param_groups[0]["params"]
        assert -1 not in param_groups[0]["params"]
        return value

    source, target = Training("AdamW", steps=2), Training("AdamW")
    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(look))
    Pocket.of(source.state).restore(target.state)
    assert seen
    assert all(all(known) for known in seen)
    assert target.seen() == source.seen()


def test_moments_of_parameters_in_another_order_are_a_mismatch_where_shapes_tell():
    def training(reverse):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        parameters = list(model.parameters())
        return {"m": model, "o": torch.optim.AdamW(parameters[::-1] if reverse else parameters)}

    source, target = training(reverse=False), training(reverse=True)
    for parameter in source["m"].parameters():
        parameter.grad = torch.ones_like(parameter)
    source["o"].step()
    before = snapshot([target["m"].state_dict()])
    with pytest.raises(StateMismatchError, match=r"o/state/#0/exp_avg: shape \(8, 8\).*another order"):
        Pocket.of({"o": source["o"]}).restore({"o": target["o"]})  # without the model nobody knows their names
    assert snapshot([target["m"].state_dict()]) == before
    assert not target["o"].state


class Doubling(torch.optim.AdamW):
    """Changes what it loads, as a migration of old checkpoints does."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for slot in self.state.values():
            slot["exp_avg"] = slot["exp_avg"] * 2


class Renaming(torch.optim.AdamW):
    def __setstate__(self, state):
        super().__setstate__(state)
        for slot in self.state.values():
            if "exp_avg_sq" in slot:
                slot["v"] = slot.pop("exp_avg_sq")


def doubled(optimizer):
    for slot in optimizer.state.values():
        slot["exp_avg"] = slot["exp_avg"] * 2


def in_place(optimizer):
    for slot in optimizer.state.values():
        slot["exp_avg"].mul_(2)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("hook", [None, doubled, in_place])
def test_what_an_optimizers_own_code_makes_of_its_state_while_it_loads_stays(hook, steps):
    source, target = Training("AdamW", steps=2), Training("AdamW", steps=steps)
    if hook is None:
        target.optimizer.__class__ = Doubling
    else:
        target.optimizer.register_load_state_dict_post_hook(hook)
    Pocket.of(source.state).restore(target.state)
    for before, after in zip(source.optimizer.state.values(), target.optimizer.state.values(), strict=True):
        assert torch.equal(after["exp_avg"], before["exp_avg"] * 2)
        assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_name_that_an_optimizer_drops_while_it_loads_does_not_come_back(steps):
    source, target = Training("AdamW", steps=2), Training("AdamW")
    target.optimizer.__class__ = Renaming
    Pocket.of(source.state).restore(target.state)
    for slot in target.optimizer.state.values():
        assert "v" in slot
        assert "exp_avg_sq" not in slot
