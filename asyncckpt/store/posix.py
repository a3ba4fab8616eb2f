"""The system calls under `LocalStore`: whole writes and reads, durable folders, and our errors for their failures."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncckpt.errors import (
    CorruptCheckpointError,
    DiskFullError,
    LocalIOError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreNotFoundError,
)
from asyncckpt.store.base import Progress

ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}  # the last: a link that leads nowhere
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CALL_BYTES = 64 * 2**20  # moved by one system call, so that progress is seen in between
_CALL_BUFFERS = 1024  # IOV_MAX of Linux


def write(descriptor: int, views: Sequence[memoryview], offset: int, progress: Progress) -> None:
    """`pwritev` until all is written; joins nothing."""
    todo = list(reversed(views))
    while todo:
        batch: list[memoryview] = []
        batch_bytes = 0
        while todo and len(batch) < _CALL_BUFFERS and batch_bytes < _CALL_BYTES:
            view = todo.pop()
            room = _CALL_BYTES - batch_bytes
            if view.nbytes > room:
                todo.append(view[room:])
                view = view[:room]
            batch.append(view)
            batch_bytes += view.nbytes
        written = os.pwritev(descriptor, batch, offset)
        offset += written
        progress()
        for view in reversed(batch):  # put back what a short write left
            left = min(view.nbytes, batch_bytes - written)
            if left <= 0:
                break
            todo.append(view[view.nbytes - left :])
            batch_bytes -= left


def read(descriptor: int, target: memoryview, offset: int, key: str, progress: Progress) -> None:
    """`preadv` until `target` is full; `CorruptCheckpointError` if the file ends first."""
    while target:
        count = os.preadv(descriptor, [target[:_CALL_BYTES]], offset)
        if not count:
            raise CorruptCheckpointError(
                f"{target.nbytes} bytes from byte {offset} on are asked for, and the object ends before", key=key
            )
        offset += count
        target = target[count:]
        progress()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(folder: int) -> None:
    """The same for an open one. Filesystems that cannot sync a folder (EINVAL) are taken at their word."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise


def link(temporary: Path, path: Path) -> None:
    """Link, not rename: it refuses a name that is taken."""
    try:
        os.link(temporary, path, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise LocalIOError(f"a commit needs a filesystem with hard links, and {path.parent} has none") from error
        raise


def unlink(path: Path) -> None:
    """Remove a temporary file if it is there; a failure is no reason to fail what it was for."""
    with suppress(OSError):
        path.unlink()


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root; `StoreNotFoundError` where it is relative to nothing."""
    try:
        return Path(path).absolute()
    except FileNotFoundError as error:
        raise StoreNotFoundError(
            f"{os.fspath(path)!r} is a relative path, and the working directory of this process was deleted; give an absolute path"
        ) from error


def umask() -> int:
    """Read it without setting it: `os.umask` would change the files that other threads make meanwhile."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


@contextmanager
def rooted(root: Path) -> Iterator[None]:
    """Where something is absent because the root can be no folder, that is told: `StoreNotFoundError`."""
    try:
        yield
    except OSError as error:
        if error.errno in ABSENT:
            _check_folder(root)
        raise


def _check_folder(path: Path) -> None:
    """What stands in the way of a folder; that none is there yet is nothing."""
    for place in (path, *path.parents):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)  # asked once: another thread may make it meanwhile
        except OSError:
            if os.path.islink(place):  # noqa: PTH114 - Path.is_symlink raises where we may not look
                raise StoreNotFoundError(
                    f"{place} is a link that leads nowhere; mount or make what it points to"
                ) from None
            continue
        if not is_folder:
            raise StoreNotFoundError(f"{place} is a file, and checkpoints need a folder")
        return


@contextmanager
def translated(operation: str, key: str) -> Iterator[None]:
    """Raise our error for an `OSError`; one of ours learns its key."""
    try:
        yield
    except StoreError as error:
        error.at(key=key)
        raise
    except OSError as error:
        raise mapped(error, operation, key) from error


def mapped(error: OSError, operation: str, key: str) -> StoreError:
    """Our error for a failure of the operating system. None is transient: another try would fail alike, or lie."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno == errno.EEXIST:
        return ObjectExistsError("the object exists already", key=key)
    if error.errno in _FULL:
        return DiskFullError(f"{operation}: {reason}; free space or choose another folder", key=key)
    if error.errno == errno.EFBIG:
        way_out = "raise the limit of file sizes (ulimit -f), or choose a filesystem that holds files of this size"
        return DiskFullError(f"{operation}: {reason}; {way_out}", key=key)
    if error.errno in ABSENT and operation.startswith("get"):
        return ObjectNotFoundError("no such object", key=key)
    if error.errno == errno.ENOTDIR:
        return StoreNotFoundError(f"{operation}: the root or a folder below it is a file: {error.filename}", key=key)
    return LocalIOError(f"{operation}: {reason} ({error.filename or 'no path'})", key=key)
