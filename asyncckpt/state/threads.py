"""How many of torch's threads a copy behind the training loop may use: those that idle cores can run.

torch splits every large copy among all its threads and waits for the last. Beside a busy loop one of them shares the loop's
core, so the copy waits for the scheduler and the loop for the copy: 1 GB took 97 to 136 ms on two threads and 90 on one.
"""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

from asyncckpt.engine.cores import runnable_threads


def within_idle_cores() -> AbstractContextManager[Any]:
    """Limits the calling thread, no other, while it is entered. Where it cannot, it does not."""
    try:
        idle = idle_cores()
        return nullcontext() if idle >= torch.get_num_threads() else _openmp().limit(limits=idle)
    except Exception:  # noqa: BLE001 - a copy on more threads is slower, not wrong
        return nullcontext()


def idle_cores() -> int:
    """Cores of this host that nobody but the calling thread wants, at this moment; at least the one that it runs on."""
    cores = os.cpu_count() or 1
    try:
        runnable = runnable_threads()
    except (OSError, ValueError, IndexError):
        return cores
    return max(1, cores - (runnable - 1))


@functools.cache
def _openmp() -> Any:
    # its limit is omp_set_num_threads, which counts for the calling thread alone; torch.set_num_threads would be met by
    # every thread that starts meanwhile, and stay with it
    return ThreadpoolController().select(user_api="openmp")
