"""Who wants this host's cores, at this moment."""

import os
from pathlib import Path


def runnable_threads() -> int:
    """How many threads of this host run or want to, the asking one included. `OSError` where the kernel does not say."""
    return parse_runnable(Path("/proc/loadavg").read_text())


def parse_runnable(loadavg: str) -> int:
    """The same, from what `/proc/loadavg` says. `ValueError` or `IndexError` if it says nothing of it."""
    return int(loadavg.split()[3].partition("/")[0])


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
