import functools
import sys

import pytest
import torch
from torch import nn

from asyncckpt.errors import UnsupportedTensorError
from asyncckpt.state.capture import capture_module, unwrap
from asyncckpt.state.tree import Flattener
from tests.unit.state.pocket import Pocket, snapshot


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def compiled(module):
    return torch.compile(module, backend="eager")  # nothing is called, so nothing is compiled


def stored_names(module):
    structure = Flattener().flatten({"m": module}).structure
    return [structure.path(at) for at in range(len(structure.tensors))]


PLAIN = [f"m/{name}" for name in net().state_dict()]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def both_ways(wrap):
    """Saved wrapped, restored plain, and the other way round."""
    for source, target in ((wrap(net(0)), net(1)), (net(0), wrap(net(1))), (wrap(net(0)), wrap(net(1)))):
        assert stored_names(source) == PLAIN
        want = snapshot(list(net(0).state_dict().values()))
        Pocket.of({"m": source}).restore({"m": target})
        assert snapshot(list(target.state_dict().values())) == want


def test_distributed_data_parallel_is_unwrapped(group):
    both_ways(nn.parallel.DistributedDataParallel)
    both_ways(lambda module: compiled(nn.parallel.DistributedDataParallel(module)))


def test_data_parallel_is_unwrapped():
    both_ways(nn.DataParallel)


def test_a_compiled_module_is_unwrapped():
    both_ways(compiled)


def test_a_module_compiled_in_place_is_a_module():
    def wrap(module):
        module.compile(backend="eager")
        return module

    both_ways(wrap)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_compiled_submodule_leaves_no_trace_in_the_names(hooked):
    def wrap(module):
        module[1] = compiled(module[1])
        if hooked:  # the slow road through state_dict() itself
            module.register_state_dict_post_hook(lambda *_: None)
        return module

    both_ways(wrap)


def test_accelerates_wrappers_are_unwrapped():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def training(wrapped, steps):
        module = net()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        objects = (module, optimizer, scheduler)
        if wrapped:
            objects = accelerator.prepare(*objects)
        for _ in range(steps):
            objects[0](torch.rand(4, 2)).sum().backward()
            objects[1].step()
            objects[2].step()
        return dict(zip("mos", objects, strict=True))

    source, target = training(wrapped=True, steps=3), training(wrapped=False, steps=0)
    flat = Flattener().flatten(source)
    assert flat.has_optimizer
    assert sum(flat.overlappable) > 4
    assert isinstance(unwrap(source["o"]), torch.optim.AdamW)
    assert type(unwrap(source["s"])) is torch.optim.lr_scheduler.StepLR
    want = snapshot([source["o"].state_dict(), source["s"].state_dict()])
    Pocket.of(source).restore(target)
    assert snapshot([target["o"].state_dict(), target["s"].state_dict()]) == want
    again = training(wrapped=True, steps=1)
    Pocket.of(target).restore(again)
    assert snapshot([again["o"].state_dict(), again["s"].state_dict()]) == want
    assert "accelerate" in sys.modules


@pytest.mark.parametrize("package", ["lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer"])
def test_lightnings_optimizer_is_unwrapped_by_name(package):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    wrapper = type("LightningOptimizer", (), {"__module__": package})()
    wrapper._optimizer = optimizer
    assert unwrap(wrapper) is optimizer


def test_a_users_class_of_a_wrappers_name_is_left_alone():
    wrapper = type("LightningOptimizer", (), {"__module__": "mine"})()
    assert unwrap(wrapper) is wrapper


def test_a_dtensor_is_refused_with_a_way_out(group):
    from torch.distributed.tensor import DTensor, init_device_mesh

    tensor = DTensor.from_local(torch.zeros(2), init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedTensorError, match="full_tensor"):
        Flattener().flatten({"t": tensor})


def customised():
    def post_hook(module):
        module[0].register_state_dict_post_hook(
            lambda one, state, prefix, _: state.update({prefix + "x": torch.ones(1)})
        )

    def pre_hook(module):
        module[0].register_state_dict_pre_hook(lambda one, prefix, _: one.bias.data.fill_(3))

    def instance(module):
        module[1].state_dict = functools.partial(module[1].state_dict)

    def subclass(module):
        class Saves(nn.Linear):
            def _save_to_state_dict(self, destination, prefix, keep_vars):
                destination[prefix + "w"] = self.weight if keep_vars else self.weight.detach()

        module.append(Saves(1, 1))

    def extra(module):
        class Extra(nn.Linear):
            def get_extra_state(self):
                return torch.zeros(1)

        module.append(Extra(1, 1))

    def skipped(module):
        module[0].register_buffer("no", torch.zeros(1), persistent=False)
        module[0].register_buffer("yes", torch.zeros(1))
        module[0].register_buffer("none", None)
        module[0].register_parameter("nothing", None)
        module[0].register_module("empty", None)

    found = (post_hook, pre_hook, instance, subclass, extra, skipped)
    return {change.__name__: change for change in found}


@pytest.mark.parametrize("name", customised())
def test_a_walked_module_gives_what_its_state_dict_gives(name):
    module = net()
    customised()[name](module)
    names, values = capture_module(module)
    expected = module.state_dict(keep_vars=True)
    assert names == list(expected)
    assert [snapshot(value) for value in values] == [snapshot(value) for value in expected.values()]


def test_a_scripted_module_is_captured():
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(net())
    assert stored_names(scripted) == PLAIN
