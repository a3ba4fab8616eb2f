"""Removing names below a root without ever going through a symbolic link.

A folder of checkpoints may hold links: a shard moved to another disk, or something planted. What a link points to is not ours, so
whoever removes a name below a link removes the link. Each folder is opened from the one above it, and none through a link:
nobody can put one there between a check and the removal.
"""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from asyncckpt.store.posix import sync

_HERE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def unlink_all(root: Path, folder: str, names: Sequence[str]) -> list[str]:
    """Remove the files `names` from `folder`, then it and those above it as far as they are empty, durably.

    Returns the folders that went. Names that are not there, or are folders, are no error. The root itself may be a link, and stays.
    """
    parts = [part for part in folder.split("/") if part]
    with ExitStack() as stack:
        try:
            opened = [os.open(root, os.O_RDONLY | os.O_DIRECTORY)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        stack.callback(os.close, opened[0])
        for part in parts:
            try:
                opened.append(os.open(part, _HERE, dir_fd=opened[-1]))
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                names = [part] if _is_link(part, opened[-1]) else []
                break
            stack.callback(os.close, opened[-1])
        gone = False
        for name in names:
            gone |= _unlink(name, opened[-1])
        return _prune(parts, opened) if gone else []


def _prune(parts: Sequence[str], opened: list[int]) -> list[str]:
    removed = []
    while len(opened) > 1:
        try:
            os.rmdir(parts[len(opened) - 2], dir_fd=opened[-2])
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            break
        removed.append("/".join(parts[: len(opened) - 1]))
        opened.pop()
    sync(opened[-1])
    return removed


def _unlink(name: str, folder: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno not in _NOT_THERE and not (error.errno == errno.EPERM and _is_folder(name, folder)):
            raise
        return False
    return True


def _is_link(name: str, folder: int) -> bool:
    with suppress(OSError):
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _is_folder(name: str, folder: int) -> bool:
    with suppress(OSError):
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False
