"""Files written past the page cache (`O_DIRECT`), where the filesystem is one that gains by it.

A checkpoint is not read again by the machine that wrote it, unless something broke. In the page cache it takes memory from the
training data that is read every epoch, and getting that memory costs more than the disk does: on two cores 1 GB in files of
16 MiB, synced, took 0.45 to 0.6 s and 0.2 CPU seconds past the cache, 0.56 to 1.4 s and 0.3 to 2.2 CPU seconds through it.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from asyncckpt.store import posix
from asyncckpt.store.base import Progress

BLOCK_BYTES = 4096
"""Addresses, offsets and lengths are multiples of it: no disk has a larger logical block, and no page is shared with the cache."""
LEAST_BYTES = 2**20
"""What is smaller goes through the page cache, and is synced there."""
_BOUNCE_BYTES = 2 * 2**20  # of a thread: stays in the processor's cache, and is several requests for the disk
_FILESYSTEMS = frozenset({"ext4", "xfs"})
"""Where it was measured, or is known to go to the disk at once. Others accept the flag and copy (tmpfs, btrfs with checksums), or
send each write to a server alone (NFS)."""


class NewFile:
    """A file that did not exist, open for writing in any order from several threads. `direct`: whether to try `O_DIRECT`."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._past_cache: int | None = None
        if direct:
            with suppress(OSError):  # the filesystem has no such way, or descriptors ran out: the usual one serves
                self._past_cache = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)

    def write(self, views: Sequence[memoryview], offset: int, progress: Progress) -> None:
        """Write all of the views, one behind the other, from `offset`."""
        total = sum(view.nbytes for view in views)
        if self._past_cache is None or total < LEAST_BYTES:
            posix.write(self._descriptor, views, offset, progress)
            return
        # the blocks at both ends may hold bytes of a neighbour, which another thread writes: these go through the cache
        head = -offset % BLOCK_BYTES
        body = (total - head) // BLOCK_BYTES * BLOCK_BYTES
        posix.write(self._descriptor, _cut(views, 0, head), offset, progress)
        done = self._write_blocks(_cut(views, head, head + body), offset + head, progress)
        posix.write(self._descriptor, _cut(views, head + done, total), offset + head + done, progress)

    def sync(self, *, data_only: bool = False) -> None:
        """Return when what was written is on the disk; `data_only`: a later call does the rest."""
        (os.fdatasync if data_only else os.fsync)(self._descriptor)

    def close(self) -> None:
        """Close it. No write may be under way."""
        if self._past_cache is not None:
            os.close(self._past_cache)
            self._past_cache = None
        os.close(self._descriptor)

    def _write_blocks(self, views: Sequence[memoryview], offset: int, progress: Progress) -> int:
        """Write whole blocks past the cache; how many bytes, which is all of them unless the filesystem refuses."""
        bounce, array = _bounce()
        total = sum(view.nbytes for view in views)
        done = 0
        while done < total:
            size = min(_BOUNCE_BYTES, total - done)
            _gather(_cut(views, done, done + size), array)
            written = 0
            while written < size:
                assert self._past_cache is not None
                try:
                    count = os.pwrite(self._past_cache, bounce[written:size], offset + done + written)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # this one says that the filesystem wants another alignment
                        raise
                    return done + written
                written += count // BLOCK_BYTES * BLOCK_BYTES
                if count % BLOCK_BYTES:
                    return done + written
            done += size
            progress()
        return done


def gains(folder: Path) -> bool:
    """Whether files in this folder, which exists, are better written past the page cache."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):  # no /proc
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split(" ", 3)[2] == wanted:
                return rest.split(" ", 1)[0] in _FILESYSTEMS
    return False


_of_thread = threading.local()


def _bounce() -> tuple[memoryview, "np.ndarray[tuple[int], np.dtype[np.uint8]]"]:
    """The calling thread's buffer, at the beginning of a page."""
    found: tuple[memoryview, np.ndarray[tuple[int], np.dtype[np.uint8]]] | None
    found = getattr(_of_thread, "bounce", None)
    if found is None:
        pages = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        found = _of_thread.bounce = (pages, np.frombuffer(pages, np.uint8))
    return found


def _gather(views: Sequence[memoryview], target: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
    """Copy without the GIL, which an encoder beside us needs."""
    position = 0
    for view in views:
        np.copyto(target[position : position + view.nbytes], np.frombuffer(view, np.uint8))
        position += view.nbytes


def _cut(views: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """Bytes `begin` to `end` of the views, as if they were one."""
    found: list[memoryview] = []
    position = 0
    for view in views:
        piece = view[max(0, begin - position) : max(0, end - position)]
        if piece.nbytes:
            found.append(piece)
        position += view.nbytes
    return found
