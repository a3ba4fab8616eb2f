"""Who wants this host's cores, at this moment."""

import os

_LINE_BYTES = 512  # of what is read here: a line of at most some 350 letters


def runnable_threads() -> int:
    """How many threads of this host run or want to, the asking one included. `OSError` where the kernel does not say."""
    return parse_runnable(_line("/proc/loadavg").decode())


def runnable_threads_of(pid: int) -> int:
    """How many threads of this process run or want to. `OSError` where it ended, or one of them did meanwhile."""
    folder = f"/proc/{pid}/task"
    # the state is the first word behind the name, which may hold anything
    states = (_line(f"{folder}/{tid}/stat").rpartition(b")")[2].split(None, 1)[0] for tid in os.listdir(folder))  # noqa: PTH208
    return sum(state == b"R" for state in states)


def parse_runnable(loadavg: str) -> int:
    """The same, from what `/proc/loadavg` says. `ValueError` or `IndexError` if it says nothing of it."""
    return int(loadavg.split()[3].partition("/")[0])


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except OSError:  # the kernel does not say
        return os.cpu_count() or 1


def _line(path: str) -> bytes:
    """Without a file object and a path object: the service asks a thousand times a second while a snapshot is taken."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, _LINE_BYTES)
    finally:
        os.close(descriptor)
