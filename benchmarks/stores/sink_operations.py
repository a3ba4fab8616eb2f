"""S3's operations on the sink's objects: what a request asks for, and its answer in XML."""

import base64
import hashlib
import time
import zlib
from collections.abc import Callable, Collection
from email.utils import formatdate
from urllib.parse import quote, unquote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import google_crc32c

from benchmarks.stores.sink_http import Answer, Request
from benchmarks.stores.sink_objects import Content, Objects, RefusedError

_Operation = Callable[[Objects, Request, Content], Answer]


def answer_to(objects: Objects, request: Request, body: Content, *, verifies: Collection[str] = ()) -> Answer:
    """Do what is asked for. `body`: the request's, decoded. `verifies`: checksums in headers that are held against it; others are ignored."""
    try:
        _verify(request, body, verifies)
        return _operation(request)(objects, request, body)
    except RefusedError as error:
        text = f"<Error><Code>{error.code}</Code><Message>{error.code}</Message></Error>"
        return _xml(text, error.status, sent=request.method != "HEAD")


def _verify(request: Request, body: Content, verifies: Collection[str]) -> None:
    """Refuse a body that is not what its sender says, as S3 does."""
    for name in verifies:
        header, compute = _CHECKSUMS[name]
        stated = request.headers.get(header)
        if stated is not None and base64.b64encode(compute(b"".join(body.pieces))).decode() != stated:
            raise RefusedError(400, "BadDigest")


def _operation(request: Request) -> _Operation:
    query = request.query
    kind = next((word for word in ("delete", "uploads", "uploadId") if word in query), "")
    if "x-amz-copy-source" in request.headers:
        kind = f"{kind}copy"
    found = (_OF_OBJECTS if request.key else _OF_BUCKETS).get((request.method, kind))
    if found is None:
        raise RefusedError(501, "NotImplemented")
    return found


def _create_bucket(objects: Objects, request: Request, _body: Content) -> Answer:
    objects.create_bucket(request.bucket)
    return Answer(200, {"Location": f"/{request.bucket}"})


def _head_bucket(objects: Objects, request: Request, _body: Content) -> Answer:
    objects.check_bucket(request.bucket)
    return Answer(200, {"x-amz-bucket-region": "us-east-1"})


def _put(objects: Objects, request: Request, body: Content) -> Answer:
    if_match = request.headers.get("if-match")
    objects.put(request.bucket, request.key, body, if_absent=_if_absent(request), if_match=if_match)
    return Answer(200, {"ETag": body.etag})


def _copy(objects: Objects, request: Request, _body: Content) -> Answer:
    bucket, _, key = unquote(request.headers["x-amz-copy-source"]).lstrip("/").partition("/")
    content = objects.get(bucket, key)
    objects.put(request.bucket, request.key, content, if_absent=_if_absent(request))
    return _xml(
        f"<CopyObjectResult><ETag>{escape(content.etag)}</ETag>"
        f"<LastModified>{_iso(content.modified_s)}</LastModified></CopyObjectResult>"
    )


def _get(objects: Objects, request: Request, _body: Content) -> Answer:
    content = objects.get(request.bucket, request.key)
    if request.headers.get("if-match", content.etag) != content.etag:
        raise RefusedError(412, "PreconditionFailed")
    headers = {
        "ETag": content.etag,
        "Last-Modified": formatdate(content.modified_s, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
    }
    start, end, status = 0, content.size_bytes, 200
    if asked := request.headers.get("range", "").removeprefix("bytes="):
        first, _, last = asked.partition("-")
        start = int(first) if first else max(0, end - int(last))
        end = min(end, int(last) + 1) if first and last else end
        if start >= end:
            raise RefusedError(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size_bytes}"
        status = 206
    if request.method == "HEAD":
        return Answer(status, headers, length_bytes=end - start, sent=False)
    return Answer(status, headers, content.part(start, end))


def _delete(objects: Objects, request: Request, _body: Content) -> Answer:
    objects.delete(request.bucket, [request.key], if_match=request.headers.get("if-match"))
    return Answer(204, {})


def _delete_many(objects: Objects, request: Request, body: Content) -> Answer:
    keys = [_text(found, "Key") for found in _parsed(body).iter() if _tag(found) == "Object"]
    objects.delete(request.bucket, keys)
    quiet = any(_tag(found) == "Quiet" and found.text == "true" for found in _parsed(body).iter())
    deleted = "" if quiet else "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
    return _xml(f"<DeleteResult>{deleted}</DeleteResult>")


def _start_upload(objects: Objects, request: Request, _body: Content) -> Answer:
    upload_id = objects.start_upload(request.bucket, request.key)
    return _xml(
        f"<InitiateMultipartUploadResult><Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.key)}</Key>"
        f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
    )


def _put_part(objects: Objects, request: Request, body: Content) -> Answer:
    objects.put_part(request.query["uploadId"], int(request.query["partNumber"]), body)
    return Answer(200, {"ETag": body.etag})


def _complete(objects: Objects, request: Request, body: Content) -> Answer:
    wanted = [
        (int(_text(part, "PartNumber")), f'"{_text(part, "ETag").strip(chr(34))}"')
        for part in _parsed(body).iter()
        if _tag(part) == "Part"
    ]
    content = objects.complete(request.query["uploadId"], wanted, if_absent=_if_absent(request))
    return _xml(
        f"<CompleteMultipartUploadResult><Location>/{escape(request.bucket)}/{escape(request.key)}</Location>"
        f"<Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.key)}</Key>"
        f"<ETag>{escape(content.etag)}</ETag></CompleteMultipartUploadResult>"
    )


def _abort(objects: Objects, request: Request, _body: Content) -> Answer:
    objects.abort(request.query["uploadId"])
    return Answer(204, {})


def _list_uploads(objects: Objects, request: Request, _body: Content) -> Answer:
    found = "".join(
        f"<Upload><Key>{escape(key)}</Key><UploadId>{name}</UploadId><Initiated>{_iso(begun_s)}</Initiated></Upload>"
        for key, name, begun_s in objects.open_uploads(request.bucket, request.query.get("prefix", ""))
    )
    return _xml(f"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{found}</ListMultipartUploadsResult>")


def _list_parts(objects: Objects, request: Request, _body: Content) -> Answer:
    found = "".join(
        f"<Part><PartNumber>{number}</PartNumber><LastModified>{_iso(one.modified_s)}</LastModified>"
        f"<ETag>{escape(one.etag)}</ETag><Size>{one.size_bytes}</Size></Part>"
        for number, one in objects.parts(request.query["uploadId"])
    )
    return _xml(f"<ListPartsResult><IsTruncated>false</IsTruncated>{found}</ListPartsResult>")


def _list(objects: Objects, request: Request, _body: Content) -> Answer:
    query = request.query
    encoded = query.get("encoding-type") == "url"
    after = unquote(query["continuation-token"]) if "continuation-token" in query else query.get("start-after", "")
    most = min(1000, int(query.get("max-keys", "1000")))
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    page = objects.page(request.bucket, prefix, delimiter, after, most)

    def name(key: str) -> str:
        return quote(key, safe="/") if encoded else escape(key)

    contents = "".join(
        f"<Contents><Key>{name(key)}</Key><LastModified>{_iso(one.modified_s)}</LastModified>"
        f"<ETag>{escape(one.etag)}</ETag><Size>{one.size_bytes}</Size></Contents>"
        for key, one in page.contents
    )
    prefixes = "".join(f"<CommonPrefixes><Prefix>{name(key)}</Prefix></CommonPrefixes>" for key in page.prefixes)
    more = page.next_token is not None
    token = f"<NextContinuationToken>{quote(page.next_token or '')}</NextContinuationToken>" if more else ""
    return _xml(
        f"<ListBucketResult><Name>{escape(request.bucket)}</Name><Prefix>{name(prefix)}</Prefix>"
        f"<KeyCount>{len(page.contents) + len(page.prefixes)}</KeyCount><MaxKeys>{most}</MaxKeys>"
        f"{'<EncodingType>url</EncodingType>' if encoded else ''}"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}{prefixes}</ListBucketResult>"
    )


def _if_absent(request: Request) -> bool:
    return request.headers.get("if-none-match") == "*"


def _xml(text: str, status: int = 200, *, sent: bool = True) -> Answer:
    declared = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return Answer(status, {"Content-Type": "application/xml"}, [declared], sent)


def _parsed(body: Content) -> ET.Element:
    try:
        return ET.fromstring(b"".join(body.pieces))
    except ET.ParseError as error:
        raise RefusedError(400, "MalformedXML") from error


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ET.Element, tag: str) -> str:
    found = next((child.text for child in element if _tag(child) == tag), None)
    if found is None:
        raise RefusedError(400, "MalformedXML")
    return found


def _iso(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s)) + f".{int(unix_s % 1 * 1000):03}Z"


_CHECKSUMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "crc32c": ("x-amz-checksum-crc32c", lambda data: google_crc32c.value(data).to_bytes(4, "big")),
    "crc32": ("x-amz-checksum-crc32", lambda data: zlib.crc32(data).to_bytes(4, "big")),
    "md5": ("content-md5", lambda data: hashlib.md5(data).digest()),
}
CHECKSUMS = tuple(_CHECKSUMS)
_OF_BUCKETS: dict[tuple[str, str], _Operation] = {
    ("PUT", ""): _create_bucket,
    ("HEAD", ""): _head_bucket,
    ("GET", ""): _list,
    ("GET", "uploads"): _list_uploads,
    ("POST", "delete"): _delete_many,
}
_OF_OBJECTS: dict[tuple[str, str], _Operation] = {
    ("GET", ""): _get,
    ("HEAD", ""): _get,
    ("PUT", ""): _put,
    ("PUT", "copy"): _copy,
    ("PUT", "uploadId"): _put_part,
    ("GET", "uploadId"): _list_parts,
    ("DELETE", ""): _delete,
    ("POST", "uploads"): _start_upload,
    ("POST", "uploadId"): _complete,
    ("DELETE", "uploadId"): _abort,
}
