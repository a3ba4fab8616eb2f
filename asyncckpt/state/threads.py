"""How many of torch's threads a copy may use, behind the training loop or in a restore: those that idle cores can run.

torch splits every large copy among all its threads and waits for the last. Beside a busy loop one of them shares the loop's
core, so the copy waits for the scheduler and the loop for the copy: 1 GB took 97 to 136 ms on two threads and 90 on one.

All that is called here keeps the GIL (`PyDLL`): beside a main thread in pure Python each call that gives it away waits 5 ms to get it
back, and reading a file in the ordinary way gives it away three times.
"""

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

from asyncckpt.engine.cores import parse_runnable

_libc = ctypes.PyDLL(None)
_LOADAVG_BYTES = 128


@contextmanager
def within_idle_cores(reserved: int = 0) -> Iterator[None]:
    """Limits the calling thread, no other, while it is entered. Where it cannot, it does not.

    `reserved`: cores for threads that do not run at this moment but will, such as one that waits for the GIL.
    """
    limited: list[tuple[Any, int]] = []
    try:
        idle = max(1, idle_cores() - reserved)
        if idle < torch.get_num_threads():
            for library in _openmp():
                limited.append((library, library.omp_get_max_threads()))
                library.omp_set_num_threads(idle)
    except Exception:  # noqa: BLE001, S110 - a copy on more threads is slower, not wrong
        pass
    try:
        yield
    finally:
        for library, before in limited:
            library.omp_set_num_threads(before)


def idle_cores() -> int:
    """Cores of this host that nobody but the calling thread wants, at this moment; at least the one that it runs on."""
    cores = os.cpu_count() or 1
    try:
        runnable = parse_runnable(_loadavg())
    except (ValueError, IndexError):
        return cores
    return max(1, cores - (runnable - 1))


def _loadavg() -> str:
    descriptor = _libc.open(b"/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
    if descriptor < 0:
        return ""
    content = ctypes.create_string_buffer(_LOADAVG_BYTES)
    _libc.read(descriptor, content, _LOADAVG_BYTES - 1)
    _libc.close(descriptor)
    return content.value.decode("ascii")


def find_thread_pools() -> None:
    """Once, on the caller's thread: looking through the loaded libraries beside a busy loop took 0.3 s."""
    with suppress(Exception):  # then nothing is limited
        _openmp()


@functools.cache
def _openmp() -> Sequence[Any]:
    # omp_set_num_threads counts for the calling thread alone; torch.set_num_threads would be met by every thread that starts
    # meanwhile, and stay with it
    found = ThreadpoolController().select(user_api="openmp").lib_controllers
    return [ctypes.PyDLL(library.filepath) for library in found]
