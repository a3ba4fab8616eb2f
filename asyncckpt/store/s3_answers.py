"""Whether an answer is S3's. A login page, a proxy or a wrong address may say "200 OK" or "404" to anything.

Each operation has something that only a store can answer: an ETag, an upload's id, the root of its XML, a 204. An answer without
it says nothing about what was asked, so it is worth another try, and at the deadline the message says who answered instead.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from asyncckpt.errors import StoreError, TransientStoreError
from asyncckpt.store.base import Entry
from asyncckpt.store.s3_errors import redact

_TOLD_CHARACTERS = 80
_READ_BYTES = 4096  # of a body, for the characters that are told: whole, so that no half of a credential stays
_HEADERS = {
    "PutObject": ("etag",),
    "UploadPart": ("etag",),
    "GetObject": ("etag", "content-length"),
    "HeadObject": ("etag", "content-length", "last-modified"),
}
_ROOTS = {
    "ListObjectsV2": "ListBucketResult",
    "ListParts": r"ListParts\w*",  # moto ends the word otherwise
    "ListMultipartUploads": "ListMultipartUploadsResult",
    "DeleteObjects": "DeleteResult",
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
    "CreateMultipartUpload": r"InitiateMultipartUpload\w*",  # rclone leaves the end of the word out
}
_ELEMENTS = {"CompleteMultipartUpload": "ETag", "CreateMultipartUpload": "UploadId"}
_DELETIONS = {"DeleteObject", "AbortMultipartUpload"}
_BEFORE_ROOT = rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>)?\s*<(?:\w+:)?"
_CODE = re.compile(rb"<(?:\w+:)?Code>")


def judging(endpoint_url: str) -> Callable[..., None]:
    """Handler of botocore's `before-parse`: raises `TransientStoreError` for an answer that is not S3's."""

    def judge(operation_model: Any, response_dict: dict[str, Any], **_: object) -> None:
        operation = operation_model.name
        headers = {name.lower(): value for name, value in response_dict["headers"].items()}
        status = response_dict["status_code"]
        body = response_dict["body"]
        wanted = _unlike_s3(operation, status, headers, body if isinstance(body, bytes) else b"")
        if wanted:
            kind = redact(headers.get("content-type", "no content type"))[:_TOLD_CHARACTERS]
            text = repr(redact(_beginning(body))[:_TOLD_CHARACTERS])
            raise TransientStoreError(
                f"{operation}: this answer is not S3's ({wanted}): status {status}, {kind}, {text}; is"
                f" {redact(endpoint_url)} an S3 endpoint, or did a proxy or a login page answer in its place?"
            )

    return judge


def entries(page: Mapping[str, Any], bucket: str, prefix: str) -> list[Entry]:
    """The lines of one page of a listing, keys below the prefix. `TransientStoreError` if it is of another bucket or lacks something.

    Every listing names its bucket; for an alias of an access point the name may be another one.
    """
    name = str(page.get("Name", ""))
    if name != bucket and not (name and bucket.endswith(("-s3alias", "--ol-s3"))):
        raise TransientStoreError(f"the store listed {name[:100]!r} when bucket {bucket!r} was asked for")
    try:
        found = [
            Entry(item["Key"][len(prefix) :], item["Size"], item["LastModified"].timestamp())
            for item in page.get("Contents", ())
        ]
        return found + [Entry(item["Prefix"][len(prefix) :]) for item in page.get("CommonPrefixes", ())]
    except KeyError as error:
        raise TransientStoreError(f"a line of a listing has no {error}") from error


def time_of(answer: Mapping[str, Any]) -> float:
    """When the store answered, by its own clock, in unix seconds. `StoreError` if it does not say."""
    said = str(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
    try:
        return parsedate_to_datetime(said).timestamp()
    except ValueError as error:
        raise StoreError(
            f"this store does not say what time it is ({said[:100]!r}), so nobody can tell what is old there"
        ) from error


def parse_range(text: str) -> tuple[int, int, int]:
    """First byte, last byte and size of the object, from a `Content-Range`."""
    found = re.fullmatch(r"bytes (\d+)-(-?\d+)/(\d+)", text)
    if not found:
        raise StoreError(f"the store sent a range that nobody can read: {text[:100]!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _unlike_s3(operation: str, status: int, headers: dict[str, str], body: bytes) -> str:
    """What is missing for an answer of S3; empty if nothing is."""
    if status >= 300:
        return _error_unlike_s3(operation, status, headers, body)
    root, element = _ROOTS.get(operation), _ELEMENTS.get(operation)
    lacks = next((f"it has no {name} header" for name in _HEADERS.get(operation, ()) if not headers.get(name)), "")
    if operation in ("PutObject", "UploadPart") and body.strip():
        lacks = lacks or "a put is answered without a body"
    if operation in ("GetObject", "HeadObject") and headers.get("content-type", "").startswith("text/html"):
        lacks = lacks or "no object of ours is a page"
    if operation in _DELETIONS and status != 204 and "x-amz-request-id" not in headers:
        lacks = "a deletion is answered by 204"
    if root and not re.match(_BEFORE_ROOT + root.encode() + rb"[\s/>]", body):
        lacks = "it is no " + root.removesuffix(r"\w*")
    elif element and not re.search(rf"<(?:\w+:)?{element}>\s*[^<\s]".encode(), body):
        lacks = f"it has no {element}"
    return lacks


def _error_unlike_s3(operation: str, status: int, headers: dict[str, str], body: bytes) -> str:
    """The same for an error. S3 says a code in XML wherever a body may be; 404 and 416 without one would be taken for loss."""
    if status < 400 and "x-amz-bucket-region" not in headers and not _CODE.search(body):
        return "S3 redirects to a region, and says which"
    if operation == "HeadObject" or _CODE.search(body):
        return ""
    if body.strip() or (status in (404, 416) and operation not in _DELETIONS):
        return "an error of S3 has a code"
    return ""


def _beginning(body: Any) -> str:
    """The first text; an answer that streams is closed."""
    if not isinstance(body, bytes):
        stream, body = body, b""
        with suppress(Exception):  # whatever the wire does now, the answer is refused
            body = stream.read(_READ_BYTES)
        with suppress(Exception):
            stream.close()
    return str(body[:_READ_BYTES].decode("utf-8", "replace"))
