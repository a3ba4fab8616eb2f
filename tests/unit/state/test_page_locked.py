"""Page-locking around a restore, with a runtime that only notes what it is asked: `tests/gpu` has the real one."""

import contextlib
import mmap
from collections.abc import Iterator

import pytest
import torch

from asyncckpt.state import cuda
from asyncckpt.state.cuda import page_locked

DEVICE = torch.device("cuda", 0)
REFUSED = 2  # cudaErrorMemoryAllocation


class Runtime:
    """`code`: what locking answers."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.said: list[str] = []
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.said.append("lock")
        if self.code == 0:
            self.locked[address] = size_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.said.append("unlock")
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: runtime.said.append("synchronize"))
    monkeypatch.setattr(cuda, "_clear_last_error", lambda: runtime.said.append("clear"))
    yield runtime
    assert runtime.locked == {}


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, 10_000))


def test_memory_is_locked_meanwhile_and_unlocked_when_no_copy_is_left(runtime: Runtime, memory: memoryview) -> None:
    with page_locked(memory[:9_000], DEVICE):
        assert list(runtime.locked.values()) == [9_000]
    assert runtime.said == ["lock", "synchronize", "unlock"]


def test_memory_is_unlocked_when_the_restore_fails(runtime: Runtime, memory: memoryview) -> None:
    with pytest.raises(ZeroDivisionError), page_locked(memory, DEVICE):
        raise ZeroDivisionError
    assert runtime.said == ["lock", "synchronize", "unlock"]


def test_memory_is_unlocked_when_the_device_has_failed_and_the_restores_own_error_is_raised(
    runtime: Runtime, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(ZeroDivisionError), page_locked(memory, DEVICE):
        raise ZeroDivisionError
    assert runtime.said == ["lock", "unlock"]


def test_memory_is_unlocked_when_the_user_interrupts_the_wait(
    runtime: Runtime, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(KeyboardInterrupt), page_locked(memory, DEVICE):
        pass
    assert runtime.said == ["lock", "unlock"]


def test_a_runtime_that_refuses_leaves_no_error_and_the_restore_goes_on(runtime: Runtime, memory: memoryview) -> None:
    runtime.code = REFUSED
    done = False
    with page_locked(memory, DEVICE):
        done = True
    assert done
    assert runtime.said == ["lock", "clear"]


def test_a_restore_without_a_device_or_without_bytes_asks_the_runtime_nothing(
    runtime: Runtime, memory: memoryview
) -> None:
    with page_locked(memory, None), page_locked(memory[:0], DEVICE):
        pass
    assert runtime.said == []
