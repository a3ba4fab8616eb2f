"""A store below a prefix of an S3 bucket, on AWS or on anything that speaks S3."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

from botocore.exceptions import ClientError

from asyncckpt.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
    TransientStoreError,
)
from asyncckpt.options import S3Options
from asyncckpt.store import s3_open_uploads
from asyncckpt.store.base import (
    Buffer,
    Buffers,
    Entry,
    OpenUpload,
    Progress,
    Store,
    Version,
    byte_views,
    check_key,
    is_key,
)
from asyncckpt.store.s3_answers import entries, time_of
from asyncckpt.store.s3_checksums import Checksums, Rung, headers, refuses
from asyncckpt.store.s3_client import Body, Expectation, body_of, make_client, read_past_caches, signs_payload
from asyncckpt.store.s3_credentials import Programs
from asyncckpt.store.s3_download import S3Download, read_whole
from asyncckpt.store.s3_errors import CHANGED, code_of, mapped, status_of, translated, unsafe
from asyncckpt.store.s3_upload import ALGORITHMS, S3Upload
from asyncckpt.store.s3_wire import S3Wire
from asyncckpt.store.watch import Endurance

_DELETE_BATCH = 1000  # what DeleteObjects takes
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
        endurance: Endurance | None = None,
    ) -> None:
        self._past_caches = past_caches
        self._spares: list[S3Store] = []  # for `afresh`: clients are dear, and a bad path asks for many
        self._page_keys = page_keys
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._options = options or S3Options()
        self._progress = progress or (lambda: None)
        self._wire = S3Wire(self._progress, endurance or Endurance())
        self._lock = threading.Lock()
        self._made: Any = None
        self._expectation = Expectation()
        self._programs = Programs(self._progress)
        self._deletes_batches = True
        self._lost_starts: set[str] = set()
        self._checksums = Checksums(self._options.checksum, self._put_small, self._delete_one)
        self._lock_of_probe = threading.Lock()
        self._replaces = False  # proven: a put with another ETag in `If-Match` was refused
        self._folder = ""  # of an object that this store wrote; its writer may put another one beside it
        self.conditional_puts: Literal["atomic", "unproven", "single_writer"]
        self.conditional_puts = "single_writer" if self._options.single_writer else "unproven"

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        params = {"Key": self._key(key)}
        if not if_absent:
            self._put(key, data, **params)
            return
        with _around_the_put(unanswered=False):
            if self._options.single_writer and self.head(key):
                raise ObjectExistsError("the object exists already", key=key)
        try:
            self._put(key, data, **params, IfNoneMatch="*")
        except StoreError as error:
            if status_of(error.__cause__) != 501:
                raise
            if not self._options.single_writer:
                raise unsafe("refuses `If-None-Match`", key) from error
            self._put(key, data, **params)

    def start_upload(self, key: str) -> S3Upload:
        rung = self._rung(key)
        try:
            return self._start_upload(key, rung)
        except StoreError as error:
            if self._checksums.is_settled() or not refuses(error):
                raise
            return self._start_upload(key, "md5")

    def _start_upload(self, key: str, rung: Rung) -> S3Upload:
        announced = {"ChecksumAlgorithm": ALGORITHMS[rung]} if rung in ALGORITHMS else {}
        try:
            answer = self._ask("create_multipart_upload", key, Key=self._key(key), **announced)
        except TransientStoreError:
            self._lost_starts.add(key)  # it may have begun, and nobody was told its id
            raise
        upload = S3Upload(self, key, answer["UploadId"], rung)
        if key in self._lost_starts:
            upload.abort_others()
            self._lost_starts.discard(key)
        return upload

    def gather(self) -> list[Buffer]:
        return self._checksums.gather()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_version(key, max_bytes=max_bytes).data

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        S3Download(self, key, start, target.cast("B")).receive()

    @contextmanager
    def afresh(self) -> Iterator[Store]:
        with self._lock:
            spare = self._spares.pop() if self._spares else self._twin()
        try:
            yield spare
        finally:
            spare._hang_up()
            with self._lock:
                self._spares.append(spare)

    def _twin(self) -> "S3Store":
        return S3Store(
            self._bucket,
            self._prefix,
            self._options,
            progress=self._progress,
            page_keys=self._page_keys,
            past_caches=True,
            endurance=self._wire.endurance,
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
            found = entries(page, self._bucket, self._prefix)
            for entry in sorted(found, key=lambda entry: entry.key):
                folded = delimiter and entry.is_prefix
                if is_key(entry.key[:-1] if folded else entry.key) and entry.key > start_after:
                    yield entry
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not token or token == params.get("ContinuationToken"):
                raise TransientStoreError("a listing goes on, and does not say where", key=prefix)
            params["ContinuationToken"] = token

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        return read_whole(self, key, max_bytes)

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        """As the contract says. The first time a put that must be refused tells whether this store can: else `UnsafeStoreError`.

        With `single_writer` the object is read before and after instead.
        """
        name = self._key(key)
        if self._options.single_writer:
            with _around_the_put(unanswered=False):
                self._check_same(key, old)
            self._put(key, data, Key=name)
            with _around_the_put(unanswered=True):
                written = Version(b"".join(byte_views(data)), "")
                self._check_same(key, written, " although single_writer was promised")
            return
        with _around_the_put(unanswered=False):
            self._prove_replace(key)
        with _told_apart(key):
            self._put(key, data, Key=name, IfMatch=old.tag)

    def remove(self, key: str, old: Version) -> None:
        """By one DELETE with `If-Match`, where a store that ignores it (MinIO does) removes what stands. `single_writer`: by a look before."""
        condition = {"IfMatch": old.tag}
        with suppress(ObjectNotFoundError), _told_apart(key):
            if self._options.single_writer:
                condition = {}
                with _around_the_put(unanswered=False):
                    self._check_same(key, old)
            try:
                self._ask("delete_object", key, Key=self._key(key), **condition)
            except StoreError as error:
                if condition and status_of(error.__cause__) == 501:
                    raise unsafe("refuses `If-Match` for deletions", key) from error
                raise

    def _check_same(self, key: str, old: Version, although: str = "") -> None:
        try:
            same = self.get(key, max_bytes=len(old.data)) == old.data
        except ResourceLimitError:
            same = False
        if not same:
            raise ObjectChangedError(f"another object stands there by now{although}", key=key)

    def _prove_replace(self, key: str) -> None:
        """Once: a put that names another ETag than the object has must be refused."""
        with self._lock_of_probe:
            if self._replaces or self._refuses_another_tag(key):
                self._replaces = True
                return
        raise unsafe("ignores `If-Match`", key)

    def _refuses_another_tag(self, key: str) -> bool:
        folder = key.rpartition("/")[0] or self._folder
        probe = f"{folder}/probe" if folder else "probe"
        tag = self._put_small(probe, b"asyncckpt probe\n")["ETag"]
        try:
            self._put_small(probe, b"asyncckpt probe\n", IfMatch=f'"{"0" * (len(tag) - 2)}"')
        except ObjectExistsError:
            return True
        except ObjectNotFoundError as error:
            raise TransientStoreError("the object of a probe was removed meanwhile", key=key) from error
        except StoreError as error:
            if status_of(error.__cause__) not in (400, 501):
                raise
        finally:
            with suppress(StoreError):
                self._delete_one(probe)
        return False

    def delete(self, keys: Iterable[str]) -> None:
        todo = [check_key(key) for key in keys]
        for at in range(0, len(todo), _DELETE_BATCH):
            batch = todo[at : at + _DELETE_BATCH]
            if len(batch) == 1 or not self._delete_batch(batch):
                for key in batch:
                    self._delete_one(key)

    def _delete_one(self, key: str) -> None:
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
            if type(error) in (StoreError, ObjectNotFoundError) and status_of(error.__cause__) in _NO_BATCHES:
                self._deletes_batches = False
                return False
            raise
        for failed in answer.get("Errors", ()):
            if failed.get("Code") != "NoSuchKey":
                cause = ClientError(
                    {"Error": {"Code": failed.get("Code", ""), "Message": failed.get("Message", "")}}, "x"
                )
                raise mapped(cause, "delete_objects", str(failed.get("Key", ""))[len(self._prefix) :])
        return True

    def clock_s(self) -> float:
        return time_of(self._ask("list_objects_v2", "", Prefix=self._prefix, MaxKeys=1))

    def open_uploads(self, prefix: str = "", *, idle_since_s: float | None = None) -> Sequence[OpenUpload]:
        return s3_open_uploads.find(self._ask, self._prefix, prefix, idle_since_s)

    def abort_upload(self, upload: OpenUpload) -> None:
        S3Upload(self, upload.key, upload.token).abort()

    def close(self) -> None:
        with self._lock:
            client, self._made = self._made, None
            spares, self._spares = self._spares, []
        if client is not None:
            client.close()
        for spare in spares:
            spare.close()
        self._wire.watch.close()

    def part_bytes(self, most_bytes: int) -> int:
        return self._wire.sends.part_bytes(least_bytes=self.min_part_bytes, most_bytes=most_bytes)

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _client(self, *, but_not: Any = None) -> Any:
        """The one client of this process, another than `but_not`."""
        with self._lock:
            if self._made is None or self._made is but_not:
                self._made = make_client(self._options, self._expectation, self._programs)
                if self._past_caches:
                    read_past_caches(self._made)
            return self._made

    def _ask(self, operation: str, key: str, **params: Any) -> Any:
        """Send one request. Expired credentials are looked up anew, once."""
        works = operation == "complete_multipart_upload"  # S3 sends a space now and then until it is done
        with self._wire.watch.over(operation, may_dawdle=works), translated(operation, key, self._bucket):
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

    def _rung(self, key: str) -> Rung:
        with translated("client", key, self._bucket):
            signed = signs_payload(self._client())
        return self._checksums.rung(key, signed=signed)

    def _put(self, key: str, data: Buffers, **params: Any) -> None:
        """Put a body with its checksum."""
        with _around_the_put(unanswered=False):
            rung = self._rung(key)
        try:
            self._send_checked("put_object", key, data, rung, **params)
        except StoreError as error:
            if self._checksums.is_settled() or not refuses(error):
                raise
            # as old as S3: who knows no other knows this one
            self._send_checked("put_object", key, data, "md5", **params)
        self._folder = key.rpartition("/")[0] or self._folder

    def _put_small(self, key: str, data: bytes, **params: Any) -> Any:
        return self._send("put_object", key, Key=self._key(key), Body=data, **params)

    def _send_checked(
        self, operation: str, key: str, data: Buffers, rung: Rung, *, part: int = 0, **params: Any
    ) -> tuple[Any, dict[str, str]]:
        """The answer to a body that was sent with its checksum, and the checksum."""
        sent = headers(rung, data)
        try:
            answer = self._send(operation, key, Body=body_of(data, self._progress), **params, **sent)
        except StoreError as error:
            if code_of(error.__cause__) not in CHANGED:
                raise
            raise self._checksums.changed(key, part, error) from error.__cause__
        self._checksums.verify(rung, sent, answer, key, part)
        return answer, sent

    def _send(self, operation: str, key: str, **params: Any) -> Any:
        """`_ask` with a body, from its beginning, without the question beforehand while all goes well."""
        body = params["Body"]
        try:
            if isinstance(body, Body):
                with self._wire.body(self._wire.sends, operation, len(body)):
                    body.seek(0)
                    answer = self._ask(operation, key, **params)
            else:
                answer = self._ask(operation, key, **params)
        except StoreError:
            self._expectation.refusal = True
            raise
        self._expectation.refusal = False
        return answer


@contextmanager
def _around_the_put(*, unanswered: bool) -> Iterator[None]:
    """What fails before a request that changes something says that nothing was changed; what fails behind it says that much was."""
    try:
        yield
    except StoreError as error:
        error.unanswered = unanswered
        raise


@contextmanager
def _told_apart(key: str) -> Iterator[None]:
    """A precondition that failed is of an object that was read: it is another one by now."""
    try:
        yield
    except ObjectExistsError as error:
        changed = ObjectChangedError("another object stands there by now", key=key)
        changed.unanswered = error.unanswered
        raise changed from error
