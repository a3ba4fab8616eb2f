"""Objects of the sink, in memory: buckets, multipart uploads, listings. Nothing here knows HTTP."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_MIN_PART_BYTES = 5 * 2**20  # what S3 wants of every part but the last


class RefusedError(Exception):
    """S3's own answer to what cannot be done: an HTTP status and S3's word for it."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes of an object or a part, in pieces that follow each other. No pieces and a size: counted and thrown away."""

    pieces: tuple[memoryview, ...]
    size_bytes: int
    etag: str
    modified_s: float

    def part(self, start: int, end: int) -> list[memoryview]:
        """The bytes from `start` to before `end`."""
        if self.size_bytes and not self.pieces:
            raise RefusedError(410, "Discarded")
        found = []
        for piece in self.pieces:
            if start < len(piece) and end > 0:
                found.append(piece[max(start, 0) : end])
            start, end = start - len(piece), end - len(piece)
        return found


@dataclass(slots=True)
class _Upload:
    bucket: str
    key: str
    begun_s: float
    parts: dict[int, Content] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page:
    """Of a listing, in the order of keys. `next_token`: where the next page begins, None behind the last one."""

    contents: list[tuple[str, Content]]
    prefixes: list[str]
    next_token: str | None


class Objects:
    """Any thread may call any method; what a method does happens at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Content]] = {}
        self._uploads: dict[str, _Upload] = {}
        self._numbers = itertools.count(1)

    def content(self, body: memoryview | None, size_bytes: int) -> Content:
        """A body as content; its tag is a number, no digest."""
        pieces = (body,) if body is not None and size_bytes else ()
        return Content(pieces, size_bytes, f'"{next(self._numbers):032x}"', time.time())

    def create_bucket(self, bucket: str) -> None:
        with self._lock:
            self._buckets.setdefault(bucket, {})

    def check_bucket(self, bucket: str) -> None:
        with self._lock:
            self._held(bucket)

    def put(self, bucket: str, key: str, content: Content, *, if_absent: bool, if_match: str | None = None) -> None:
        with self._lock:
            held = self._held(bucket)
            if if_absent and key in held:
                raise RefusedError(412, "PreconditionFailed")
            _match(held, key, if_match)
            held[key] = content

    def get(self, bucket: str, key: str) -> Content:
        with self._lock:
            found = self._held(bucket).get(key)
        if found is None:
            raise RefusedError(404, "NoSuchKey")
        return found

    def delete(self, bucket: str, keys: Sequence[str], *, if_match: str | None = None) -> None:
        with self._lock:
            held = self._held(bucket)
            for key in keys:
                _match(held, key, if_match)
                held.pop(key, None)

    def start_upload(self, bucket: str, key: str) -> str:
        upload_id = f"upload-{next(self._numbers)}"
        with self._lock:
            self._held(bucket)
            self._uploads[upload_id] = _Upload(bucket, key, time.time())
        return upload_id

    def put_part(self, upload_id: str, number: int, content: Content) -> None:
        with self._lock:
            self._upload(upload_id).parts[number] = content

    def complete(self, upload_id: str, wanted: Sequence[tuple[int, str]], *, if_absent: bool) -> Content:
        """Join the parts, without a copy. `wanted`: number and tag of each, ascending."""
        with self._lock:
            upload = self._upload(upload_id)
            held = self._held(upload.bucket)
            parts = [upload.parts.get(number) for number, _ in wanted]
            if not wanted or any(p is None or p.etag != tag for p, (_, tag) in zip(parts, wanted, strict=True)):
                raise RefusedError(400, "InvalidPart")
            found = [part for part in parts if part is not None]
            if any(part.size_bytes < _MIN_PART_BYTES for part in found[:-1]):
                raise RefusedError(400, "EntityTooSmall")
            if if_absent and upload.key in held:
                raise RefusedError(412, "PreconditionFailed")
            kept = all(part.pieces or not part.size_bytes for part in found)
            content = Content(
                tuple(piece for part in found for piece in part.pieces) if kept else (),
                sum(part.size_bytes for part in found),
                f'"{next(self._numbers):032x}-{len(found)}"',
                time.time(),
            )
            held[upload.key] = content
            del self._uploads[upload_id]
        return content

    def abort(self, upload_id: str) -> None:
        with self._lock:
            self._upload(upload_id)
            del self._uploads[upload_id]

    def parts(self, upload_id: str) -> list[tuple[int, Content]]:
        """What an open upload holds, by number."""
        with self._lock:
            return sorted(self._upload(upload_id).parts.items())

    def open_uploads(self, bucket: str, prefix: str) -> list[tuple[str, str, float]]:
        """Key, id and begin of each."""
        with self._lock:
            found = [(held.key, name, held.begun_s) for name, held in self._uploads.items() if held.bucket == bucket]
        return sorted(one for one in found if one[0].startswith(prefix))

    def page(self, bucket: str, prefix: str, delimiter: str, after: str, most: int) -> Page:
        """Keys behind `after`, which is a key, or a folded prefix that an earlier page ended with."""
        with self._lock:
            held = sorted((key, one) for key, one in self._held(bucket).items() if key.startswith(prefix))
        contents: list[tuple[str, Content]] = []
        prefixes: list[str] = []
        last = ""
        for key, folded, content in _folded(held, prefix, delimiter):
            if key <= after:
                continue
            if len(contents) + len(prefixes) == most:
                return Page(contents, prefixes, last)
            last = key
            if folded:
                prefixes.append(key)
            else:
                contents.append((key, content))
        return Page(contents, prefixes, None)

    def _held(self, bucket: str) -> dict[str, Content]:
        if bucket not in self._buckets:
            raise RefusedError(404, "NoSuchBucket")
        return self._buckets[bucket]

    def _upload(self, upload_id: str) -> _Upload:
        if upload_id not in self._uploads:
            raise RefusedError(404, "NoSuchUpload")
        return self._uploads[upload_id]


def _match(held: dict[str, Content], key: str, etag: str | None) -> None:
    """Refuse, where a tag is stated and the object is another one or none."""
    if etag is not None and key not in held:
        raise RefusedError(404, "NoSuchKey")
    if etag is not None and held[key].etag != etag:
        raise RefusedError(412, "PreconditionFailed")


def _folded(held: list[tuple[str, Content]], prefix: str, delimiter: str) -> Iterator[tuple[str, bool, Content]]:
    """(key or common prefix, whether it is one, content), in order."""
    last = None
    for key, content in held:
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        if end < 0:
            yield key, False, content
        elif last != key[: end + len(delimiter)]:
            last = key[: end + len(delimiter)]
            yield last, True, content
