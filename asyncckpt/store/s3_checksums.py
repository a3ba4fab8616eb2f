"""Which checksum a put carries, so that the store itself refuses a body that changed on its way.

A store that does not know a checksum's header often ignores it. So `"auto"` asks once: a put with a wrong checksum must be refused
and one with the right one accepted. The first of CRC32C, CRC32 and MD5 that counts is taken. Where a store verifies none of them
but answers with the MD5 of what it got, that is compared here.

Every S3Store settles this by itself, at its first put below a folder, and remembers it as long as it lives: a worker process keeps
its store from save to save, so that costs three small requests (five where only MD5 counts) once a process, and no message between
processes has to be right about another one's connection.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from asyncckpt.errors import StoreError, TransientStoreError, told
from asyncckpt.store.base import Buffer, Buffers
from asyncckpt.store.checksum import HEADERS, IN_HARDWARE, Algorithm, Summed, checksum, etag_of
from asyncckpt.store.s3_errors import CHANGED, code_of, status_of

_LOG = logging.getLogger("asyncckpt")
_PROBE = b"asyncckpt probe\n"
_ANOTHER = b"asyncckpt Probe\n"
_MOST_CHANGES = 3  # of one body, before the path is to blame

Rung = Literal["crc32c", "crc32", "md5", "etag", "none"]
"""`etag`: the MD5 is sent, and compared with the answer's ETag."""


class Checksums:
    """The checksums of one store's puts.

    Args:
        choice: The user's; anything but `"auto"` is taken as it is.
        put: Puts a small body with headers under a key, and gives the answer.
        remove: Deletes a key.
    """

    def __init__(self, choice: Rung | Literal["auto"], put: Callable[..., Any], remove: Callable[[str], None]) -> None:
        self._settled: Rung | None = None if choice == "auto" else choice
        self._put = put
        self._remove = remove
        self._lock = threading.Lock()
        self._changes: Counter[tuple[str, int]] = Counter()

    def rung(self, key: str, *, signed: bool) -> Rung:
        """Of a put to `key`; asks the store the first time that the key has a folder. `signed`: S3 verifies a SHA-256 anyway.

        Until it is settled puts carry CRC32C, also those beside the one that asks: nobody waits for somebody else's outage.
        """
        folder = key.rpartition("/")[0]
        if self._settled is None and signed:
            self._settled = "none"
        if self._settled is None and folder and self._lock.acquire(blocking=False):
            try:
                self._settled = self._settled or self._asked(f"{folder}/probe")
            finally:
                self._lock.release()
        return self._settled or "crc32c"

    def is_settled(self) -> bool:
        """Whether `rung` is what the store was found, or is said, to verify."""
        return self._settled is not None

    def gather(self) -> list[Buffer]:
        """For the buffers of one body: summed as they come, where the sum is cheap and likely to be asked for."""
        rung = self._settled or "crc32c"
        if rung == "crc32" or (rung == "crc32c" and IN_HARDWARE):
            return Summed(rung)
        return []

    def verify(self, rung: Rung, sent: dict[str, str], answer: dict[str, Any], key: str, part: int) -> None:
        """Hold the answer to a put against what was sent; `TransientStoreError` if other bytes arrived."""
        if rung == "etag" and not _is_tag(answer, sent[HEADERS["md5"]]):
            raise self.changed(key, part, TransientStoreError("the store got other bytes than were sent", key=key))
        self._changes.pop((key, part), None)

    def changed(self, key: str, part: int, error: StoreError) -> StoreError:
        """What to raise for an error that says that a body changed on its way: the third time of one body this is no accident."""
        self._changes[key, part] += 1
        if self._changes[key, part] < _MOST_CHANGES:
            return error
        del self._changes[key, part]
        blamed = StoreError(
            f"this path changes bytes: {_MOST_CHANGES} times the store got another body than was sent, and said at last: {told(error)};"
            " look for a proxy or a bad link in between, or for bad memory in this host",
            key=key,
        )
        blamed.unanswered = error.unanswered
        return blamed

    def _asked(self, key: str) -> Rung:
        """The first rung that counts. A failure that is no answer to the question is raised: the next put asks again."""
        accepted = False
        try:
            for algorithm in HEADERS:
                if algorithm == "crc32c" and not IN_HARDWARE:
                    continue
                answer = self._tried(key, algorithm, _ANOTHER)
                if answer is not None:
                    accepted = True
                    if algorithm == "md5" and _is_tag(answer, checksum("md5", [_PROBE])):
                        return "etag"
                elif self._tried(key, algorithm, _PROBE) is not None:
                    accepted = True
                    return algorithm
            if not accepted:
                self._put(key, _PROBE)  # not the checksums' fault, then: let the reason be told
                accepted = True
        finally:
            if accepted:
                with suppress(StoreError):  # a leftover that no reader looks at, and that goes with its folder
                    self._remove(key)
        _LOG.warning(
            "this store verifies no checksum of what it is sent (CRC32C, CRC32 and MD5 were tried): a byte that changes on its way there"
            ' is noticed only when the checkpoint is read; S3Options(checksum="none") says that this is known'
        )
        return "none"

    def _tried(self, key: str, algorithm: Algorithm, of: bytes) -> dict[str, Any] | None:
        """The answer to a put with the checksum of these bytes; None if the store refuses it."""
        try:
            answer: dict[str, Any] = self._put(key, _PROBE, **{HEADERS[algorithm]: checksum(algorithm, [of])})
        except StoreError as error:
            if not refuses(error):
                raise
            return None
        return answer


def headers(rung: Rung, data: Buffers) -> dict[str, str]:
    """The parameters of a put or a part for the checksum of its body."""
    if rung == "none":
        return {}
    algorithm: Algorithm = "md5" if rung == "etag" else rung
    return {HEADERS[algorithm]: checksum(algorithm, data)}


def refuses(error: StoreError) -> bool:
    """Whether an error may be about a checksum's header: its value, or that there is one."""
    code, status = code_of(error.__cause__), status_of(error.__cause__)
    if code in CHANGED or code == "SignatureDoesNotMatch":
        return True
    return type(error) is StoreError and (400 <= status < 500 or status == 501)


def _is_tag(answer: dict[str, Any], md5: str) -> bool:
    return str(answer.get("ETag", "")).strip('"').lower() == etag_of(md5)
