"""An optimizer read in bulk is the optimizer that its `state_dict()` describes, at every save, whatever happened between."""

import pytest
import torch
from torch import nn

from asyncckpt.state.packing import pack
from asyncckpt.state.tree import Flattener


def parameters(*sizes):
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def described(state):
    """What `state_dict()` gives, through the front door: a hook that does nothing makes it be called."""
    handles = [optimizer.register_state_dict_post_hook(lambda *_: None) for optimizer in state.values()]
    try:
        return Flattener().flatten(state)
    finally:
        for handle in handles:
            handle.remove()


def assert_same(flat, expected):
    assert flat.structure == expected.structure
    assert flat.values == expected.values
    assert list(map(id, flat.tensors)) == list(map(id, expected.tensors))
    assert flat.overlappable == expected.overlappable


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW of a learning rate that is a tensor": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(1e-3), capturable=False
    ),
    "SGD without state": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "LBFGS, whose state is no dict of tensors": torch.optim.LBFGS,
    "NAdam": torch.optim.NAdam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reading_in_bulk_gives_what_state_dict_gives(name):
    made = OPTIMIZERS[name](parameters(3, 4, 5))
    state = {"optimizer": made}
    if "LBFGS" in name:
        made.step(lambda: sum((p**2).sum() for p in made.param_groups[0]["params"]))
    else:
        stepped(made)
    flattener = Flattener()
    for _ in range(3):
        assert_same(flattener.flatten(state), described(state))
        made.param_groups[0]["lr"] = made.param_groups[0]["lr"] * 0.5


def test_whatever_changes_between_two_saves_is_seen():
    few = parameters(3, 4, 5, 6)
    made = torch.optim.AdamW([{"params": few[:2], "lr": 0.1}, {"params": few[2:], "name": "late"}])
    state = {"first": made, "second": stepped(torch.optim.SGD(parameters(2, 2), lr=0.1, momentum=0.9))}
    flattener = Flattener()

    def check():
        flat = flattener.flatten(state)
        assert_same(flat, described(state))
        return flat.structure

    empty = check()
    stepped(made)
    full = check()
    assert full != empty
    assert check() is full
    made.add_param_group({"params": parameters(7)})
    assert check() != full
    few[1].requires_grad_(False)
    del made.state[few[1]]  # frozen in mid-run
    without = check()
    made.state[few[1]] = {"exp_avg": torch.zeros(4)}  # at another place of the dict, with another key
    assert check() != without
    made.state[few[1]]["more"] = torch.zeros(1)
    check()
    made.param_groups.reverse()
    check()
    made.state[few[0]]["exp_avg"] = torch.zeros(3)  # another tensor in an old one's place
    check()
    made.state[few[0]]["step"] = 7  # no tensor any more
    check()
    state["second"], state["first"] = made, state["second"]  # remembered by position, so both are new
    check()


def test_what_state_dict_would_do_differently_is_left_to_it():
    class Own(torch.optim.AdamW):
        def state_dict(self):
            return super().state_dict() | {"own": 1}

    def hooked(p):
        made = torch.optim.AdamW(p)
        made.register_state_dict_post_hook(lambda _, state: state | {"own": 1})
        return made

    def patched(p):
        made = torch.optim.AdamW(p)
        made.state_dict = lambda: {"own": 1}
        return made

    for kind in (Own, hooked, patched):
        made = stepped(kind(parameters(3)))
        assert pack(made, None) is None
        assert Flattener().flatten({"optimizer": made}).values["optimizer/own"] == 1
    doubled = torch.optim.SGD(parameters(3), lr=0.1, momentum=0.9)
    doubled.param_groups.append(dict(doubled.param_groups[0]))
    assert pack(stepped(doubled), None) is None


def test_what_is_remembered_of_an_optimizer_holds_no_tensor():
    made = stepped(torch.optim.AdamW(parameters(3)))
    packed = pack(made, None)
    assert packed is not None
    assert packed.leaves
    remembered = [packed.seen.tokens, packed.seen.names, packed.seen.holders, *packed.seen.owned, *packed.seen.numbers]
    assert not [one for many in remembered for one in many if isinstance(one, torch.Tensor)]
