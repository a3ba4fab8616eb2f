"""Whoever writes to an overlapped tensor while it is copied: the bytes of `save()`, or TornSnapshotError. Never a third."""

import copy as copying
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asyncckpt.errors import TornSnapshotError
from asyncckpt.state import hook
from asyncckpt.state.snapshot import Copier
from tests.snapshots import PATIENCE_S, Moment, Rig, in_thread

Optimizer = torch.optim.Optimizer
WEIGHT = "model/0.weight"
STEP = "optimizer/state/#0/step"  # versions are looked at first, and this one always rises


class BehindStep:
    """Give it to `Copier(before_copy=)`: copies only after a step began, and late enough for one that was not held."""

    def __init__(self) -> None:
        import threading

        self._begun, self._ended = threading.Event(), threading.Event()
        self._handles = [
            register_optimizer_step_pre_hook(lambda *_: self._begun.set()),  # older than ours, so ahead of it
            register_optimizer_step_post_hook(lambda *_: self._ended.set()),
        ]

    def __call__(self) -> None:
        assert self._begun.wait(PATIENCE_S)
        self._ended.wait(0.03)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.fixture
def behind_step() -> Iterator[BehindStep]:
    behind = BehindStep()
    yield behind
    behind.close()


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))


def make_trained(
    kind: Callable[..., Optimizer] = torch.optim.AdamW, **options: object
) -> tuple[torch.nn.Module, Optimizer]:
    model = make_model()
    optimizer = kind(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(lambda: 1.0)
    return model, optimizer


def weight_of(model: torch.nn.Module) -> torch.Tensor:
    return model[0].weight


def write_in_place(model: torch.nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        weight_of(model).add_(1)


def write_data(model: torch.nn.Module, optimizer: Optimizer) -> None:
    weight_of(model).data.mul_(2).add_(1)


def write_numpy(model: torch.nn.Module, optimizer: Optimizer) -> None:
    weight_of(model).detach().numpy()[...] += 1


def write_foreign_view(model: torch.nn.Module, optimizer: Optimizer) -> None:
    torch.from_numpy(weight_of(model).detach().numpy()).add_(1)  # same memory, another version counter


def swap_data(model: torch.nn.Module, optimizer: Optimizer) -> None:
    weight_of(model).data = torch.zeros(32, 32)


def swap_data_for_less(model: torch.nn.Module, optimizer: Optimizer) -> None:
    weight_of(model).data = torch.zeros(2)


def free_storage(model: torch.nn.Module, optimizer: Optimizer) -> None:
    weight_of(model).data = torch.empty(0)


def set_vector(model: torch.nn.Module, optimizer: Optimizer) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) + 1, model.parameters())


def load_model(model: torch.nn.Module, optimizer: Optimizer) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def load_model_by_assignment(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """New parameters: what was to be saved is left alone."""
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def load_optimizer(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """New state tensors likewise."""
    saved = copying.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].add_(1)
    optimizer.load_state_dict(saved)


def write_moment(model: torch.nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[weight_of(model)]["exp_avg"].zero_()


def step_fused_without_hooks(model: torch.nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["fused"] = True
    optimizer.param_groups[0]["foreach"] = False
    type(optimizer).step.__wrapped__(optimizer)


def step_by_hand(model: torch.nn.Module, optimizer: Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data -= 0.1 * parameter.grad


def clip(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Gradients are not part of the state."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.zero_grad()


TORN = [
    write_in_place, write_data, write_numpy, write_foreign_view, swap_data, swap_data_for_less, free_storage,
    set_vector, load_model, step_fused_without_hooks, step_by_hand,
]  # fmt: skip
HARMLESS = [load_model_by_assignment, load_optimizer, clip]


@pytest.mark.parametrize("write", TORN)
def test_a_write_behind_the_hook_tears_the_snapshot_and_names_the_tensor(write: Callable[..., None]) -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    assert moment.reached.wait(PATIENCE_S)
    write(model, optimizer)
    moment.pass_()
    rig.assert_torn(copy, WEIGHT, STEP)
    assert "overlap=False" in str(copy.error)
    assert "wait_staged()" in str(copy.error)
    copier.close()
    rig.close()


def test_a_write_to_a_moment_of_the_optimizer_names_it() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    write_moment(model, optimizer)
    moment.pass_()
    rig.assert_torn(copy, "optimizer/state/#0/exp_avg")
    copier.close()
    rig.close()


@pytest.mark.parametrize("act", HARMLESS)
def test_what_leaves_the_saved_tensors_alone_leaves_the_snapshot_exact(act: Callable[..., None]) -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    act(model, optimizer)
    moment.pass_()
    rig.assert_exact(copy)
    copier.close()
    rig.close()


@pytest.mark.parametrize("write", [*TORN, *HARMLESS, write_moment])
def test_any_write_after_an_eager_copy_leaves_it_exact(write: Callable[..., None]) -> None:
    copier = Copier()
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save(overlap=False)
    write(model, optimizer)
    rig.assert_exact(copy)
    rig.close()


@pytest.mark.parametrize("write", [*TORN, *HARMLESS, write_moment])
def test_any_write_after_waiting_for_an_overlapped_copy_leaves_it_exact(write: Callable[..., None]) -> None:
    copier = Copier()
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    copy.wait(PATIENCE_S)
    write(model, optimizer)
    rig.assert_exact(copy)
    copier.close()
    rig.close()


def step(model: torch.nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(lambda: 1.0)


def step_second(model: torch.nn.Module, optimizer: Optimizer) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def step_deep_copied(model: torch.nn.Module, optimizer: Optimizer) -> None:
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    copying.deepcopy(optimizer, parameters).step()


def step_in_a_thread(model: torch.nn.Module, optimizer: Optimizer) -> None:
    in_thread(optimizer.step).join(PATIENCE_S)


class Plain(Optimizer):
    """A user's own: writes `.data`, which no version tells."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-0.5)


STEPS: list[tuple[Callable[..., None], Callable[..., Optimizer], dict[str, object]]] = [
    (step, torch.optim.AdamW, {"fused": True}),
    (step, torch.optim.AdamW, {"foreach": True}),
    (step, torch.optim.AdamW, {"foreach": False}),
    (step, torch.optim.Adam, {"amsgrad": True}),
    (step, torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    (step, torch.optim.LBFGS, {}),
    (step, Plain, {}),
    (step_second, torch.optim.AdamW, {}),
    (step_deep_copied, torch.optim.AdamW, {}),
    (step_in_a_thread, torch.optim.AdamW, {}),
]


@pytest.mark.parametrize(("act", "kind", "options"), STEPS)
def test_an_optimizer_step_waits_for_the_copy_so_the_snapshot_is_exact(
    act: Callable[..., None], kind: Callable[..., Optimizer], options: dict[str, object], behind_step: BehindStep
) -> None:
    model, optimizer = make_trained(kind, **options)
    copier = Copier(before_copy=behind_step)
    behind_step._begun.clear()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    before = weight_of(model).detach().clone()
    copy = rig.save()
    act(model, optimizer)
    assert copy.done()
    rig.assert_exact(copy)
    assert copy.hook_wait_s > 0
    if kind is not torch.optim.LBFGS:
        assert not torch.equal(before, weight_of(model)), "the step has stepped"
    copier.close()
    rig.close()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_step_waits_for_the_copy_too() -> None:
    model, optimizer = make_trained()
    copier = Copier(before_copy=(moment := Moment()))
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    compiled = torch.compile(optimizer.step, backend="eager")
    compiled()
    copy = rig.save()
    stepper = in_thread(compiled)
    assert moment.reached.wait(PATIENCE_S)
    stepper.join(0.05)
    assert stepper.is_alive()
    moment.pass_()
    stepper.join(PATIENCE_S)
    rig.assert_exact(copy)
    assert copy.hook_wait_s > 0
    copier.close()
    rig.close()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_without_the_hook_the_same_steps_tear_the_snapshot(options: dict[str, object], behind_step: BehindStep) -> None:
    model, optimizer = make_trained(torch.optim.AdamW, **options)
    copier = Copier(before_copy=behind_step)
    behind_step._begun.clear()
    behind_step._ended.clear()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    handles = torch_optimizer._global_optimizer_pre_hooks
    ours = next(number for number, function in handles.items() if function is hook._before_step)
    del handles[ours]
    optimizer.step()
    rig.assert_torn(copy, WEIGHT, STEP)
    copier.close()
    rig.close()


def test_an_ema_module_beside_the_optimizer_may_be_updated_at_once() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = make_trained()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    rig = Rig({"model": model, "optimizer": optimizer, "ema": ema}, copier)
    copy = rig.save()
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(1)
    ema.update_parameters(model)
    moment.pass_()
    rig.assert_exact(copy)
    copier.close()
    rig.close()


def test_a_torn_snapshot_spoils_only_itself() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = make_trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    torn = rig.save()
    write_data(model, optimizer)
    moment.pass_()
    rig.assert_torn(torn, WEIGHT)
    rig.assert_exact(rig.save())
    optimizer.step()
    rig.assert_exact(rig.save(overlap=False))
    copier.close()
    rig.close()


def test_an_eager_copy_that_another_thread_writes_into_is_torn_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.zeros(1000) for i in range(50)}
    copier = Copier()
    rig = Rig({"model": tensors}, copier)
    copy_all = torch._foreach_copy_

    def write_meanwhile(targets: Any, sources: Any, **options: Any) -> None:
        writer = threading.Thread(target=lambda: [tensor.data.fill_(1.0) for tensor in tensors.values()])
        copy_all(targets[:25], sources[:25], **options)
        writer.start()
        writer.join()
        copy_all(targets[25:], sources[25:], **options)

    monkeypatch.setattr(torch, "_foreach_copy_", write_meanwhile)
    copy = rig.save(overlap=False)
    assert isinstance(copy.error, TornSnapshotError)
    assert copy.done()
    monkeypatch.undo()
    rig.assert_exact(rig.save(overlap=False))
    rig.close()
    copier.close()
