"""Faults are stores: what fails, and whether it took effect, is said by call numbers."""

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from asyncckpt.errors import TransientStoreError
from asyncckpt.store.base import Buffers, Entry, OpenUpload, Store, Upload, Version


class FaultyStore(Store):
    """Fails the calls whose number (from 1, over all operations, uploads' too) is in `fail`.

    With `after`, a failing call took effect and its answer was lost. `operations` restricts counting and failing to
    some of: put start_upload write complete abort get get_into head list replace remove delete clock open_uploads
    abort_upload. `calls` lists what was counted.
    """

    def __init__(
        self,
        inner: Store,
        fail: Container[int] = (),
        *,
        after: bool = False,
        error: Callable[[], Exception] = lambda: TransientStoreError("injected"),
        operations: Container[str] | None = None,
    ) -> None:
        self.inner = inner
        self.fail = fail
        self.after = after
        self.error = error
        self.operations = operations
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self.conditional_puts = inner.conditional_puts
        self.rereads = inner.rereads
        self.patience = inner.patience
        self.min_part_bytes = inner.min_part_bytes
        self.max_put_bytes = inner.max_put_bytes
        self.max_parts = inner.max_parts

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        self.run("put", key, lambda: self.inner.put(key, data, if_absent=if_absent))

    def start_upload(self, key: str) -> Upload:
        return _FaultyUpload(self, key, self.run("start_upload", key, lambda: self.inner.start_upload(key)))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.run("get", key, lambda: self.inner.get(key, max_bytes=max_bytes))

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        self.run("get_into", key, lambda: self.inner.get_into(key, start, target))

    def head(self, key: str) -> Entry | None:
        return self.run("head", key, lambda: self.inner.head(key))

    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        """Each line is a call: it fails before that line, or after telling it."""
        lines = self.inner.list(prefix, delimiter=delimiter, start_after=start_after)
        while (line := self.run("list", prefix, lambda: next(lines, None))) is not None:
            yield line

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        return self.run("get", key, lambda: self.inner.get_version(key, max_bytes=max_bytes))

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        self.run("replace", key, lambda: self.inner.replace(key, data, old))

    def remove(self, key: str, old: Version) -> None:
        self.run("remove", key, lambda: self.inner.remove(key, old))

    def delete(self, keys: Iterable[str]) -> None:
        names = tuple(keys)
        self.run("delete", names[0] if names else "", lambda: self.inner.delete(names))

    def clock_s(self) -> float:
        return self.run("clock", "", self.inner.clock_s)

    def open_uploads(self, prefix: str = "", *, idle_since_s: float | None = None) -> Sequence[OpenUpload]:
        return self.run("open_uploads", prefix, lambda: self.inner.open_uploads(prefix, idle_since_s=idle_since_s))

    def abort_upload(self, upload: OpenUpload) -> None:
        self.run("abort_upload", upload.key, lambda: self.inner.abort_upload(upload))

    def close(self) -> None:
        self.inner.close()

    def run(self, operation, key, call):
        fails = False
        if self.operations is None or operation in self.operations:
            with self._lock:
                self.calls.append((operation, key))
                fails = len(self.calls) in self.fail
        if fails and not self.after:
            raise self.error()
        answer = call()
        if fails:
            raise self.error()
        return answer


class _FaultyUpload(Upload):
    def __init__(self, store: FaultyStore, key: str, inner: Upload) -> None:
        self.store = store
        self.key = key
        self.inner = inner

    def write(self, part: int, offset: int, data: Buffers) -> None:
        self.store.run("write", self.key, lambda: self.inner.write(part, offset, data))

    def complete(self) -> None:
        self.store.run("complete", self.key, self.inner.complete)

    def abort(self) -> None:
        self.store.run("abort", self.key, self.inner.abort)
