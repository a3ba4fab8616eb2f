"""A path to a store that is bad in a way that a test chooses, under a clock that a test holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asyncckpt.errors import ObjectNotFoundError
from asyncckpt.store.base import Entry, Patience, Store
from tests.counting import CountingStore


class FakeTime:
    """Seconds that pass only where somebody sleeps. `naps`: how long each sleep was."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.naps: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now_s += seconds

    def patience(self, deadline_s: float = 60.0) -> Patience:
        return Patience(deadline_s=deadline_s, clock=self.clock, sleep=self.sleep)


class BadPath(CountingStore):
    """Another store, over a path whose faults are functions of the key, the reading (from 1) and the connection (0: the usual one).

    `spoil`: changes bytes that were read, in place, of ranges and whole objects. `hide`: answers that the object does not exist.
    `unlisted`: keys that LIST leaves out. `afresh` opens connection 1, 2, and so on; `used` lists the connections of all readings.
    """

    def __init__(
        self,
        inner: Store,
        *,
        time: FakeTime | None = None,
        deadline_s: float = 60.0,
        spoil: Callable[[str, bytearray, int, int], Any] | None = None,
        hide: Callable[[str, int, int], bool] | None = None,
        unlisted: tuple[str, ...] = (),
    ) -> None:
        super().__init__(inner)
        self.time = time or FakeTime()
        self.patience = self.time.patience(deadline_s)
        self.spoil = spoil
        self.hide = hide
        self.unlisted = unlisted
        self.readings: dict[str, int] = {}
        self.used: list[int] = []
        self.opened = 0

    @contextmanager
    def afresh(self) -> Iterator[Store]:
        self.opened += 1
        yield _Connection(self, self.opened)

    def get(self, key, *, max_bytes):
        return self.read(key, 0, lambda: super(BadPath, self).get(key, max_bytes=max_bytes))

    def get_into(self, key, start, target):
        target[:] = self.read(key, 0, lambda: self._ranged(key, start, len(target)))

    def list(self, prefix="", **options):
        return (entry for entry in super().list(prefix, **options) if entry.key not in self.unlisted)

    def _ranged(self, key: str, start: int, size: int) -> bytes:
        data = bytearray(size)
        super().get_into(key, start, memoryview(data))
        return bytes(data)

    def read(self, key: str, connection: int, call: Callable[[], bytes]) -> bytes:
        with self._lock:
            self.readings[key] = number = self.readings.get(key, 0) + 1
            self.used.append(connection)
        if self.hide is not None and self.hide(key, number, connection):
            raise ObjectNotFoundError("no such object", key=key)
        data = bytearray(call())
        if self.spoil is not None:
            self.spoil(key, data, number, connection)
        return bytes(data)


class _Connection(CountingStore):
    """What `BadPath.afresh` gives."""

    def __init__(self, path: BadPath, number: int) -> None:
        super().__init__(path.inner)
        self.path = path
        self.number = number

    def get(self, key, *, max_bytes):
        return self.path.read(key, self.number, lambda: self.path.inner.get(key, max_bytes=max_bytes))

    def get_into(self, key, start, target):
        target[:] = self.path.read(key, self.number, lambda: self.path._ranged(key, start, len(target)))

    def head(self, key) -> Entry | None:
        return self.path.head(key)

    def list(self, prefix="", **options):
        return self.path.list(prefix, **options)
