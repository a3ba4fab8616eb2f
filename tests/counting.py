"""A store that counts what is read from another one."""

import threading
from collections import Counter

from asyncckpt.store.base import Entry, Store


class CountingStore(Store):
    """`gets`: calls by operation. `read_bytes`: of objects and ranges. `keys`: of everything that was read."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.patience = inner.patience
        self.gets: Counter[str] = Counter()
        self.read_bytes = 0
        self.keys: list[str] = []
        self._lock = threading.Lock()

    def _count(self, operation: str, key: str, size: int) -> None:
        with self._lock:
            self.gets[operation] += 1
            self.read_bytes += size
            self.keys.append(key)

    def put(self, key, data, *, if_absent=False):
        self.inner.put(key, data, if_absent=if_absent)

    def start_upload(self, key):
        return self.inner.start_upload(key)

    def get(self, key, *, max_bytes):
        data = self.inner.get(key, max_bytes=max_bytes)
        self._count("get", key, len(data))
        return data

    def get_into(self, key, start, target):
        self._count("get_into", key, len(target))
        self.inner.get_into(key, start, target)

    def head(self, key) -> Entry | None:
        self._count("head", key, 0)
        return self.inner.head(key)

    def list(self, prefix="", **options):
        self._count("list", prefix, 0)
        return self.inner.list(prefix, **options)

    def get_version(self, key, *, max_bytes):
        version = self.inner.get_version(key, max_bytes=max_bytes)
        self._count("get", key, len(version.data))
        return version

    def replace(self, key, data, old):
        self.inner.replace(key, data, old)

    def remove(self, key, old):
        self.inner.remove(key, old)

    def delete(self, keys):
        self.inner.delete(keys)

    def clock_s(self):
        return self.inner.clock_s()

    def open_uploads(self, prefix="", *, idle_since_s=None):
        return self.inner.open_uploads(prefix, idle_since_s=idle_since_s)

    def abort_upload(self, upload):
        self.inner.abort_upload(upload)
