"""A store below a prefix of an S3 bucket, on AWS or on anything that speaks S3."""

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal

from botocore.exceptions import ClientError

from asyncckpt.errors import (
    CorruptCheckpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
    TransientStoreError,
    UnsafeStoreError,
)
from asyncckpt.options import S3Options
from asyncckpt.store.base import Buffers, Entry, Progress, Store, Upload, Version, check_key, is_key
from asyncckpt.store.s3_client import Body, Expectation, body_of, make_client, read_past_caches
from asyncckpt.store.s3_errors import code_of, mapped, translated

_LOG = logging.getLogger("asyncckpt")
_DELETE_BATCH = 1000  # what DeleteObjects takes
_READ_BYTES = 2**20
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_NO_BATCHES = {400, 404, 405, 501}


class S3Store(Store):
    """Objects are keys below `prefix`. Each request is sent once: wrap it in a `RetryingStore`.

    The client is made by the first request, so that the store may be made before a fork.
    """

    min_part_bytes = 5 * 2**20

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        options: S3Options | None = None,
        *,
        progress: Progress | None = None,
        page_keys: int = 1000,
        past_caches: bool = False,
    ) -> None:
        self._past_caches = past_caches
        self._spares: list[S3Store] = []  # for `afresh`: clients are dear, and a bad path asks for many
        self._page_keys = page_keys
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._options = options or S3Options()
        self._progress = progress or (lambda: None)
        self._lock = threading.Lock()
        self._made: Any = None
        self._expectation = Expectation()
        self._deletes_batches = True
        self._lost_starts: set[str] = set()
        self.conditional_puts: Literal["atomic", "unproven", "single_writer"]
        self.conditional_puts = "single_writer" if self._options.single_writer else "unproven"

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        params = {"Key": self._key(key), "Body": body_of(data, self._progress)}
        if not if_absent:
            self._send("put_object", key, **params)
            return
        if self._options.single_writer and self.head(key):
            raise ObjectExistsError("the object exists already", key=key)
        try:
            self._send("put_object", key, **params, IfNoneMatch="*")
        except StoreError as error:
            if _status(error.__cause__) != 501:
                raise
            if not self._options.single_writer:
                raise UnsafeStoreError(
                    "this store refuses `If-None-Match`, so two writers could take one step; if there is only one, say"
                    " S3Options(single_writer=True)",
                    key=key,
                ) from error
            self._send("put_object", key, **params)

    def start_upload(self, key: str) -> "S3Upload":
        name = self._key(key)
        try:
            answer = self._ask("create_multipart_upload", key, Key=name)
        except TransientStoreError:
            self._lost_starts.add(key)  # it may have begun, and nobody was told its id
            raise
        upload = S3Upload(self, key, answer["UploadId"])
        if key in self._lost_starts:
            upload.abort_others()
            self._lost_starts.discard(key)
        return upload

    def get(self, key: str, *, max_bytes: int) -> bytes:
        answer = self._ask("get_object", key, Key=self._key(key))
        with closing(answer["Body"]) as body:
            stored_bytes = answer["ContentLength"]
            if stored_bytes > max_bytes:
                raise ResourceLimitError(f"the object has {stored_bytes} bytes, more than {max_bytes}", key=key)
            content = bytearray(stored_bytes)
            self._receive(key, body, memoryview(content))
        return bytes(content)

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        name = self._key(key)
        if not target.nbytes:
            return
        end = start + target.nbytes
        answer = self._ask("get_object", key, Key=name, Range=f"bytes={start}-{end - 1}")
        with closing(answer["Body"]) as body:
            sent = answer.get("ContentRange") or f"bytes 0-{answer['ContentLength'] - 1}/{answer['ContentLength']}"
            first, last, stored_bytes = _parse_range(sent)
            if stored_bytes < end:
                raise CorruptCheckpointError(f"the object has {stored_bytes} bytes, and {end} are asked for", key=key)
            if first != start or last < end - 1:
                raise StoreError(f"the store sent {sent!r} when bytes {start}-{end - 1} were asked for", key=key)
            self._receive(key, body, target.cast("B"))

    @contextmanager
    def afresh(self) -> Iterator[Store]:
        spare = self._spares.pop() if self._spares else self._twin()
        try:
            yield spare
        finally:
            spare._hang_up()
            self._spares.append(spare)

    def _twin(self) -> "S3Store":
        return S3Store(
            self._bucket,
            self._prefix,
            self._options,
            progress=self._progress,
            page_keys=self._page_keys,
            past_caches=True,
        )

    def _hang_up(self) -> None:
        """End the connections and keep the client, which opens others."""
        if self._made is not None:
            self._made.close()

    def head(self, key: str) -> Entry | None:
        try:
            answer = self._ask("head_object", key, Key=self._key(key))
        except ObjectNotFoundError:
            return None
        return Entry(key, answer["ContentLength"], answer["LastModified"].timestamp())

    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        params: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": self._page_keys}
        if delimiter:
            params["Delimiter"] = "/"
        if start_after:
            params["StartAfter"] = self._prefix + start_after
        while True:
            page = self._ask("list_objects_v2", prefix, **params)
            found = [
                Entry(item["Key"][len(self._prefix) :], item["Size"], item["LastModified"].timestamp())
                for item in page.get("Contents", ())
            ]
            found += [Entry(item["Prefix"][len(self._prefix) :]) for item in page.get("CommonPrefixes", ())]
            for entry in sorted(found, key=lambda entry: entry.key):
                folded = delimiter and entry.is_prefix
                if is_key(entry.key[:-1] if folded else entry.key) and entry.key > start_after:
                    yield entry
            if not page.get("IsTruncated"):
                return
            params["ContinuationToken"] = page["NextContinuationToken"]

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        answer = self._ask("get_object", key, Key=self._key(key))
        with closing(answer["Body"]) as body:
            stored_bytes = answer["ContentLength"]
            if stored_bytes > max_bytes:
                raise ResourceLimitError(f"the object has {stored_bytes} bytes, more than {max_bytes}", key=key)
            content = bytearray(stored_bytes)
            self._receive(key, body, memoryview(content))
        return Version(bytes(content), answer["ETag"])

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        try:
            self._send("put_object", key, Key=self._key(key), Body=body_of(data, self._progress), IfMatch=old.tag)
        except ObjectExistsError as error:
            raise ObjectChangedError("another object stands there by now", key=key) from error

    def remove(self, key: str, old: Version) -> None:
        try:
            with suppress(ObjectNotFoundError):
                self._ask("delete_object", key, Key=self._key(key), IfMatch=old.tag)
        except ObjectExistsError as error:
            raise ObjectChangedError("another object stands there by now", key=key) from error

    def delete(self, keys: Iterable[str]) -> None:
        todo = [check_key(key) for key in keys]
        for at in range(0, len(todo), _DELETE_BATCH):
            batch = todo[at : at + _DELETE_BATCH]
            if len(batch) == 1 or not self._delete_batch(batch):
                for key in batch:
                    with suppress(ObjectNotFoundError):
                        self._ask("delete_object", key, Key=self._key(key))

    def _delete_batch(self, keys: Sequence[str]) -> bool:
        """False if this store knows no DeleteObjects."""
        if not self._deletes_batches:
            return False
        names = [{"Key": self._key(key)} for key in keys]
        try:
            answer = self._ask("delete_objects", keys[0], Delete={"Objects": names, "Quiet": True})
        except StoreError as error:
            if type(error) in (StoreError, ObjectNotFoundError) and _status(error.__cause__) in _NO_BATCHES:
                self._deletes_batches = False
                return False
            raise
        for failed in answer.get("Errors", ()):
            if failed.get("Code") != "NoSuchKey":
                cause = ClientError(
                    {"Error": {"Code": failed.get("Code", ""), "Message": failed.get("Message", "")}}, "x"
                )
                raise mapped(cause, "delete_objects", failed["Key"][len(self._prefix) :])
        return True

    def close(self) -> None:
        with self._lock:
            client, self._made = self._made, None
            spares, self._spares = self._spares, []
        if client is not None:
            client.close()
        for spare in spares:
            spare.close()

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _client(self, *, but_not: Any = None) -> Any:
        """The one client of this process, another than `but_not`."""
        with self._lock:
            if self._made is None or self._made is but_not:
                self._made = make_client(self._options, self._expectation)
                if self._past_caches:
                    read_past_caches(self._made)
            return self._made

    def _ask(self, operation: str, key: str, **params: Any) -> Any:
        """Send one request. Expired credentials are looked up anew, once."""
        with translated(operation, key):
            client = self._client()
            self._progress()
            try:
                return getattr(client, operation)(Bucket=self._bucket, **params)
            except ClientError as error:
                if code_of(error) not in _EXPIRED:
                    raise
            if isinstance(params.get("Body"), Body):
                params["Body"].seek(0)
            return getattr(self._client(but_not=client), operation)(Bucket=self._bucket, **params)

    def _send(self, operation: str, key: str, **params: Any) -> Any:
        """`_ask` with a body, from its beginning, without the question beforehand while all goes well."""
        if isinstance(params["Body"], Body):
            params["Body"].seek(0)
        try:
            answer = self._ask(operation, key, **params)
        except StoreError:
            self._expectation.refusal = True
            raise
        self._expectation.refusal = False
        return answer

    def _receive(self, key: str, body: Any, target: memoryview) -> None:
        """Read the answer's body to the end of `target`; the SDK would return half of a truncated one silently."""
        total = target.nbytes
        with translated("get_object", key):
            while target:
                count = body.readinto(target[:_READ_BYTES])
                if not count:
                    raise TransientStoreError(
                        f"the connection ended after {total - target.nbytes} of {total} bytes", key=key
                    )
                target = target[count:]
                self._progress()


class S3Upload(Upload):
    """A multipart upload."""

    def __init__(self, store: S3Store, key: str, upload_id: str) -> None:
        self._store = store
        self._key = key
        self._name = store._key(key)
        self._id = upload_id
        self._parts: dict[int, tuple[str, int]] = {}  # number to ETag and bytes

    def write(self, part: int, offset: int, data: Buffers) -> None:  # noqa: ARG002 - the number alone orders the parts
        body = body_of(data, self._store._progress)
        params = {"Key": self._name, "UploadId": self._id, "PartNumber": part, "Body": body}
        answer = self._store._send("upload_part", self._key, **params)
        self._parts[part] = (answer["ETag"], len(body))

    def complete(self) -> None:
        """Also when an earlier try succeeded and its answer was lost: then the upload is gone and the object is there."""
        parts = [{"PartNumber": part, "ETag": tag} for part, (tag, _) in sorted(self._parts.items())]
        params = {"Key": self._name, "UploadId": self._id, "MultipartUpload": {"Parts": parts}}
        try:
            self._store._ask("complete_multipart_upload", self._key, **params)
        except ObjectNotFoundError as error:
            found = self._store.head(self._key)
            if found is None or found.stored_bytes != sum(part_bytes for _, part_bytes in self._parts.values()):
                raise StoreError("the upload is gone: it was aborted, or expired", key=self._key) from error

    def abort(self) -> None:
        with suppress(ObjectNotFoundError):
            self._store._ask("abort_multipart_upload", self._key, Key=self._name, UploadId=self._id)

    def abort_others(self) -> None:
        """Abort other uploads of this key: a key has one writer, so they are ours, begun by a try whose answer was lost."""
        try:
            open_ones = self._store._ask("list_multipart_uploads", self._key, Prefix=self._name).get("Uploads", ())
            for one in open_ones:
                if one["Key"] == self._name and one["UploadId"] != self._id:
                    S3Upload(self._store, self._key, one["UploadId"]).abort()
        except StoreError as error:
            _LOG.warning("an upload of %s may have been left open: %s", self._key, error)


def _parse_range(text: str) -> tuple[int, int, int]:
    """First byte, last byte and size of the object, from a `Content-Range`."""
    found = re.fullmatch(r"bytes (\d+)-(-?\d+)/(\d+)", text)
    if not found:
        raise StoreError(f"the store sent a range that nobody can read: {text[:100]!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _status(error: BaseException | None) -> int:
    """The HTTP status behind one of our errors, 0 without."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) if isinstance(error, ClientError) else 0
