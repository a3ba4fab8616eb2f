"""Notices from a service that outlived its trainer to the next Saver of the same place, in this host's temporary folder.

The store may be away when there is something to tell. A service holds the lock of its notice as long as it lives, so that one that was killed
is told from one that still works.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MAX_BYTES = 2**20
_STALE_S = 7 * 86_400.0  # nobody came back to that place


def notices_folder() -> Path:
    """Where the notices of this user are. Not asked of `tempfile`, which writes a file to find out, and raises where the disk is full."""
    return Path(os.environ.get("TMPDIR", "/tmp")) / f"asyncckpt-{os.geteuid()}"  # noqa: S108 - `_is_private` looks whose it is


class Notice:
    """One notice, as its service writes it. Where none can be kept, nothing is written and nothing fails."""

    def __init__(self, folder: Path, place: str) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_private(folder):
                _sweep(folder)
                path = folder / f"{_name(place)}-{os.getpid()}.json"
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Replace what the notice says."""
        if self._fd < 0:
            return
        data = json.dumps(facts).encode()
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, data, 0)
            os.ftruncate(self._fd, len(data))


def take_notices(folder: Path, place: str) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """What services left for this place, each with whether its writer still lives. Those of dead ones are removed."""
    try:
        paths = sorted(folder.glob(f"{_name(place)}-*.json")) if _is_private(folder) else []
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                alive = _is_locked(fd)
                data = os.pread(fd, _MAX_BYTES, 0)
                if not alive:
                    path.unlink()
            finally:
                os.close(fd)
            facts = json.loads(data)
            if isinstance(facts, dict):
                yield facts, alive


def _name(place: str) -> str:
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def _is_private(folder: Path) -> bool:
    """Whether it is a folder of ours that nobody else writes to: the temporary folder is everybody's."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
