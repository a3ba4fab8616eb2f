"""What memory costs: copying, reading, and making pages."""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.engine.fetch import anonymous_map
from asyncckpt.format.plan import Plan
from asyncckpt.state.parts import Views
from benchmarks.stages.base import Bench, Stage, torch_threads

GROUP = "Memory"
_WRITE_BYTES = 4 * 2**20


def measure(bench: Bench, source: torch.Tensor) -> dict[str, Stage]:
    """Stages by their short names. `source`: as many bytes as the state has."""
    size = source.nbytes
    words = source.numpy()[: size // 8 * 8].view(np.uint64)
    found = {
        "memcpy": _memcpy(bench, source),
        "read": bench.stage(GROUP, "read, one thread", words.max, state_bytes=size),
    }
    memcpy = found["memcpy"].as_limit()
    for short, name, make, touch, drop in _pages(bench.folder / "pages", source):
        elapsed_s, cpu_s = bench.time(touch, make, drop)
        found[short] = Stage(GROUP, name, size, size, elapsed_s, cpu_s, memcpy if short == "tmpfs" else None)
    return found


def _memcpy(bench: Bench, source: torch.Tensor) -> Stage:
    target = torch.zeros_like(source)
    copy = lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)  # noqa: E731
    return bench.stage(GROUP, "memcpy, one thread, pages there", copy, state_bytes=source.nbytes)


def snapshot(bench: Bench, tensors: Sequence[torch.Tensor], plan: Plan, arena: Arena, memcpy: Stage) -> list[Stage]:
    """The copy of all tensors into an arena whose pages are there, as the copy thread makes it. Leaves them in it."""
    views = Views()
    targets = views.of(arena, plan)
    found = []
    with torch.no_grad():
        for threads in torch_threads():
            name = f"copy into the arena, {threads} torch thread{'s'[: threads - 1]}"
            limit = memcpy.as_limit()
            copy: Callable[[], object] = lambda: torch._foreach_copy_(targets, list(tensors))  # noqa: E731
            found.append(bench.stage(GROUP, name, copy, state_bytes=plan.data_bytes, limit=limit))
    views.forget(arena)
    return found


def _pages(path: Path, source: torch.Tensor):
    """Short name, name, and how to make, touch and drop memory without pages."""
    size = source.nbytes
    data = memoryview(source.numpy())

    def touch(memory: memoryview | mmap.mmap) -> None:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1

    def write(file) -> None:
        for start in range(0, size, _WRITE_BYTES):
            file.write(data[start : start + _WRITE_BYTES])

    def unlink(file) -> None:
        file.close()
        path.unlink()

    def small_pages() -> mmap.mmap:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        return memory

    nothing = lambda _: None  # noqa: E731 - freed with its last name
    return [
        ("small", f"new pages, anonymous, {mmap.PAGESIZE // 1024} KiB each", small_pages, touch, nothing),
        ("huge", "new pages, anonymous, huge where the kernel has them", lambda: anonymous_map(size), touch, nothing),
        ("memfd", "new pages, memory file (the arena)", lambda: Arena.create(0, size), Arena.touch, Arena.close),
        ("tmpfs", "write to a new file on tmpfs", lambda: path.open("wb", buffering=0), write, unlink),
    ]
