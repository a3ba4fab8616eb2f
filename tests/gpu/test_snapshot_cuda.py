"""Snapshots of CUDA tensors. Imports only what these tests need: the format's and the stores' libraries may be missing."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import SnapshotError, TornSnapshotError
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.sight import Sight
from asyncckpt.state.snapshot import Copier

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATIENCE_S = 60.0
ALIGN_BYTES = 64


@dataclass(frozen=True)
class Spec:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    tensors: tuple[Spec, ...]

    def path(self, tensor: int) -> str:
        return f"tensor {tensor}"


@dataclass(frozen=True)
class Plan:
    structure: Structure
    tensor_offsets: tuple[int, ...]
    arena_bytes: int


@dataclass(frozen=True)
class Flat:
    structure: Structure
    tensors: tuple[torch.Tensor, ...]
    overlappable: tuple[bool, ...]

    @property
    def sight(self) -> Sight:
        return Sight.of(self.tensors)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Rig:
    """Tensors with a plan and an arena. `owned`: written by optimizer steps only; `others`: by anybody."""

    opened: ClassVar[list["Rig"]] = []

    def __init__(self, owned: Sequence[torch.Tensor], others: Sequence[torch.Tensor] = (), **options: Any) -> None:
        self.tensors = (*owned, *others)
        structure = Structure(tuple(Spec(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in self.tensors))
        offsets = [0]
        for tensor in self.tensors:
            offsets.append(-(-(offsets[-1] + tensor.nbytes) // ALIGN_BYTES) * ALIGN_BYTES)
        self.plan: Any = Plan(structure, tuple(offsets[:-1]), -(-max(offsets[-1], 1) // 4096) * 4096)
        self.flat: Any = Flat(structure, self.tensors, (True,) * len(owned) + (False,) * len(others))
        self.copier = Copier(**options)
        self.arena = Arena.create(0, self.plan.arena_bytes)
        self.expected: list[bytes] = []
        self.opened.append(self)

    def save(self, *, overlap: bool = True) -> Copy:
        self.expected = [raw(tensor) for tensor in self.tensors]
        return self.save_unread(overlap=overlap)

    def save_unread(self, *, overlap: bool = True) -> Copy:
        """Without reading what is expected, which would wait for the device."""
        began_s = time.perf_counter()
        return self.copier.copy(
            self.flat, self.plan, self.arena, overlap=overlap, started_s=began_s, then=lambda copy: None
        )

    def assert_exact(self, copy: Copy) -> None:
        copy.wait(PATIENCE_S)
        assert copy.error is None
        for offset, expected in zip(self.plan.tensor_offsets, self.expected, strict=True):
            assert self.arena.buffer[offset : offset + len(expected)] == expected

    def close(self) -> None:
        self.copier.close()
        self.copier.forget(self.arena)
        self.arena.close()


def trained(kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> tuple[Any, Any, Rig]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)).cuda()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return model, optimizer, Rig([*model.parameters(), *state])


def busy_s(seconds: float) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(int(seconds * 1.5e9))  # cycles


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    while Rig.opened:  # a test that failed must not fail the next one
        Rig.opened.pop().close()
    torch.cuda.synchronize()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncckpt")] == []


DTYPES = [
    torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_comes_from_the_device_bit_by_bit(dtype: torch.dtype, overlap: bool) -> None:
    top = 2 if dtype is torch.bool else 256
    data = torch.randint(0, top, (240 * dtype.itemsize,), dtype=torch.uint8, device="cuda").view(dtype)
    owned = [
        data, data.view(12, 20).t(), data[1::3], data[1:], data[:5].expand(4, 5), data[7], data[:0],
        data.view(2, 3, 5, 8).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    rig = Rig(owned, [data.clone(), data.view(12, 20).clone().t()])
    for _ in range(3):
        rig.assert_exact(rig.save(overlap=overlap))


def test_the_arena_is_page_locked_once_and_unlocked_when_forgotten() -> None:
    _, _, rig = trained()
    rig.assert_exact(rig.save())
    view = rig.copier._views.of(rig.arena, rig.plan)[0]
    assert view.is_pinned()
    rig.assert_exact(rig.save())
    rig.copier.forget(rig.arena)
    assert not view.is_pinned()
    rig.copier.prepare(rig.plan, rig.arena, torch.device("cuda", 0))
    assert rig.copier._views.of(rig.arena, rig.plan)[0].is_pinned()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_rank_on_the_second_device_makes_no_context_on_the_first(tmp_path: Path) -> None:
    script = """
        import sys, torch, asyncckpt
        torch.cuda.set_device(1)
        model = torch.nn.Linear(64, 64).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 64, device="cuda")).sum().backward()
        optimizer.step()
        state = {"model": model, "optimizer": optimizer}
        with asyncckpt.Saver(sys.argv[1]) as saver:
            saver.prepare(state)
            saver.save(1, state)
            optimizer.step()
            saver.wait()
        assert not torch._C._cuda_hasPrimaryContext(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], check=True, timeout=PATIENCE_S)


def test_memory_that_cannot_be_page_locked_is_used_as_it_is_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
            return 2  # cudaErrorMemoryAllocation

    _, optimizer, rig = trained()
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    for _ in range(2):
        copy = rig.save()
        optimizer.step()
        rig.assert_exact(copy)
    assert len([record for record in caplog.records if "page-lock" in record.message]) == 1
    monkeypatch.undo()  # before the rig is closed


def test_a_real_failure_to_page_lock_leaves_no_error_for_the_next_kernel() -> None:
    rig = Rig([torch.randn(100, device="cuda")])
    twin = Copier()
    twin._pins.pin(rig.arena, torch.device("cuda", 0))
    rig.copier._pins.pin(rig.arena, torch.device("cuda", 0))  # registered already: refused by the driver
    torch.ones(10, device="cuda").add_(1)
    torch.cuda.synchronize()
    rig.assert_exact(rig.save())
    twin.forget(rig.arena)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_a_step_right_behind_the_save_never_reaches_the_snapshot(options: dict[str, Any]) -> None:
    model, optimizer, rig = trained(**options)
    for _ in range(200):
        copy = rig.save()
        optimizer.step()
        rig.assert_exact(copy)
    assert torch.isfinite(model[0].weight).all()


def test_neither_save_nor_step_makes_the_host_wait_for_the_device() -> None:
    _, optimizer, rig = trained(fused=True)
    rig.assert_exact(rig.save())
    rig.expected = [raw(tensor) for tensor in rig.tensors]
    torch.cuda.synchronize()
    busy_s(1.0)  # the device is behind: the copy cannot begin
    began_s = time.perf_counter()
    copy = rig.save_unread()
    optimizer.step()
    assert time.perf_counter() - began_s < 0.3
    assert not copy.done()
    torch.cuda.synchronize()
    rig.assert_exact(copy)


def test_an_eager_copy_is_complete_when_it_returns() -> None:
    model, optimizer, rig = trained()
    rig.expected = [raw(tensor) for tensor in rig.tensors]
    busy_s(0.2)
    copy = rig.save_unread(overlap=False)
    assert copy.done()
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer.step()
    torch.cuda.synchronize()
    rig.assert_exact(copy)


def test_buffers_and_host_tensors_may_change_as_soon_as_an_overlapped_save_returns() -> None:
    parameter = torch.nn.Parameter(torch.randn(1 << 22, device="cuda"))
    buffer = torch.randn(1 << 22, device="cuda")
    count = torch.zeros(())
    rig = Rig([parameter, count], [buffer])
    for _ in range(20):
        copy = rig.save()
        buffer.add_(1)
        buffer.data.mul_(2)
        count.add_(1)
        rig.assert_exact(copy)


def test_the_copy_sees_what_the_callers_stream_wrote_before_the_save() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    rig = Rig([parameter])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        busy_s(0.1)
        parameter.add_(1)
        copy = rig.save_unread()
    rig.expected = [raw(torch.ones(1 << 20))]
    rig.assert_exact(copy)


def test_memory_of_sources_that_are_dropped_is_not_given_to_others_before_it_is_copied() -> None:
    for _ in range(10):
        rig = Rig([torch.randn(1 << 20, device="cuda") for _ in range(8)])
        rig.expected = [raw(tensor) for tensor in rig.tensors]
        torch.cuda.synchronize()
        busy_s(0.05)
        copy = rig.save_unread()
        rig.tensors = rig.flat = ()
        others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(8)]
        rig.assert_exact(copy)
        del others


def test_an_in_place_write_before_the_hook_tears_the_snapshot() -> None:
    model, optimizer, rig = trained()
    copy = rig.save()
    with torch.no_grad():
        model[0].weight.add_(1)
    optimizer.step()
    copy.wait(PATIENCE_S)
    # found at the hook, unless the copy was complete before the write
    if copy.error is None:
        rig.assert_exact(copy)
    else:
        assert isinstance(copy.error, TornSnapshotError)
        assert copy.error.key == "tensor 0"


def test_a_swapped_storage_is_torn_or_exact_and_never_a_crash() -> None:
    model, _, rig = trained()
    for _ in range(50):
        copy = rig.save()
        model[0].weight.data = torch.randn(256, 256, device="cuda")
        copy.wait(PATIENCE_S)
        if copy.error is None:
            rig.assert_exact(copy)
        else:
            assert isinstance(copy.error, TornSnapshotError)


def test_saving_inside_a_capture_is_refused_and_a_captured_step_is_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], capturable=True)
    parameter.grad = torch.ones_like(parameter)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(warm)
    rig = Rig([parameter, *optimizer.state[parameter].values()])
    rig.assert_exact(rig.save())
    refused = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
        try:
            rig.save_unread()
        except SnapshotError as error:
            refused.append(str(error))
    assert "CUDA graph" in refused[0]
    graph.replay()
    rig.assert_exact(rig.save())


def test_a_finished_copy_leaves_the_devices_memory_as_it_was() -> None:
    _, optimizer, rig = trained()
    rig.assert_exact(rig.save())
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        copy = rig.save()
        optimizer.step()
        rig.assert_exact(copy)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_two_devices_are_copied_by_a_lane_each() -> None:
    parameters = [torch.nn.Parameter(torch.randn(1 << 18, device=f"cuda:{i % 2}")) for i in range(6)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    rig = Rig(parameters)
    for _ in range(50):
        copy = rig.save()
        optimizer.step()
        rig.assert_exact(copy)
