"""A store in a folder of a POSIX filesystem: atomic by link and rename, durable by fsync of files and folders."""

import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncckpt.errors import LocalIOError, ObjectChangedError, ObjectNotFoundError, ResourceLimitError, StoreError
from asyncckpt.store import beneath
from asyncckpt.store.base import (
    Buffers,
    Entry,
    OpenUpload,
    Patience,
    Progress,
    Store,
    Upload,
    Version,
    byte_views,
    check_key,
    is_key,
)
from asyncckpt.store.direct import NewFile, gains
from asyncckpt.store.posix import ABSENT, absolute, link, mapped, read, rooted, sync_folder, translated, umask, unlink
from asyncckpt.store.records_lock import RecordsLock

_LOG = logging.getLogger("asyncckpt")
_UNFINISHED = ".asyncckpt-unfinished"  # no key starts with a dot, so a listing never shows it
_UNFINISHED_NAME = re.compile(r"[0-9a-f]{32}")
_SYNC_BYTES = 64 * 2**20  # of one upload
_TRIES = 100  # a delete in another process may prune a folder as often as we make it


class LocalStore(Store):
    """Objects are files below `root`, which the first write makes.

    A write goes to a temporary file in `root/.asyncckpt-unfinished`, is synced, and then gets its name: by `os.link`
    where the name must be free (rename would overwrite), by rename otherwise. Temporary files of writers that were
    killed are its open uploads. `root` must be one filesystem, and may be a link. Links
    below it are read through; whatever removes a name below a link removes the link, and nothing that it points to.
    To replace or to remove what was read takes a lock (`records_lock`).
    """

    rereads = True
    patience = Patience((0.1, 0.9))  # there is no other connection: the kernel's own copy is what is read again

    def __init__(self, root: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
        self._root = absolute(root)
        self._progress = progress or (lambda: None)
        self._file_mode = 0o666 & ~umask()
        self._synced: set[Path] = set()
        self._closed_folders: set[str] = set()  # those of which was told
        self._records = RecordsLock(self._root / _UNFINISHED, self._make_folder, self._progress)
        self._direct: bool | None = None  # not known before the folder is there

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        path = self._path(key)
        with translated("put", key), rooted(self._root), self._written(data) as temporary:
            self._publish(temporary, path, if_absent=if_absent)

    def start_upload(self, key: str) -> "LocalUpload":
        path = self._path(key)
        with translated("start_upload", key), rooted(self._root):
            temporary, file = self._open_temporary()
        return LocalUpload(self, key, path, temporary, file)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._opened("get", key) as descriptor:
            stored_bytes = os.fstat(descriptor).st_size
            if stored_bytes > max_bytes:
                raise ResourceLimitError(f"the object has {stored_bytes} bytes, more than {max_bytes}", key=key)
            content = bytearray(stored_bytes)
            read(descriptor, memoryview(content), 0, key, self._progress)
        return bytes(content)

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        with self._opened("get_into", key) as descriptor:
            if target.nbytes:
                read(descriptor, target.cast("B"), start, key, self._progress)

    def head(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            with rooted(self._root):
                found = path.stat()
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise mapped(error, "head", key) from error
        return Entry(key, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        if prefix and not is_key(prefix.removesuffix("/")):
            return
        folder, _, name_prefix = prefix.rpartition("/")
        with translated("list", prefix):
            for entry in self._walk(f"{folder}/" if folder else "", name_prefix, delimiter=delimiter):
                if entry.key > start_after:
                    yield entry

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        return Version(self.get(key, max_bytes=max_bytes), "")

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        path = self._path(key)
        with translated("replace", key), self._written(data) as temporary, self._records.held(key):
            self._check_same(key, old)
            self._publish(temporary, path, if_absent=False)

    def remove(self, key: str, old: Version) -> None:
        if self.head(key) is None:
            return
        with translated("remove", key), self._records.held(key), suppress(ObjectNotFoundError):
            self._check_same(key, old)
            try:
                self.delete([key])
            except StoreError as error:
                error.unanswered = True  # it may have lost its name, and not durably
                raise

    def _check_same(self, key: str, old: Version) -> None:
        try:
            same = self.get(key, max_bytes=len(old.data)) == old.data
        except ResourceLimitError:
            same = False
        if not same:
            raise ObjectChangedError("another object stands there by now", key=key)

    def delete(self, keys: Iterable[str]) -> None:
        """As the contract says. Never through a symbolic link below the root: what is below one goes by removing the link alone."""
        folders: dict[str, list[str]] = {}
        for key in keys:
            folder, _, name = check_key(key).rpartition("/")
            folders.setdefault(folder, []).append(name)
        for folder, names in folders.items():
            with translated("delete", f"{folder}/{names[0]}" if folder else names[0]):
                for gone in beneath.unlink_all(self._root, folder, names):
                    self._synced.discard(self._root / gone)

    def clock_s(self) -> float:
        """The filesystem's own time, which may be another host's: what it stamps the root with, when that is touched.

        This host's where nobody may touch it, or where it is not there: nothing can be removed then either.
        """
        with suppress(OSError):
            os.utime(self._root)
            return self._root.stat().st_mtime
        return time.time()

    def open_uploads(self, prefix: str = "", *, idle_since_s: float | None = None) -> Sequence[OpenUpload]:
        """Temporary files, whose keys only their writers know: with a `prefix` there are none."""
        with translated("open_uploads", prefix):
            names = [] if prefix else _unfinished(self._root / _UNFINISHED, idle_since_s)
        return [OpenUpload("", name) for name in names]

    def abort_upload(self, upload: OpenUpload) -> None:
        if _UNFINISHED_NAME.fullmatch(upload.token):
            with translated("abort_upload", upload.key):
                beneath.unlink_all(self._root, _UNFINISHED, [upload.token])

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _opened(self, operation: str, key: str) -> Iterator[int]:
        path = self._path(key)
        with translated(operation, key):
            with rooted(self._root):
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not hang us
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise ObjectNotFoundError("no such object", key=key)
                yield descriptor
            finally:
                os.close(descriptor)

    def _walk(self, folder: str, name_prefix: str, *, delimiter: bool) -> Iterator[Entry]:
        try:
            with rooted(self._root), os.scandir(self._root / folder) as lines:
                found = [(f"{line.name}/" if line.is_dir(follow_symlinks=False) else line.name, line) for line in lines]
        except OSError as error:
            if error.errno in ABSENT:
                return
            raise
        for name, line in sorted(found, key=lambda pair: pair[0]):
            key = folder + name
            if not name.startswith(name_prefix) or not is_key(key.removesuffix("/")):
                continue
            if not name.endswith("/"):
                found_file = _file_of(line)
                if found_file is not None:
                    yield Entry(key, found_file.st_size, found_file.st_mtime)
            elif not delimiter:
                yield from self._below(key)
            elif next(self._below(key), None):  # an empty folder is no prefix
                yield Entry(key)

    def _below(self, folder: str) -> Iterator[Entry]:
        """What is in a folder that a listing met on its way. One that is closed to us is another's, and hides no more than itself."""
        try:
            yield from self._walk(folder, "", delimiter=False)
        except PermissionError as error:
            if folder not in self._closed_folders:
                self._closed_folders.add(folder)
                _LOG.warning("what is in %s is not seen: %s", self._root / folder, error.strerror)

    @contextmanager
    def _written(self, data: Buffers) -> Iterator[Path]:
        """A synced temporary file that holds the buffers; whatever name it has not got by the end is gone."""
        temporary, file = self._open_temporary()
        try:
            try:
                file.write(byte_views(data), 0, self._progress)
                file.sync()
            finally:
                file.close()
            yield temporary
        finally:
            unlink(temporary)

    def _open_temporary(self) -> tuple[Path, NewFile]:
        folder = self._root / _UNFINISHED
        path = folder / secrets.token_hex(16)
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                if self._direct is None:
                    self._direct = gains(folder)
                return path, NewFile(path, direct=self._direct)
            self._make_folder(folder)
        raise LocalIOError(f"the folder {folder} vanishes as often as it is made")

    def _publish(self, temporary: Path, path: Path, *, if_absent: bool) -> None:
        """Give a synced file its name, durably. A name that is taken is made durable too: who gave it may have died before he did that."""
        temporary.chmod(self._file_mode)
        taken: FileExistsError | None = None
        for _ in range(_TRIES):
            self._make_folder(path.parent)
            with suppress(FileNotFoundError):
                try:
                    if if_absent:
                        link(temporary, path)
                    else:
                        temporary.replace(path)
                except FileExistsError as error:
                    taken = error
                break
        else:
            raise LocalIOError(f"the folder {path.parent} vanishes as often as it is made")
        try:
            self._sync_folders(path.parent)
        except OSError as error:
            failed = mapped(error, "put", path.relative_to(self._root).as_posix())
            failed.unanswered = True  # it has its name already
            raise failed from error
        if taken is not None:
            raise taken

    def _make_folder(self, folder: Path) -> None:
        for last in (*(False,) * _TRIES, True):
            try:
                folder.mkdir()
                break
            except FileExistsError:
                return
            except FileNotFoundError:
                if last:
                    raise  # /proc and the like: no folder can be made there
                if not folder.parent.exists():  # else another writer made it since
                    self._make_folder(folder.parent)
        self._synced.discard(folder)

    def _sync_folders(self, folder: Path) -> None:
        """Sync the folder of a new name, and once every folder above it, whoever made that."""
        sync_folder(folder)
        while folder not in self._synced and folder != folder.parent:
            try:
                sync_folder(folder.parent)
            except OSError:
                if folder.is_relative_to(self._root) and folder != self._root:
                    raise  # above the root folders may be closed to us; then they are not ours either
            self._synced.add(folder)
            folder = folder.parent

    def close(self) -> None:
        """Take the folder of temporary files away, unless another writer has one there."""
        self._records.remove()
        with suppress(OSError):
            (self._root / _UNFINISHED).rmdir()


class LocalUpload(Upload):
    """One temporary file that parts are written into, in any order."""

    def __init__(self, store: LocalStore, key: str, path: Path, temporary: Path, file: NewFile) -> None:
        self._store = store
        self._key = key
        self._path = path
        self._temporary = temporary
        self._file = file
        self._idle = threading.Condition()
        self._writes = 0
        self._written_bytes = 0
        self._open = True

    def write(self, part: int, offset: int, data: Buffers) -> None:  # noqa: ARG002 - the offset alone places a part
        with self._idle:
            if not self._open:
                raise StoreError("this upload is completed or aborted", key=self._key)
            self._writes += 1
        try:
            with translated("write", self._key):
                self._file.write(views := byte_views(data), offset, self._store._progress)
                if self._is_due(sum(view.nbytes for view in views)):
                    self._file.sync(data_only=True)
                    self._store._progress()
        finally:
            with self._idle:
                self._writes -= 1
                self._idle.notify_all()

    def _is_due(self, written_bytes: int) -> bool:
        """Whether to sync now: gigabytes in one call would take longer than a worker may be silent."""
        with self._idle:
            self._written_bytes += written_bytes
            return self._written_bytes % _SYNC_BYTES < written_bytes

    def complete(self) -> None:
        with translated("complete", self._key):
            try:
                if not self._close(sync=True):
                    raise StoreError("this upload is completed or aborted", key=self._key)
                self._store._publish(self._temporary, self._path, if_absent=False)
            finally:
                unlink(self._temporary)

    def abort(self) -> None:
        with suppress(OSError):
            self._close(sync=False)
        unlink(self._temporary)

    def _close(self, *, sync: bool) -> bool:
        """Close after the last write: a descriptor closed under one could be another file's by then.

        False if it is closed already.
        """
        with self._idle:
            if not self._open:
                return False
            self._open = False
            self._idle.wait_for(lambda: self._writes == 0)
        try:
            if sync:
                self._file.sync()
        finally:
            self._file.close()
        return True


def _file_of(line: "os.DirEntry[str]") -> os.stat_result | None:
    """What a name in a folder leads to, if it is a file; links may lead anywhere, also nowhere."""
    try:
        found = line.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) or line.is_symlink():
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None


def _unfinished(folder: Path, idle_since_s: float | None) -> list[str]:
    """Temporary files of writers, by name; a folder behind a link is not ours."""
    found = []
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise
    try:
        with os.scandir(descriptor) as lines:
            for line in lines:
                with suppress(FileNotFoundError):
                    modified_s = line.stat(follow_symlinks=False).st_mtime
                    if _UNFINISHED_NAME.fullmatch(line.name) and (idle_since_s is None or modified_s < idle_since_s):
                        found.append(line.name)
    finally:
        os.close(descriptor)
    return found
