"""What the kernel says of a process tree: memory, descriptors, threads, CPU time. And how many samples become one figure."""

import math
import mmap
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SHARED_FILES = ("/memfd:", "/dev/shm/torch_")  # asyncckpt's arena; torch's shared storages


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure: the median of its samples, and how far they went."""

    median: float
    min: float
    max: float
    samples: int

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max, "samples": self.samples}


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values), len(values))


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest sample that `percent` of all do not exceed; below 100 samples the 99th is the largest."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


# -- a process tree


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory of a process tree.

    `pss_bytes`: proportional set size, every shared page divided among the processes that map it. `unmapped_bytes`: pages of
    shared memory files that a descriptor of the tree keeps alive but nobody maps; no set size counts them.
    """

    pss_bytes: int
    unmapped_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.pss_bytes + self.unmapped_bytes


def tree(root: int | None = None, apart: Iterable[int] = ()) -> list[int]:
    """`root` (this process) and all its descendants, but those in `apart`."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root or os.getpid()]
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in apart]
    return found


def memory(pids: Sequence[int]) -> Memory:
    """Memory of these processes now.

    `unmapped_bytes` is, summed over the distinct shared memory files among their descriptors, the pages allocated to the file
    less the proportional share of it that these processes' maps account for already.
    """
    pss = sum(_rollup_pss(pid) for pid in pids)
    allocated: dict[int, int] = {}
    for pid in pids:
        allocated |= _shared_files(pid)
    mapped = dict.fromkeys(allocated, 0)
    if allocated:
        for pid in pids:
            for inode, share in _mapped_pss(pid):
                if inode in mapped:
                    mapped[inode] += share
    return Memory(pss, sum(max(0, size - mapped[inode]) for inode, size in allocated.items()))


def descriptors(pids: Sequence[int]) -> int:
    """Open file descriptors of all processes together."""
    return sum(_count(pid, "fd") for pid in pids)


def threads(pids: Sequence[int]) -> int:
    """Threads of all processes together."""
    return sum(_count(pid, "task") for pid in pids)


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds, user and system, that these processes and their ended children have used."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))) / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the command's name (state is 0, ppid 1, utime to cstime 11 to 14); [] if it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _rollup_pss(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _shared_files(pid: int) -> dict[int, int]:
    """Inode and allocated bytes of every shared memory file among the process's descriptors."""
    found = {}
    try:
        for entry in (_PROC / str(pid) / "fd").iterdir():
            try:
                if str(entry.readlink()).startswith(_SHARED_FILES):
                    status = entry.stat()
                    found[status.st_ino] = status.st_blocks * 512
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return {}
    return found


def _mapped_pss(pid: int) -> Iterable[tuple[int, int]]:
    """(inode, proportional bytes) of every map of a shared memory file."""
    try:
        lines = (_PROC / str(pid) / "smaps").read_text().splitlines()
    except OSError:
        return
    inode = 0
    for line in lines:
        fields = line.split()
        if not fields[0].endswith(":"):
            inode = int(fields[4]) if len(fields) > 5 and fields[5].startswith(_SHARED_FILES) else 0
        elif inode and fields[0] == "Pss:":
            yield inode, int(fields[1]) * 1024


def _count(pid: int, folder: str) -> int:
    try:
        return sum(1 for _ in (_PROC / str(pid) / folder).iterdir())
    except OSError:
        return 0


# -- the machine while a sample was taken


class Observer:
    """From `__init__` to `stop()`: elapsed seconds, CPU seconds of this process tree, and cores that strangers kept busy.

    `apart`: children that are no strangers but whose CPU seconds are not the saver's, such as the store's server.
    """

    def __init__(self, apart: Iterable[int] = ()) -> None:
        self._apart = list(apart)
        self._started_s = time.perf_counter()
        self._before = self._now()

    def stop(self) -> "Observed":
        elapsed_s = time.perf_counter() - self._started_s
        busy_s, all_s, apart_s = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return Observed(elapsed_s, all_s - apart_s, max(0.0, busy_s - all_s) / elapsed_s)

    def _now(self) -> tuple[float, float, float]:
        """CPU seconds of the machine, of the whole tree, and of those apart."""
        return _machine_busy_s(), cpu_s(tree()), cpu_s(self._apart)


@dataclass(frozen=True, slots=True)
class Observed:
    """`foreign_cores`: average number of cores that other processes (and a hypervisor's steal) took. Near 0 on a quiet machine."""

    elapsed_s: float
    cpu_s: float
    foreign_cores: float


def _machine_busy_s() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def available_bytes() -> int:
    """Memory that new allocations may take without swapping."""
    lines = (_PROC / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def touch(size_bytes: int) -> None:
    """Allocate, fill and free that much shared memory.

    A hypervisor that takes freed pages back at once makes the next who needs them pay: 2 s/GB where it is 0.3 otherwise. So
    everybody meets memory that the guest had in hand a moment ago.
    """
    block = bytes(1 << 20)
    with mmap.mmap(-1, max(size_bytes, 1)) as memory_map:
        while memory_map.tell() < len(memory_map):
            memory_map.write(block[: len(memory_map) - memory_map.tell()])


# -- durable means the same for everybody


def sync(folder: Path) -> None:
    """Write everything below `folder` through to the device: each file, each folder, and the folder that holds it."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_one(Path(path) / name)
        _sync_one(Path(path))
    _sync_one(folder.parent)


def sync_file(path: Path) -> None:
    """Write one file, and its entry in its folder, through to the device."""
    _sync_one(path)
    _sync_one(path.parent)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
