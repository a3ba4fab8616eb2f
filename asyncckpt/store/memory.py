"""A store in this process's memory, for tests and notebooks."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from asyncckpt.errors import (
    CorruptCheckpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
)
from asyncckpt.store.base import Buffers, Entry, Patience, Store, Upload, Version, byte_views, check_key, is_key


class MemoryStore(Store):
    """Objects in a dict. `clock`: what stamps them, unix seconds."""

    rereads = True
    patience = Patience((0.0, 0.0), 0.0)  # nothing lies between that could be better a moment later

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        check_key(key)
        content = b"".join(byte_views(data))
        with self._lock:
            if if_absent and key in self._objects:
                raise ObjectExistsError("the object exists already", key=key)
            self._objects[key] = (content, self._clock())

    def start_upload(self, key: str) -> "MemoryUpload":
        return MemoryUpload(self, check_key(key))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        content = self._content(key)
        if len(content) > max_bytes:
            raise ResourceLimitError(f"the object has {len(content)} bytes, more than {max_bytes}", key=key)
        return content

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        found = memoryview(self._content(key))[start : start + target.nbytes]
        if found.nbytes < target.nbytes:
            raise CorruptCheckpointError(f"the object ends before byte {start + target.nbytes}", key=key)
        if found:
            target.cast("B")[:] = found

    def head(self, key: str) -> Entry | None:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        return None if found is None else Entry(key, len(found[0]), found[1])

    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        with self._lock:
            found = sorted((key, len(content), time_s) for key, (content, time_s) in self._objects.items())
        for key, stored_bytes, time_s in found:
            if not key.startswith(prefix):
                continue
            name, slash, _ = key[len(prefix) :].partition("/")
            entry = Entry(f"{prefix}{name}/") if delimiter and slash else Entry(key, stored_bytes, time_s)
            if entry.key > start_after and is_key(entry.key.removesuffix("/")):
                start_after = entry.key
                yield entry

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        return Version(self.get(key, max_bytes=max_bytes), "")

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        check_key(key)
        content = b"".join(byte_views(data))
        with self._lock:
            self._check_same(key, old)
            self._objects[key] = (content, self._clock())

    def remove(self, key: str, old: Version) -> None:
        check_key(key)
        with self._lock:
            if key in self._objects:
                self._check_same(key, old)
                del self._objects[key]

    def delete(self, keys: Iterable[str]) -> None:
        names = [check_key(key) for key in keys]
        with self._lock:
            for name in names:
                self._objects.pop(name, None)

    def clock_s(self) -> float:
        return self._clock()

    def _check_same(self, key: str, old: Version) -> None:
        if key not in self._objects:
            raise ObjectNotFoundError("the object is gone", key=key)
        if self._objects[key][0] != old.data:
            raise ObjectChangedError("another object stands there by now", key=key)

    def _content(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectNotFoundError("no such object", key=key)
        return found[0]


class MemoryUpload(Upload):
    """Parts in a dict until `complete()`."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store = store
        self._key = key
        self._parts: dict[int, bytes] | None = {}

    def write(self, part: int, offset: int, data: Buffers) -> None:  # noqa: ARG002 - the number alone orders the parts
        self._open_parts()[part] = b"".join(byte_views(data))

    def complete(self) -> None:
        self._store.put(self._key, [content for _, content in sorted(self._open_parts().items())])
        self._parts = None

    def abort(self) -> None:
        self._parts = None

    def _open_parts(self) -> dict[int, bytes]:
        if self._parts is None:
            raise StoreError("this upload is completed or aborted", key=self._key)
        return self._parts
