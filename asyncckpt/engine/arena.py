"""The arena: one memory file that trainer and workers map, holding the bytes of one snapshot.

Its layout is the plan's. A memory file is not bounded by /dev/shm and is one descriptor however many tensors stand in
it. Pages are touched ahead: a first touch inside a save costs 0.6 to 1.8 s a GB.
"""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Collection

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_POPULATE_BYTES = 64 * 2**20  # small enough that close() never waits long for a touch
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED = 0x10
_COUNTER_BYTES = 8


class Arena:
    """`buffer`: the map, `address`: where it begins, `fd`: the memory file or None (an anonymous map).

    Behind its `bytes` stands a counter, an int64 of the machine's byte order: how many shards a copy that is under way has filled.
    """

    def __init__(self, number: int, size_bytes: int, file: io.FileIO | None) -> None:
        self.number = number
        self.bytes = size_bytes
        self.fd = fd = None if file is None else file.fileno()
        self._file = file
        self.counter_offset = _counter_offset(size_bytes)
        mapped_bytes = self.counter_offset + _COUNTER_BYTES
        self.buffer = mmap.mmap(-1, mapped_bytes)
        anchor = ctypes.c_char.from_buffer(self.buffer)
        self.address = ctypes.addressof(anchor)
        del anchor
        if fd is not None:
            _map_over(self.address, mapped_bytes, fd)
        self._touched = threading.Lock()
        self._closed = False
        _libc.madvise(self.address, size_bytes, _MADV_HUGEPAGE)

    @classmethod
    def create(cls, number: int, size_bytes: int, *, shared: bool = True) -> "Arena":
        """A new arena. The map is not inherited by forks: a forked DataLoader worker must not keep it alive."""
        file = _memory_file("asyncckpt-arena") if shared else None
        try:
            if file is not None:
                os.ftruncate(file.fileno(), _counter_offset(size_bytes) + _COUNTER_BYTES)
            arena = cls(number, size_bytes, file)
        except BaseException:
            if file is not None:
                file.close()
            raise
        with contextlib.suppress(OSError):
            arena.buffer.madvise(mmap.MADV_DONTFORK)
        _maps.add(arena.buffer)
        return arena

    def touch(self) -> None:
        """Make all pages exist, without holding the GIL; about 0.2 to 0.6 s a GB. Contents stay."""
        with self._touched:
            for offset in range(0, self.bytes, _POPULATE_BYTES):
                if self._closed:
                    return
                length = min(_POPULATE_BYTES, self.bytes - offset)
                if _libc.madvise(self.address + offset, length, _MADV_POPULATE_WRITE) != 0:
                    return  # an old kernel: the first save touches the pages

    def reset_counter(self) -> None:
        """Nothing is filled."""
        self.buffer[self.counter_offset : self.counter_offset + _COUNTER_BYTES] = bytes(_COUNTER_BYTES)

    def leave_in_child(self) -> None:
        """In a forked child: let go of the descriptor. The map is not there."""
        self._let_go()

    def close(self) -> None:
        """Unmap and free; again it does what an interrupt left. A view that still lives, as in a traceback, takes the map with it."""
        self._closed = True
        with self._touched:
            self._let_go()
            with contextlib.suppress(BufferError):
                self.buffer.close()

    def _let_go(self) -> None:
        self.fd = None
        if self._file is not None:
            self._file.close()


_maps: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def _keep_maps() -> None:
    """In a forked child the maps are not there, whoever holds them: unmapping their addresses would free somebody else's memory."""
    for one in list(_maps):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


os.register_at_fork(after_in_child=_keep_maps)


def _memory_file(name: str) -> io.FileIO:
    """A new one, which has an owner from the first moment on.

    Ctrl-C may come between two calls of Python, and would leave a bare descriptor open for ever; it cannot come within this one.
    """
    (file,) = map(io.FileIO, map(os.memfd_create, (name,), (os.MFD_CLOEXEC,)), ("r+",))
    return file


def why_none(size_bytes: int, error: Exception) -> str:
    """Why there is no arena of this size, and what would help."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return f"a snapshot takes a memory file of {size_bytes} bytes, and the limit of file sizes (ulimit -f) is below that: raise it"
    if number in (errno.EMFILE, errno.ENFILE):
        return "a snapshot takes a memory file, and no descriptor is free: raise the limit of open files (ulimit -n)"
    return f"no memory for a snapshot of {size_bytes} bytes: {error}"


def read_counter(fd: int, size_bytes: int) -> int:
    """The counter of an arena of `size_bytes`, from its memory file."""
    return int.from_bytes(os.pread(fd, _COUNTER_BYTES, _counter_offset(size_bytes)), sys.byteorder)


def _counter_offset(size_bytes: int) -> int:
    return -(-size_bytes // _COUNTER_BYTES) * _COUNTER_BYTES


def _map_over(address: int, size_bytes: int, fd: int) -> None:
    """Put the file under an anonymous map: `mmap.mmap(fd)` would keep a copy of the descriptor that no fork could let go of."""
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, size_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class ArenaPool:
    """At most `count` arenas, reused; each is free or in flight.

    Holds no lock: the answer to a save gives its arena back on another thread, and a signal handler that waits for that answer may have
    come in the middle of a call. One thread at a time takes; whoever takes in a handler takes an `extra` one.
    """

    def __init__(self, count: int, *, shared: bool) -> None:
        self._count = count
        self._shared = shared
        self._arenas: dict[int, Arena] = {}
        self._in_flight: set[int] = (
            set()
        )  # their numbers; an arena that is in here while it is made has its place already
        self._extra: dict[int, Arena] = {}
        self._next = 0
        self._returned: queue.SimpleQueue[None] = queue.SimpleQueue()

    def has_free(self) -> bool:
        """Whether `take` would succeed."""
        return len(self._in_flight) < self._count

    def wait_free(self, timeout: float | None = None) -> bool:
        """Block until `take` would succeed, or for `timeout` seconds; whether it would."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        woken = False
        while not self.has_free():
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            try:
                self._returned.get(timeout=left_s if left_s is None else max(0.0, left_s))
            except queue.Empty:
                return False
            woken = True
        if woken:
            self._returned.put(None)  # somebody else may wait for the same
        return True

    def take(self, size_bytes: int, *, make_bytes: int = 0) -> tuple[Arena, list[Arena]] | None:
        """An arena of at least `size_bytes`, and the arenas it replaces (the caller closes them); None if all are in flight.

        A new one gets `make_bytes`, if that is more, so that it serves a little more later.
        """
        if not self.has_free():
            return None
        free = [arena for arena in list(self._arenas.values()) if arena.number not in self._in_flight]
        fitting = [arena for arena in free if arena.bytes >= size_bytes]
        if fitting:
            arena = min(fitting, key=lambda arena: arena.bytes)
            self._in_flight.add(arena.number)
            return arena, []
        number = self._number()
        self._in_flight.add(number)
        try:
            self._arenas[number] = Arena.create(number, max(size_bytes, make_bytes), shared=self._shared)
        except BaseException:
            self._in_flight.discard(number)
            raise
        replaced = [self._arenas.pop(free[-1].number)] if len(self._arenas) > self._count else []
        return self._arenas[number], replaced

    def one_more(self, size_bytes: int) -> Arena:
        """An arena beside all others, for a save within a save; `close_extra` ends it."""
        number = self._number()
        arena = self._extra[number] = Arena.create(number, size_bytes, shared=self._shared)
        return arena

    def is_extra(self, arena: Arena) -> bool:
        """Whether it is one of those."""
        return arena.number in self._extra

    def close_extra(self, arena: Arena) -> None:
        """Its save has ended."""
        arena.close()
        self._extra.pop(arena.number, None)

    def give_back(self, arena: Arena) -> None:
        """The arena may be written again."""
        if arena.number in self._in_flight:
            self._in_flight.discard(arena.number)
            if self._returned.qsize() < self._count:  # nobody waits: they would heap up
                self._returned.put(None)

    def keep_only(self, arenas: Collection[Arena]) -> None:
        """Give back what is in flight and none of these: an interrupt may come between the taking and the use."""
        for arena in list(self._arenas.values()):
            if arena not in arenas:
                self.give_back(arena)

    @property
    def in_flight(self) -> int:
        """How many arenas hold a snapshot that is not stored yet."""
        return len(self._in_flight) + len(self._extra)

    def all(self) -> list[Arena]:
        """Every arena made and not released, free or in flight."""
        return [*self._arenas.values(), *self._extra.values()]

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number
