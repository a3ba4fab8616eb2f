import copy
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, StateMismatchError
from asyncckpt.state.stateful import plan_restore
from tests.unit.state.pocket import Pocket, snapshot


class Net(nn.Module):
    def __init__(self, seed=0, width=4):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2, dtype=torch.bfloat16)
        )
        self.register_buffer("table", torch.rand(2, 5))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.register_buffer("wide", torch.rand(2, 1).expand(2, 3))
        self.none = None


def both(state, target, **options):
    """Store `state`, restore into `target`, and return the plan."""
    return Pocket.of(state).restore(target, **options)


def test_a_module_is_restored_in_place():
    source, target = Net(0), Net(1)
    held = {name: (tensor, tensor.data_ptr()) for name, tensor in target.state_dict(keep_vars=True).items()}
    scratch = target.scratch.clone()
    both({"m": source}, {"m": target})
    assert snapshot(target.state_dict()) == snapshot(source.state_dict())
    assert all(target.state_dict(keep_vars=True)[name] is tensor for name, (tensor, _) in held.items())
    assert all(tensor.data_ptr() == address for tensor, address in held.values())
    assert torch.equal(target.scratch, scratch)


def test_only_the_tensors_of_the_groups_in_the_state_are_asked_for():
    pocket = Pocket.of({"m": Net(), "big": {"t": torch.zeros(10)}, "n": 1})
    plan = pocket.restore({"m": Net(1)})
    assert set(plan.paths) == {f"m/{name}" for name in Net().state_dict()}


def test_nan_and_negative_zero_come_back():
    source, target = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    source.weight.data = torch.tensor([[0x7FC12345, -(2**31)]], dtype=torch.int32).view(torch.float32)
    both({"m": source}, {"m": target})
    assert snapshot(target.state_dict()) == snapshot(source.state_dict())


class Extra(nn.Linear):
    def __init__(self, seen=None):
        super().__init__(2, 2)
        self.seen = seen

    def get_extra_state(self):
        return {"seen": self.seen, "t": torch.full((2,), 3.0)}

    def set_extra_state(self, state):
        self.seen, self.kept = state["seen"], state["t"]


def test_extra_state_comes_back_as_a_private_copy():
    source, target = nn.Sequential(Extra([1, "x"])), nn.Sequential(Extra())
    both({"m": source}, {"m": target})
    assert target[0].seen == [1, "x"]
    assert target[0].kept.tolist() == [3.0, 3.0]


def test_hooks_of_a_module_run():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    source.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"count": torch.tensor(5)})
    )
    target.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"count": torch.tensor(0)})
    )
    seen = []

    def take(module, state, prefix, *rest):
        seen.append(state.pop("count"))

    target.register_load_state_dict_pre_hook(take)
    both({"m": source}, {"m": target})
    assert seen[0].item() == 5, "a hook may keep what it is given"
    assert snapshot(target.weight) == snapshot(source.weight)


def test_a_module_that_keeps_what_it_loads_gets_a_copy():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = torch.zeros(2)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "t"] = self.t

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            self.t = state_dict[prefix + "t"]

    source, target = Keeps(), Keeps()
    source.t = torch.ones(2)
    both({"m": source}, {"m": target})
    assert target.t.tolist() == [1.0, 1.0]


def tied(tie=True):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if tie:
        module[1].weight = module[0].weight
    return module


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_checkpoint_restores_into_a_tied_and_an_untied_model(tie):
    target = tied(tie)
    with torch.no_grad():
        target[0].weight.zero_()
    both({"m": tied()}, {"m": target})
    assert snapshot(target.state_dict()) == snapshot(tied().state_dict())
    assert (target[0].weight is target[1].weight) == tie


def test_an_untied_checkpoint_restores_into_a_tied_model_if_its_values_agree():
    source = tied(tie=False)
    source[1].weight.data.copy_(source[0].weight.data)
    target = tied()
    both({"m": source}, {"m": target})
    assert snapshot(target.state_dict()) == snapshot(source.state_dict())


def test_an_untied_checkpoint_with_other_values_is_a_mismatch_and_changes_nothing():
    target, other = tied(), {"t": torch.zeros(1)}
    before = snapshot(target.state_dict())
    with pytest.raises(StateMismatchError, match=r"m/0\.weight.*m/1\.weight.*tied"):
        both({"o": {"t": torch.ones(1)}, "m": tied(tie=False)}, {"o": other, "m": target})
    assert snapshot(target.state_dict()) == before
    assert other["t"].item() == 0


def test_every_difference_is_listed_and_nothing_changes():
    source = {
        "m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)),
        "d": {"t": torch.zeros(2), "gone": torch.zeros(1), "a": np.zeros(2), "l": [torch.zeros(1)]},
        "v": 1,
    }
    target = {
        "m": nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 4), nn.Linear(1, 1)),
        "d": {"t": 5.0, "more": torch.zeros(1), "a": np.zeros(2, np.int64), "l": [torch.zeros(1)] * 2},
        "v": torch.zeros(1),
        "new": 1,
    }
    before = snapshot({key: value.state_dict() if key == "m" else value for key, value in target.items()})
    with pytest.raises(StateMismatchError) as caught:
        both(source, target)
    for part in (
        "m/0.weight: dtype bfloat16 in the state, float32 in the checkpoint",
        "m/1.weight: shape (4, 2) in the state, (3, 2) in the checkpoint",
        "m/2.bias: missing in the checkpoint",
        "d/gone: unexpected",
        "d/more: missing",
        "d/a: dtype int64 in the state, float64",
        "d/l: list of 2 in the state, list of 1",
        "v: a tensor in the state, value in the checkpoint",
        "new: the checkpoint has no such group",
        "strict=False",
    ):
        assert part in str(caught.value)
    assert snapshot({key: value.state_dict() if key == "m" else value for key, value in target.items()}) == before


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(StateMismatchError, match="in 100 place") as caught:
        both({"d": {}}, {"d": {f"k{at}": torch.zeros(1) for at in range(100)}})
    assert "and 80 more" in str(caught.value)


def test_not_strict_skips_names_of_one_side_but_no_shapes():
    source = {"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "d": {"gone": torch.zeros(1)}}
    target = {"m": nn.Sequential(nn.Linear(2, 2)), "d": {"more": torch.ones(1)}, "new": 1}
    target["m"].append(nn.Identity()).append(nn.Linear(3, 3))
    both(source, target, strict=False)
    assert snapshot(target["m"][0].state_dict()) == snapshot(source["m"][0].state_dict())
    assert target["d"] == {"more": torch.ones(1)}
    with pytest.raises(StateMismatchError, match="shape"):
        both({"d": {"t": torch.zeros(1)}}, {"d": {"t": torch.zeros(2)}}, strict=False)


def test_a_lazy_and_a_meta_module_are_mismatches():
    with pytest.raises(StateMismatchError, match="forward pass"):
        both({"m": nn.Linear(2, 2)}, {"m": nn.LazyLinear(2)})
    with pytest.raises(StateMismatchError, match="meta"):
        both({"m": nn.Linear(2, 2)}, {"m": nn.Linear(2, 2, device="meta")})


def test_plain_values_are_put_back_into_their_containers():
    losses, seen = [9.0], {9}
    inner = {"n": 0, "losses": losses, "seen": seen, "pair": (0, [0]), "best": None, "np": np.float32(0)}
    target = {"inner": inner, "top": 0, "od": OrderedDict(a=0)}
    source = {
        "inner": {
            "n": 7,
            "losses": [1.0, 2.0],
            "seen": {1, "a"},
            "pair": (1, [2]),
            "best": {"t": torch.ones(2)},
            "np": np.float32(3),
        },
        "top": "x",
        "od": OrderedDict(a=1, b=[1]),
    }
    want = snapshot(source)
    both(source, target)
    assert snapshot(target) == want
    assert target["inner"] is inner
    assert inner["losses"] is losses
    assert inner["seen"] is seen


def test_values_that_the_state_has_not_yet_are_added_to_their_dict():
    target = {"history": {}}
    both({"history": {"loss": [1.0], "deep": {"x": (1, 2)}}}, target)
    assert target == {"history": {"loss": [1.0], "deep": {"x": (1, 2)}}}


def test_tensors_that_the_state_has_no_place_for_are_refused_with_the_way_out():
    stored = {"extra": {"rng": torch.ones(3), "n": 3}}
    with pytest.raises(StateMismatchError, match=r"extra/rng: unexpected, .*; None there takes what is stored"):
        both(stored, {"extra": {}})
    for target in ({"extra": None}, {"extra": {"rng": None}}):
        both(stored, target)
        assert (target["extra"]["rng"].tolist(), target["extra"]["n"]) == ([1, 1, 1], 3)


def test_tensors_and_arrays_in_containers_are_restored_in_place():
    tensor, array, requires = torch.zeros(2), np.zeros(2), torch.zeros(1, requires_grad=True)
    target = {"x": [tensor, {"a": array}, (requires, 1)]}
    both({"x": [torch.ones(2), {"a": np.ones(2)}, (torch.ones(1), 5)]}, target)
    assert target["x"][0] is tensor
    assert target["x"][1]["a"] is array
    assert target["x"][2][0] is requires
    assert (tensor.tolist(), array.tolist(), target["x"][2]) == ([1, 1], [1, 1], (requires, 5))
    assert requires.item() == 1


def test_an_inference_tensor_is_restored_in_place():
    with torch.inference_mode():
        target = torch.zeros(2)
    both({"t": torch.ones(2)}, {"t": target})
    assert target.tolist() == [1, 1]


def test_an_expanded_tensor_takes_only_values_that_fit_it():
    target = torch.zeros(2, 1).expand(2, 3)
    both({"t": torch.tensor([[1.0], [2.0]]).expand(2, 3)}, {"t": target})
    assert target.tolist() == [[1, 1, 1], [2, 2, 2]]
    other = torch.zeros(2)
    with pytest.raises(StateMismatchError, match=r"'t' is expanded.*nothing was loaded.*clone"):
        both({"o": torch.ones(2), "t": torch.arange(6.0).view(2, 3)}, {"o": other, "t": target})
    assert (other.tolist(), target.tolist()) == ([0, 0], [[1, 1, 1], [2, 2, 2]])


def test_a_read_only_array_or_state_is_a_mismatch():
    array = np.zeros(2)
    array.flags.writeable = False
    with pytest.raises(StateMismatchError, match="read-only"):
        both({"a": np.ones(2)}, {"a": array})
    with pytest.raises(StateMismatchError, match="read-only"):
        both({"n": 1}, types.MappingProxyType({"n": 0}))
    with pytest.raises(StateMismatchError, match=r"d/n: the dict is read-only.*\n.*d/new: the dict is read-only"):
        both({"d": {"n": 1, "new": 2}}, {"d": types.MappingProxyType({"n": 0})})
    tensor = torch.zeros(1)
    both({"t": torch.ones(1)}, types.MappingProxyType({"t": tensor}))
    both({"d": {"t": torch.ones(1)}}, {"d": types.MappingProxyType({"t": tensor})})
    assert tensor.item() == 1


class Loader:
    def __init__(self, position=0, fails=False):
        self.state, self.fails = {"position": position, "order": torch.arange(3), "seen": [[1], (2,)]}, fails

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if self.fails:
            raise RuntimeError("no")
        self.state = state


def test_any_object_gets_a_private_deep_copy():
    target, pocket = Loader(), Pocket.of({"l": Loader(5)})
    pocket.restore({"l": target})
    assert snapshot(target.state) == snapshot(Loader(5).state)
    target.state["seen"][0].append(3)
    assert pocket.values["l/seen/#0"] == [1]


def test_an_object_that_fails_to_load_is_named_with_what_is_overwritten_and_the_way_out():
    source = {"t": torch.ones(1), "m": nn.Linear(2, 2), "data": {"n": 1, "loader": Loader(1)}, "epoch": 3}
    target = {
        "t": torch.zeros(1),
        "m": nn.Linear(2, 2),
        "data": {"n": 0, "loader": Loader(fails=True)},
        "epoch": 0,
    }
    with pytest.raises(CheckpointError) as caught:
        both(source, target)
    error = caught.value
    for part in (
        "load_state_dict() of 'data/loader' (a Loader) raised RuntimeError: no\n",
        "overwritten by now: 't', 'm'; perhaps in part: 'data'; as before: 'epoch'.\n",
        "or put None in the place of 'data/loader', and restore again",
    ):
        assert part in error.message
    assert (error.key, error.overwritten) == ("data/loader", True)
    assert isinstance(error.__cause__, RuntimeError)
    assert not isinstance(error, StateMismatchError)
    assert snapshot(target["m"].state_dict()) == snapshot(source["m"].state_dict())
    assert (target["t"].item(), target["epoch"]) == (1, 0)
    target["data"]["loader"] = None
    both(source, target)
    assert (target["data"]["n"], target["epoch"]) == (1, 3)


def test_a_first_object_that_fails_without_a_word_is_named_too():
    class Silent(Loader):
        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(CheckpointError) as caught:
        both({"l": Loader(1), "n": 1}, {"l": Silent(), "n": 0})
    assert caught.value.message.startswith(
        "load_state_dict() of 'l' (a Silent) raised AssertionError\nperhaps overwritten in part: 'l'; as before: 'n'.\n"
        "Make 'l' as it was when it was saved, or leave 'l' out of the state, and restore again"
    )


def test_a_module_whose_state_dict_raises_is_named_before_anything_changes():
    class Broken(nn.Linear):
        def state_dict(self, **_):
            raise RuntimeError("not gathered")

    target = {"t": torch.zeros(1), "m": Broken(2, 2)}
    with pytest.raises(
        StateMismatchError, match=r"m: state_dict\(\) of a Broken raised RuntimeError\('not gathered'\)"
    ):
        both({"t": torch.ones(1), "m": nn.Linear(2, 2)}, target)
    assert target["t"].item() == 0


def test_a_value_that_an_object_needs_and_the_state_file_lacks_is_found_before_anything_changes():
    pocket, target = Pocket.of({"t": torch.ones(1), "l": Loader(5)}), {"t": torch.zeros(1), "l": Loader()}
    del pocket.values["l/position"]
    with pytest.raises(CorruptCheckpointError, match="l/position"):
        pocket.restore(target)
    assert target["t"].item() == 0


def test_an_unsupported_target_is_a_mismatch():
    with pytest.raises(StateMismatchError, match="nothing can be loaded into a object"):
        both({"x": 1}, {"x": object()})


def test_an_index_without_a_tensor_that_its_tree_names_is_corrupt():
    pocket = Pocket.of({"t": torch.zeros(1)})
    with pytest.raises(CorruptCheckpointError):
        plan_restore({"t": torch.zeros(1)}, pocket.tree, {}, {})


def test_the_module_in_two_groups_is_restored_once_consistently():
    source, target = Net(0), Net(1)
    both({"a": source, "b": source}, {"a": target, "b": target})
    assert snapshot(target.state_dict()) == snapshot(source.state_dict())


def test_a_deep_copy_of_a_model_is_restored_apart():
    source, average = Net(0), Net(2)
    target = Net(1)
    target_average = copy.deepcopy(target)
    both({"m": source, "ema": average}, {"m": target, "ema": target_average})
    assert snapshot(target.state_dict()) == snapshot(source.state_dict())
    assert snapshot(target_average.state_dict()) == snapshot(average.state_dict())
