"""Whole saves and restores of states on a CUDA device, through the public surface, into real folders."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt
from asyncckpt import staging
from asyncckpt.events import Event, SaveCommitted
from asyncckpt.state.cuda import page_locked
from tests.processes import descendants, services

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 120.0


class Training:
    """A bf16 parameter beside fp32 ones, a tied weight, a buffer, dropout, loss scaling; the same bits in every run."""

    def __init__(self, *, seed: int = 0, device: str = "cuda", width: int = 256, **options: Any) -> None:
        torch.manual_seed(seed)
        self.device = device
        embed, head = nn.Embedding(64, width), nn.Linear(width, 64, bias=False)
        head.weight = embed.weight
        body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
        self.model = nn.Sequential(embed, body, nn.LayerNorm(width), head).to(device)
        self.model.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, **options)
        self.scale = nn.Parameter(torch.ones(width, dtype=torch.bfloat16, device=device))
        self.second = torch.optim.AdamW([self.scale], lr=1e-3, **options)  # the scaler takes no bf16
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scale": self.scale,
            "second": self.second,
            "scaler": self.scaler,
            "rng": asyncckpt.RNG(),
        }

    def step(self, count: int = 1) -> list[float]:
        return [self._step() for _ in range(count)]

    def _step(self) -> float:
        tokens = torch.randint(0, 64, (8, 32), device=self.device)
        embed, body, norm, head = self.model
        hidden = norm(body(embed(tokens)) * self.scale)
        loss = nn.functional.cross_entropy(head(hidden).flatten(0, 1), tokens.flatten())
        self.optimizer.zero_grad()
        self.second.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.second.step()
        self.scaler.update()
        self.model.seen += 1
        return loss.item()

    def bits(self) -> list[bytes]:
        tensors = [*self.model.state_dict().values(), self.scale]
        for held in [*self.optimizer.state.values(), *self.second.state.values()]:
            tensors += [held[name] for name in sorted(held)]
        return [raw(tensor) for tensor in tensors]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=before)


@pytest.mark.parametrize("codec", ["none", "planes", "zstd"])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, codec: Any, options: dict[str, Any]) -> None:
    first = Training(**options)
    first.step(3)
    with asyncckpt.Saver(tmp_path, codec=codec) as saver:
        saver.save(3, first.state)
        expected = first.step(5)  # training goes on while the snapshot is copied and stored
    second = Training(seed=7, **options)
    assert asyncckpt.restore(tmp_path, second.state).step == 3
    assert second.step(5) == expected
    assert second.bits() == first.bits()


def test_every_save_of_a_busy_run_is_the_state_at_its_call(tmp_path: Path) -> None:
    training, expected = Training(width=1024, fused=True), {}
    with asyncckpt.Saver(tmp_path) as saver:
        saver.prepare(training.state)
        for step in range(1, 21):
            training.step()
            expected[step] = training.bits()
            saver.save(step, training.state)
    for step, bits in expected.items():
        twin = Training(seed=step, width=1024, fused=True)
        asyncckpt.restore(tmp_path, twin.state, step=step)
        assert twin.bits() == bits


def test_restored_objects_are_where_they_were_and_hold_what_they_held(tmp_path: Path) -> None:
    training = Training(fused=True)
    training.step()
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, training.state)
    twin = Training(seed=3, fused=True)
    addresses = [parameter.data_ptr() for parameter in twin.model.parameters()]
    asyncckpt.restore(tmp_path, twin.state)
    assert [parameter.data_ptr() for parameter in twin.model.parameters()] == addresses
    assert all(parameter.is_cuda for parameter in twin.model.parameters())
    moments = [held["exp_avg"] for held in twin.optimizer.state.values()]
    assert moments
    assert all(moment.is_cuda for moment in moments)


def test_a_checkpoint_of_a_device_restores_on_the_host_and_back(tmp_path: Path) -> None:
    device = Training()
    device.step(2)
    parts = ("model", "optimizer", "scale", "second")
    with asyncckpt.Saver(tmp_path / "device") as saver:
        saver.save(2, {name: device.state[name] for name in parts})
    host = Training(seed=5, device="cpu")
    asyncckpt.restore(tmp_path / "device", {name: host.state[name] for name in parts})
    assert host.bits() == device.bits()
    with asyncckpt.Saver(tmp_path / "host") as saver:
        saver.save(2, {name: host.state[name] for name in parts})
    again = Training(seed=6)
    asyncckpt.restore(tmp_path / "host", {name: again.state[name] for name in parts})
    assert again.bits() == device.bits()


def test_a_restore_reads_from_page_locked_memory_and_unlocks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(width=1024)
    training.step()
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, training.state)
    seen = []

    @contextmanager
    def watched(memory: memoryview, device: torch.device | None) -> Iterator[None]:
        view = torch.frombuffer(memory, dtype=torch.uint8)
        with page_locked(memory, device):
            seen.append(view.is_pinned())
            yield
        seen.append(view.is_pinned())

    monkeypatch.setattr(staging, "page_locked", watched)
    twin = Training(seed=2, width=1024)
    asyncckpt.restore(tmp_path, twin.state)
    assert seen == [True, False]
    assert twin.bits() == training.bits()


def test_a_restore_into_a_used_optimizer_keeps_its_tensors(tmp_path: Path) -> None:
    training = Training(fused=True)
    training.step(2)
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(2, training.state)
    expected = training.bits()
    addresses = [value.data_ptr() for held in training.optimizer.state.values() for value in held.values()]
    training.step(3)
    asyncckpt.restore(tmp_path, training.state)
    assert training.bits() == expected
    assert [value.data_ptr() for held in training.optimizer.state.values() for value in held.values()] == addresses


def test_moments_of_another_type_or_layout_than_their_parameters_are_exact(tmp_path: Path) -> None:
    """torch's own `load_state_dict` makes them bf16; and a fused step walks a parameter and its moments side by side."""

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Conv2d(8, 8, 3, device="cuda").to(memory_format=torch.channels_last)
        model.half_bias = nn.Parameter(torch.randn(100, device="cuda").bfloat16())
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = made(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = optimizer.state[model.half_bias]
    held["exp_avg"] = torch.randn(100, device="cuda")
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, {"model": model, "optimizer": optimizer})
    twin, restored = made(1)
    asyncckpt.restore(tmp_path, {"model": twin, "optimizer": restored})
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in optimizer.state[ours].items():
            found = restored.state[theirs][name]
            assert (found.dtype, raw(found), found.device) == (value.dtype, raw(value), value.device)
            assert found.shape != theirs.shape or found.stride() == theirs.stride()


def test_tensors_are_loaded_onto_the_device_that_is_asked_for(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(1000, device="cuda"),
        "b": torch.arange(7, device="cuda"),
        "c": torch.ones(3).bfloat16(),
    }
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, {"tensors": tensors})
    loaded = asyncckpt.load(tmp_path, map_location="cuda")["tensors"]
    assert all(tensor.is_cuda for tensor in loaded.values())
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: raw(t) for name, t in tensors.items()}


def test_saves_take_no_memory_of_the_device(tmp_path: Path) -> None:
    training = Training(width=1024)
    training.step(2)
    torch.cuda.synchronize()
    with asyncckpt.Saver(tmp_path, keep=[asyncckpt.KeepLast(1)]) as saver:
        saver.save(1, training.state).result()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in range(2, 12):
            saver.save(step, training.state)
        saver.wait()
        assert torch.cuda.max_memory_allocated() - before < 2**20


def test_save_returns_before_the_device_has_copied_and_the_report_says_what_it_took(tmp_path: Path) -> None:
    reports = []

    def on_event(event: Event) -> None:
        if isinstance(event, SaveCommitted):
            reports.append(event.report)

    model = nn.Linear(8192, 8192).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 8192, device="cuda")).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with asyncckpt.Saver(tmp_path, hooks=[on_event]) as saver:
        saver.prepare(state)
        saver.save(1, state).result()
        torch.cuda._sleep(int(0.5 * 1.5e9))  # half a second of other work on the stream
        began_s = time.perf_counter()
        save = saver.save(2, state)
        optimizer.step()
        assert time.perf_counter() - began_s < 0.2
        save.result()
    assert reports[1].raw_bytes >= 3 * 8192 * 8192 * 4
    assert reports[1].staged_s > 0.2


def test_the_service_never_opens_the_device(tmp_path: Path) -> None:
    """Each of its processes would take hundreds of MB of the device's memory for a context."""
    training = Training()
    training.step()
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, training.state).result()
        (service,) = services(os.getpid())
        seen: list[str] = []
        for pid in (service, *descendants(service)):
            with suppress(OSError):  # descriptors come and go
                seen += Path(f"/proc/{pid}/maps").read_text().splitlines()
                seen += [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        assert seen
        assert [line for line in seen if "libcuda" in line or "nvidia" in line] == []


def test_the_example_resumes_on_a_device_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")

    def losses(folder: str, *, steps: int, log: str) -> str:
        script = [sys.executable, "examples/train_gpt.py", "--device=cuda", "--save-every=5", f"--steps={steps}"]
        options = [f"--url={tmp_path / folder}", f"--log={tmp_path / log}"]
        subprocess.run([*script, *options], cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S)
        lines = (tmp_path / log).read_text().splitlines()
        return "".join(line for line in lines if line.startswith('{"step": 15,'))

    whole = losses("whole", steps=15, log="whole.jsonl")
    losses("parts", steps=10, log="first.jsonl")
    assert losses("parts", steps=15, log="second.jsonl") == whole
    assert whole
