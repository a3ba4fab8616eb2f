"""The contract of a store: flat keys, whole objects, ranged reads. `tests/contract` holds every store to it.

Keys are relative to the store's root, `/`-separated, from `[a-z0-9._/-]`, never absolute and never with `..`. All
methods are thread-safe. A failure raises a `StoreError`; vendor errors never leave the file that imports the vendor.
A store belongs to one process: make it after a fork.
"""

import re
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

from asyncckpt.errors import UnsafeCheckpointError

Buffer = bytes | bytearray | memoryview
Buffers = Sequence[Buffer]
Progress = Callable[[], None]
"""Called whenever bytes move or a backoff sleeps, so that a slow request is not mistaken for a hang."""

Value = TypeVar("Value")

_PART = r"[a-z0-9_-][a-z0-9._-]*"
_KEY = re.compile(rf"{_PART}(/{_PART})*")


def is_key(text: str) -> bool:
    """Whether `text` may name an object: no absolute path, no `..`, no hidden file, nothing to escape in a URL."""
    return _KEY.fullmatch(text) is not None


def check_key(key: str) -> str:
    """Return `key`; `UnsafeCheckpointError` unless it may name an object."""
    if not is_key(key):
        raise UnsafeCheckpointError(f"not an object key: {key[:200]!r}; keys are lower-case names joined by /")
    return key


def byte_views(data: Buffers) -> list[memoryview]:
    """The buffers as flat views of bytes, empty ones left out; copies nothing."""
    views = [memoryview(buffer) for buffer in data]
    return [view.cast("B") for view in views if view.nbytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing: an object, or (its key ends with `/`) a common prefix."""

    key: str
    stored_bytes: int = 0
    modified_s: float = 0.0

    @property
    def is_prefix(self) -> bool:
        """Whether this line stands for everything below a delimiter."""
        return self.key.endswith("/")


@dataclass(frozen=True, slots=True)
class Version:
    """An object as it was read. `tag`: the store's own name for exactly these bytes (an ETag), empty where it has none."""

    data: bytes
    tag: str


@dataclass(frozen=True, slots=True)
class Patience:
    """When a reader that got wrong bytes, or nothing, asks again, and how long it goes on before it gives the path up.

    `waits_s`: before the second, the third, ... reading. Nothing is damage before they are over: a path that spoils three of ten answers
    spoils eight in a row once in 15,000 times. After them the last one repeats until `deadline_s` after the first reading.
    `most_s`: what damage may cost one store object in waits. Beyond it readings follow each other at once, so that a folder full of junk does not
    hold a reader for hours.
    """

    waits_s: tuple[float, ...] = (0.1, 0.4, 0.5, 1.0, 1.0, 2.0, 4.0)
    deadline_s: float = 600.0
    most_s: float = 60.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload that was begun and neither completed nor aborted. `key`: empty where the store does not know it; `token`: the store's name for it."""

    key: str
    token: str


class Upload(ABC):
    """One object sent in parts, in any order and in parallel; it exists only after `complete()`.

    `UploadLostError`: the store has lost it, or a part of it. Whoever has the bytes may begin another.
    """

    @abstractmethod
    def write(self, part: int, offset: int, data: Buffers) -> None:
        """Send part number `part` (from 1, rising with `offset`); the same part may be sent again.

        Every part but the last has at least `Store.min_part_bytes`.
        """

    @abstractmethod
    def complete(self) -> None:
        """Make the object exist, durably, atomically. All parts have been written."""

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind. Never raises for an upload that is already gone."""


class Store(ABC):
    """Where checkpoints live."""

    conditional_puts: Literal["atomic", "unproven", "single_writer"] = "atomic"
    """Whether `put(if_absent=True)` can be relied on: always, only after a probe, or by the user's promise."""
    rereads: bool = False
    """Whether reading a range again costs a copy from memory, and no transfer."""
    patience: Patience = Patience()
    """For readings whose answer cannot be right. What the store itself calls transient is `RetryingStore`'s."""
    min_part_bytes: int = 1
    max_put_bytes: int = 5 * 2**30
    max_parts: int = 10_000

    @abstractmethod
    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        """Store the buffers, joined, as one object: atomic and durable when it returns.

        With `if_absent`, exactly one of any number of writers succeeds and the others get `ObjectExistsError`.
        """

    @abstractmethod
    def start_upload(self, key: str) -> Upload:
        """Begin an object of unknown size."""

    def part_bytes(self, most_bytes: int) -> int:
        """How large the next part of an upload should be, as its connections are now: `most_bytes`, or less on a slow link."""
        return max(most_bytes, self.min_part_bytes)

    def gather(self) -> list[Buffer]:
        """An empty list for the buffers of one `put` or `write`, to be filled by `append` alone.

        A store that sends a checksum takes it of each buffer as it comes, while that is in the processor's cache.
        """
        return []

    @abstractmethod
    def get(self, key: str, *, max_bytes: int) -> bytes:
        """The whole object. `ObjectNotFoundError` if absent, `ResourceLimitError` above `max_bytes`."""

    @abstractmethod
    def get_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` with the object's bytes from `start`.

        Fewer bytes there raise `TransientStoreError` when the connection broke and `CorruptCheckpointError` when the
        object itself is shorter.
        """

    @contextmanager
    def afresh(self) -> Iterator["Store"]:
        """The same objects, over connections on which nothing was read yet, past caches on the way. A store without either is itself.

        Several threads may each have one. For reading alone.
        """
        yield self

    @abstractmethod
    def head(self, key: str) -> Entry | None:
        """Size and time of an object, or None."""

    @abstractmethod
    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, in the order of their keys; whatever is no `is_key` is left out.

        With `delimiter`, keys with a `/` behind the prefix are folded to one prefix entry each. With `start_after`, only
        entries whose key is greater. A root that was never written lists nothing.
        """

    @abstractmethod
    def get_version(self, key: str, *, max_bytes: int) -> Version:
        """As `get`, with what `replace` and `remove` need to know the object again."""

    @abstractmethod
    def replace(self, key: str, data: Buffers, old: Version) -> None:
        """Store the buffers over exactly the object that was read as `old`: atomic and durable when it returns.

        Of any number of writers that read the same object one succeeds, and the others get `ObjectChangedError` (another stands there
        by now) or `ObjectNotFoundError` (none does). Then, and after any error that is not `unanswered`, this call changed nothing.
        """

    @abstractmethod
    def remove(self, key: str, old: Version) -> None:
        """Delete exactly the object that was read as `old`. None at all is no error; another one is an `ObjectChangedError` and stays."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete; keys that do not exist are no error."""

    def clock_s(self) -> float:
        """What the clock says that stamps the objects, unix seconds. Another clock than this host's must be asked."""
        return time.time()

    def open_uploads(self, prefix: str = "", *, idle_since_s: float | None = None) -> Sequence[OpenUpload]:  # noqa: ARG002 - most stores keep none
        """Uploads of keys below `prefix` that nobody ended, also those of writers that died.

        With `idle_since_s`, a time of `clock_s`, only those that were begun before and got no part since. A store that cannot tell has none.
        """
        return ()

    def abort_upload(self, upload: OpenUpload) -> None:  # noqa: B027 - most stores keep none
        """End one of them. One that is gone is no error."""

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Give connections back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class PerStore(Generic[Value]):
    """What is remembered of a store object for as long as it lives. By identity: a user's store may compare by value, or have no hash."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}

    def get(self, store: Store) -> Value | None:
        """The last value of this store; None if it has none."""
        return self._values.get(id(store))

    def set(self, store: Store, value: Value) -> None:
        """Remember it instead of what was."""
        if id(store) not in self._values:
            weakref.finalize(store, self._values.pop, id(store), None).atexit = False
        self._values[id(store)] = value
