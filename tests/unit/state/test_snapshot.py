import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from asyncckpt.engine.arena import Arena, read_counter
from asyncckpt.errors import ForkedSaverError, SnapshotError, UnsupportedTensorError
from asyncckpt.format.plan import Group, Structure, TensorSpec, plan
from asyncckpt.state import hook
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.parts import MarkPlaces, Part, shows_stores_in_order
from asyncckpt.state.snapshot import Copier
from tests.snapshots import PATIENCE_S, Moment, Rig, in_thread

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.complex32, torch.float4_e2m1fn_x2,
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test closes what it opened: no thread, no hook, nothing in flight."""
    gc.collect()  # what other tests dropped ends now
    before = dict(torch_optimizer._global_optimizer_pre_hooks)
    threads = set(threading.enumerate())
    yield
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    assert dict(torch_optimizer._global_optimizer_pre_hooks) == before
    assert hook.gate.in_flight() == ()


@pytest.fixture
def copier() -> Iterator[Copier]:
    copier = Copier()
    yield copier
    copier.close()


def trained(width: int = 8) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def random_bytes(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Any bit pattern, NaN payloads too (bool: 0 and 1 only)."""
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), dtype=torch.uint8).view(torch.bool)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_every_dtype_is_copied_bit_by_bit_whatever_its_layout(
    dtype: torch.dtype, overlap: bool, copier: Copier
) -> None:
    flat = random_bytes(dtype, 60)
    state = {
        "flat": flat,
        "matrix": flat.view(6, 10).clone(),
        "transposed": flat.view(6, 10).t(),
        "strided": flat[1::3],
        "expanded": flat[:5].expand(4, 5),
        "shifted": flat[1:],
        "scalar": flat[7],
        "empty": flat[:0],
        "empty matrix": flat[:0].view(3, 0),
    }
    rig = Rig(state, copier)
    rig.assert_exact(rig.save(overlap=overlap))
    rig.close()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded", "shifted", "scalar"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128], ids=str
)
def test_optimizer_state_of_any_layout_is_overlapped_and_exact(layout: str, dtype: torch.dtype, copier: Copier) -> None:
    data = torch.randn(2 * 6 * 4 * 4 + 1).to(dtype)
    whole = data[:-1].view(2, 6, 4, 4)
    value = {
        "contiguous": whole,
        "channels_last": whole.to(memory_format=torch.channels_last),
        "transposed": whole.transpose(0, 3),
        "expanded": whole[0, 0].expand(3, 4, 4),
        "shifted": data[1:],
        "scalar": data[3],
    }[layout]
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter]["value"] = value
    rig = Rig({"optimizer": optimizer}, copier)
    assert any(rig.flat.overlappable)
    for _ in range(20):  # another word each time
        rig.assert_exact(rig.save())
    rig.close()


def test_one_call_copies_in_the_order_of_its_list() -> None:
    # the arena's counter stands between the tensors of the list, and says that those before it are copied
    targets = [torch.zeros(3), torch.zeros(1, dtype=torch.int64), torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
    sources = [torch.ones(3), torch.tensor([1]), torch.ones(5), torch.tensor([2])]  # the third does not fit
    with pytest.raises(RuntimeError):
        torch._foreach_copy_(targets, sources)
    assert [int(target.sum()) for target in targets] == [3, 1, 0, 0]


@pytest.mark.skipif(not shows_stores_in_order(), reason="this processor may show stores out of order")
def test_the_arenas_counter_says_how_many_shards_are_filled(copier: Copier) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    rig.plan = plan(rig.flat.structure, codec="none", shard_bytes=600)
    rig.arena.close()
    rig.arena = Arena.create(1, rig.plan.arena_bytes)
    assert len(rig.plan.shards) == 3
    assert rig.arena.fd is not None
    seen: list[int] = []
    for _ in range(3):
        copy = rig.save(begins=lambda: seen.append(read_counter(rig.arena.fd, rig.arena.bytes)))
        rig.assert_exact(copy)
        assert seen.pop() == 0
        assert read_counter(rig.arena.fd, rig.arena.bytes) == len(rig.plan.shards)
    rig.close()


@pytest.mark.skipif(not shows_stores_in_order(), reason="this processor may show stores out of order")
def test_a_shard_counts_as_filled_behind_the_last_of_its_tensors_whatever_order_they_are_copied_in() -> None:
    structure = Structure(
        (Group("m", "m"),), tuple(TensorSpec(0, f"t{n}", "float32", (100,)) for n in range(6)), (), {"dict": {}}
    )
    layout = plan(structure, codec="none", shard_bytes=800)  # two tensors in each of three shards
    places = MarkPlaces()

    def marks(*later: int) -> list[tuple[int, int]]:
        return [(behind, int(count)) for behind, count in places.of(layout, Part(later))]

    assert marks(0, 1, 2, 3, 4, 5) == [(2, 1), (4, 2), (6, 3)]
    assert marks(5, 4, 3, 2, 1, 0) == [(6, 3)]
    assert marks(1, 3, 5) == [(1, 1), (2, 2), (3, 3)]  # the others were copied at once
    assert marks(4, 5) == [(0, 2), (2, 3)]
    assert marks(2, 0) == [(2, 3)]


def test_eager_copy_is_complete_when_it_returns_and_makes_no_thread(copier: Copier) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    threads = threading.active_count()
    copy = rig.save(overlap=False)
    assert copy.done()
    assert rig.then == [copy]
    assert threading.active_count() == threads
    optimizer.step()
    rig.assert_exact(copy)
    rig.close()


def test_overlapped_copy_returns_before_it_is_complete_and_a_step_waits_for_it() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    assert not copy.done()
    stepper = in_thread(optimizer.step)
    assert moment.reached.wait(PATIENCE_S)
    stepper.join(0.05)
    assert stepper.is_alive()
    moment.pass_()
    stepper.join(PATIENCE_S)
    assert not stepper.is_alive()
    rig.assert_exact(copy)
    assert copy.hook_wait_s > 0.0
    assert rig.then == [copy]
    copier.close()
    rig.close()


def test_what_is_not_the_optimizers_is_copied_before_an_overlapped_copy_returns() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        frozen = torch.randn(5)
    rig = Rig({"model": model, "optimizer": optimizer, "ema": ema, "frozen": frozen}, copier)
    copy = rig.save()
    for value in ema.values():
        value.add_(1)
    with torch.inference_mode():
        frozen.add_(1)
    model[1].running_mean.zero_()  # a buffer, changed by forward()
    moment.pass_()
    rig.assert_exact(copy)
    copier.close()
    rig.close()


def test_steps_right_behind_a_thousand_saves_never_reach_a_snapshot(copier: Copier) -> None:
    torch.manual_seed(1)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    for _ in range(1000):
        copy = rig.save()
        optimizer.step()
        rig.assert_exact(copy)
    rig.close()


def test_a_copy_leaves_parameters_gradients_and_versions_alone(copier: Copier) -> None:
    model, optimizer = trained()
    parameters = list(model.parameters())
    before = [(p._version, p.data_ptr(), p.grad, p.grad.clone(), p.requires_grad) for p in parameters]
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    rig.assert_exact(rig.save())
    for p, (version, address, grad, value, requires_grad) in zip(parameters, before, strict=True):
        assert (p._version, p.data_ptr(), p.requires_grad) == (version, address, requires_grad)
        assert p.is_leaf
        assert p.grad is grad
        assert torch.equal(grad, value)
    rig.close()


def test_saving_inside_inference_mode_works_and_so_does_the_next_save_outside(copier: Copier) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    with torch.inference_mode():
        rig.assert_exact(rig.save())
    rig.assert_exact(rig.save())
    rig.close()


def test_two_copies_in_flight_are_both_waited_for() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    state = {"model": model, "optimizer": optimizer}
    first, second = Rig(state, copier), Rig(state, copier)
    copies = first.save(), second.save()
    assert len(hook.gate.in_flight()) == 2
    moment.pass_()
    optimizer.step()
    assert [copy.done() for copy in copies] == [True, True]
    first.assert_exact(copies[0])
    second.assert_exact(copies[1])
    copier.close()
    first.close()
    second.close()


def test_a_failing_copy_ends_with_its_error_and_lets_the_step_pass() -> None:
    def break_down() -> None:
        raise MemoryError("boom")

    copier = Copier(before_copy=break_down)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    optimizer.step()
    copy.wait(PATIENCE_S)
    assert type(copy.error) is SnapshotError
    assert isinstance(copy.error.__cause__, MemoryError)
    assert "boom" in str(copy.error)
    copier.close()
    assert rig.then == [copy]
    rig.close()


def test_a_step_on_the_copy_thread_itself_does_not_deadlock() -> None:
    model, optimizer = trained()
    copier = Copier(before_copy=optimizer.step)
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    copy.wait(PATIENCE_S)
    assert copy.error is not None  # it wrote behind the hook
    copier.close()
    rig.close()


def test_an_exception_in_what_follows_is_logged_and_the_thread_lives_on(
    copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    followed = threading.Event()

    def fail(copy: Copy) -> None:
        followed.set()
        raise ValueError("follower")

    with caplog.at_level(logging.ERROR, "asyncckpt"):
        copier.copy(rig.flat, rig.plan, rig.arena, overlap=True, started_s=0.0, then=fail)
        assert followed.wait(PATIENCE_S)
        rig.assert_exact(rig.save())
    assert "follower" in caplog.text
    rig.close()


def test_waiting_has_a_timeout_and_the_copy_goes_on() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    with pytest.raises(TimeoutError, match="not complete"):
        copy.wait(0.01)
    moment.pass_()
    rig.assert_exact(copy)
    copier.close()
    rig.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_finished_copy_keeps_no_state_in_memory(fails: bool) -> None:
    def maybe() -> None:
        if fails:
            raise RuntimeError("boom")

    copier = Copier(before_copy=maybe)
    model, optimizer = trained()
    weight = weakref.ref(model[0].weight)
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    copy.wait(PATIENCE_S)
    copier.close()
    arena = rig.arena
    del model, optimizer, rig
    gc.collect()
    assert weight() is None
    assert (copy.error is not None) == fails
    arena.close()


def test_forgetting_an_arena_waits_for_the_copy_into_it_and_drops_its_views() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    forgetter = in_thread(lambda: copier.forget(rig.arena))
    assert moment.reached.wait(PATIENCE_S)
    forgetter.join(0.02)
    assert forgetter.is_alive()
    moment.pass_()
    forgetter.join(PATIENCE_S)
    assert copy.done()
    assert copier._views.arenas() == []
    rig.arena.close()
    copier.close()


def test_an_arena_is_viewed_again_after_another_plan_and_after_forgetting(copier: Copier) -> None:
    model, optimizer = trained()
    one = Rig({"model": model, "optimizer": optimizer}, copier)
    other = Rig({"model": model}, copier)
    other.arena.close()
    other.arena = one.arena
    copier.prepare(one.plan, one.arena)
    one.assert_exact(one.save())
    other.assert_exact(other.save())
    one.assert_exact(one.save())
    copier.forget(one.arena)
    one.assert_exact(one.save())
    one.close()


def test_an_arena_that_is_too_small_is_refused(copier: Copier) -> None:
    rig = Rig({"x": torch.zeros(10_000)}, copier)
    small = Arena.create(1, 4096)
    with pytest.raises(ValueError, match="the arena has 4096"):
        copier.copy(rig.flat, rig.plan, small, overlap=False, started_s=0.0, then=rig.then.append)
    small.close()
    rig.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_copy_that_fails_before_it_returns_raises_and_nothing_follows(
    overlap: bool, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        raise RuntimeError("no memory left")

    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    monkeypatch.setattr(torch, "_foreach_copy_", refuse)
    with pytest.raises(SnapshotError, match="no memory left") as raised:
        rig.save(overlap=overlap)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert rig.then == []
    monkeypatch.undo()
    rig.assert_exact(rig.save(overlap=overlap))
    rig.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_freed_storage_is_refused_by_its_path_instead_of_read(overlap: bool, copier: Copier) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    model[2].weight.untyped_storage().resize_(0)
    flat = rig._flattener.flatten(rig.state)
    with pytest.raises(UnsupportedTensorError, match=r"model/2\.weight"):
        copier.copy(flat, rig.plan, rig.arena, overlap=overlap, started_s=0.0, then=rig.then.append)
    assert rig.then == []
    rig.close()


def test_a_closed_copier_refuses_and_closing_twice_is_fine(copier: Copier) -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    rig.assert_exact(rig.save())
    copier.close()
    copier.close()
    with pytest.raises(RuntimeError, match="closed"):
        rig.save()
    rig.close()


def test_close_finishes_the_copies_in_flight() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    closer = in_thread(copier.close)
    moment.pass_()
    closer.join(PATIENCE_S)
    assert rig.then == [copy]
    rig.assert_exact(copy)
    rig.close()


def test_the_hook_stays_until_the_last_copier_closes() -> None:
    model, optimizer = trained()
    rigs = [Rig({"model": model, "optimizer": optimizer}, Copier()) for _ in range(2)]
    for rig in rigs:
        assert hook._before_step not in torch_optimizer._global_optimizer_pre_hooks.values() or rig is rigs[1]
        rig.assert_exact(rig.save())
    rigs[0].copier.close()
    assert list(torch_optimizer._global_optimizer_pre_hooks.values()) == [hook._before_step]
    rigs[1].copier.close()
    for rig in rigs:
        rig.close()


def test_a_copier_that_is_dropped_takes_its_thread_and_hook_along() -> None:
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, Copier())
    rig.assert_exact(rig.save())
    arena = rig.arena
    del rig
    gc.collect()
    arena.close()  # `nothing_left` looks for the rest


def test_the_hook_costs_less_than_two_microseconds_when_nothing_is_in_flight() -> None:
    costs_s = []
    for _ in range(20):
        began_s = time.perf_counter()
        for _ in range(1000):
            hook._before_step(None, (), {})
        costs_s.append((time.perf_counter() - began_s) / 1000)
    assert min(costs_s) < 2e-6


def test_without_a_thread_to_be_had_the_copy_is_made_at_once(monkeypatch: pytest.MonkeyPatch, copier: Copier) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    copy = rig.save()
    assert copy.done()
    rig.assert_exact(copy)
    rig.close()


def test_a_forked_child_steps_without_waiting_and_cannot_use_the_copier() -> None:
    moment = Moment()
    copier = Copier(before_copy=moment)
    model, optimizer = trained()
    rig = Rig({"model": model, "optimizer": optimizer}, copier)
    copy = rig.save()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12: fork beside threads is what is tested
        child = os.fork()
    if child == 0:
        status = 1
        try:
            hook._before_step(optimizer, (), {})
            copy.wait(1.0)
            assert isinstance(copy.error, SnapshotError)
            try:
                copier.copy(rig.flat, rig.plan, rig.arena, overlap=True, started_s=0.0, then=rig.then.append)
            except ForkedSaverError:
                copier.close()
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    moment.pass_()
    optimizer.step()
    rig.assert_exact(copy)
    copier.close()
    rig.close()


def test_an_interpreter_that_exits_during_a_copy_finishes_it_and_exits_cleanly() -> None:
    script = """
        import time, torch
        from asyncckpt.state.snapshot import Copier
        from tests.snapshots import Rig
        parameter = torch.nn.Parameter(torch.zeros(4_000_000))
        optimizer = torch.optim.SGD([parameter])
        rig = Rig({"p": parameter, "optimizer": optimizer}, Copier(before_copy=lambda: time.sleep(0.05)))
        rig.copier.copy(rig.flat, rig.plan, rig.arena, overlap=True, started_s=0.0, then=lambda copy: print(copy.error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "None", "")
