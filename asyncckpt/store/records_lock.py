"""One lock file a root, for what link and rename cannot do: to replace or remove exactly the file that was read.

The kernel lets go of it when its holder dies in any way. Commits do not take it: a link takes a free name or fails.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncckpt.errors import TransientStoreError

NAME = "records.lock"
_LOG = logging.getLogger("asyncckpt")
_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_POLL_S = 0.005
_PATIENCE_S = 30.0  # holders compare and rename a small file; a stopped process may hold it for ever


class RecordsLock:
    """The lock of one root, in `folder`, which `make_folder` makes."""

    def __init__(self, folder: Path, make_folder: Callable[[Path], None], progress: Callable[[], None]) -> None:
        self._folder = folder
        self._make_folder = make_folder
        self._progress = progress
        self._warned = False

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        """Hold it, and take its file away at the end. `TransientStoreError` if somebody else does for half a minute.

        Filesystems without locks get one WARNING, and whoever replaces or removes there must be alone.
        """
        descriptor = self._locked(key)
        try:
            yield
        finally:
            self._unlink(descriptor)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor too
            os.close(descriptor)

    def remove(self) -> None:
        """Take the file away that a killed holder left, if nobody holds it."""
        with suppress(OSError):
            descriptor = os.open(self._folder / NAME, os.O_RDWR | os.O_NOFOLLOW)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in _MISSING:  # without locks nobody can hold it
                        raise
                self._unlink(descriptor)
            finally:
                os.close(descriptor)

    def _unlink(self, descriptor: int) -> None:
        """While the lock is held: who waits for it finds that the file is gone, and makes another."""
        with suppress(OSError):
            if self._is_named(descriptor):
                (self._folder / NAME).unlink()

    def _locked(self, key: str) -> int:
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_named(descriptor):
                    return descriptor
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in _MISSING:
                    os.close(descriptor)
                    raise
                self._warn()
                return descriptor
            os.close(descriptor)
            if time.monotonic() > end_s:
                late = TransientStoreError(
                    f"another process holds {self._folder / NAME} for {_PATIENCE_S:.0f} s", key=key
                )
                late.unanswered = False
                raise late
            self._progress()
            time.sleep(_POLL_S)

    def _open(self) -> int:
        while True:
            with suppress(FileNotFoundError):
                return os.open(self._folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._make_folder(self._folder)

    def _is_named(self, descriptor: int) -> bool:
        """Whether the file that is locked still has its name: a lock on one that was removed keeps nobody out."""
        try:
            named = (self._folder / NAME).lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "the filesystem of %s has no locks: checkpoints are replaced and removed there without one, so only one process"
                " should do that at a time",
                self._folder.parent,
            )
