"""Answers of `S3Store` that bring an object's bytes: what breaks off is asked for from the byte where it stopped."""

from contextlib import closing
from typing import TYPE_CHECKING, Any

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError, StoreError, TransientStoreError
from asyncckpt.store.base import Version
from asyncckpt.store.s3_answers import parse_range
from asyncckpt.store.s3_errors import translated

if TYPE_CHECKING:
    from asyncckpt.store.s3 import S3Store

_READ_BYTES = 2**20
_GOES_ON_BYTES = 2**16  # a connection that brought fewer failed: it is asked again after a wait, from the beginning


class S3Download:
    """Bytes of one object from `start`, as they come into `target`. `tag`: of the object that the first answer was from."""

    def __init__(self, store: "S3Store", key: str, start: int, target: memoryview, tag: str = "") -> None:
        self._store = store
        self._key = key
        self._name = store._key(key)
        self._start = start
        self._target = target
        self._tag = tag
        self._came = 0

    def receive(self) -> None:
        """Fill the target, over as many connections as it takes while each of them brings something."""
        wire = self._store._wire
        while self._came < self._target.nbytes:
            before = self._came
            try:
                with wire.body(wire.receives, "get_object", self._target.nbytes - before):
                    self._receive_on()
            except TransientStoreError:
                if not self.brought_enough(since=before):
                    raise

    def brought_enough(self, *, since: int) -> bool:
        """Whether a connection that broke off is no failure."""
        return self._came - since >= _GOES_ON_BYTES

    def _receive_on(self) -> None:
        start, end = self._start + self._came, self._start + self._target.nbytes
        answer = self._store._ask("get_object", self._key, Key=self._name, Range=f"bytes={start}-{end - 1}")
        with closing(answer["Body"]) as body:
            if self._tag and self._tag != answer["ETag"]:
                raise TransientStoreError("another object stands there by now", key=self._key)
            sent = answer.get("ContentRange") or f"bytes 0-{answer['ContentLength'] - 1}/{answer['ContentLength']}"
            first, last, stored_bytes = parse_range(sent)
            if stored_bytes < end:
                raise CorruptCheckpointError(
                    f"the object has {stored_bytes} bytes, and {end} are asked for", key=self._key
                )
            if first != start or last < end - 1:
                raise StoreError(f"the store sent {sent!r} when bytes {start}-{end - 1} were asked for", key=self._key)
            self._tag = answer.get("ETag", "")
            self.take(body)

    def take(self, body: Any) -> None:
        """Read an answer's body to the end of the target; the SDK would return half of a truncated one silently."""
        total = self._target.nbytes
        size = _GOES_ON_BYTES  # what is read when the connection breaks is lost
        with translated("get_object", self._key):
            while self._came < total:
                count = body.readinto(self._target[self._came : self._came + size])
                if not count:
                    raise TransientStoreError(
                        f"the connection ended after {self._came} of {total} bytes", key=self._key
                    )
                self._came += count
                size = min(2 * size, _READ_BYTES)
                self._store._progress()


def read_whole(store: "S3Store", key: str, max_bytes: int) -> Version:
    """A whole object, of a size that only its answer tells."""
    wire = store._wire
    download: S3Download | None = None
    try:
        with wire.body(wire.receives, "get_object", 0):
            answer = store._ask("get_object", key, Key=store._key(key))
            with closing(answer["Body"]) as body:
                stored_bytes = answer["ContentLength"]
                if stored_bytes > max_bytes:
                    raise ResourceLimitError(f"the object has {stored_bytes} bytes, more than {max_bytes}", key=key)
                content = bytearray(stored_bytes)
                download = S3Download(store, key, 0, memoryview(content), answer["ETag"])
                download.take(body)
    except TransientStoreError:
        if download is None or not download.brought_enough(since=0):
            raise
        download.receive()
    return Version(bytes(content), answer["ETag"])
