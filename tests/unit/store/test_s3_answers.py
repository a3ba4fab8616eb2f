"""What answers in S3's place: a login page, a proxy, a wrong address. It is asked again, never believed, and told."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncckpt.errors import DeadlineExceededError, ObjectNotFoundError, StoreAuthError, StoreError, TransientStoreError
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.base import Version
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from tests.unit.store.answers import answer, intercept, refusal

BIG = [bytes(300_000)]
PAGE = (
    "<!DOCTYPE html>\n<html>\n<head><title>Please log in</title></head>\n<body><p>Please log in</p></body>\n</html>\n"
)
HTML = {
    "Content-Type": "text/html",
    "Content-Length": str(len(PAGE)),
    "ETag": '"page"',
    "Last-Modified": "Sat, 28 Nov 2026 19:43:15 GMT",
}
PLAIN = {"Content-Length": "0"}


@pytest.fixture
def store(moto_endpoint: str, s3_bucket: str) -> Iterator[S3Store]:
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint)) as store:
        store.put("key", [b"content"])
        yield store


def upload_part(store: S3Store) -> None:
    store.start_upload("a").write(1, 0, BIG)


def complete(store: S3Store) -> None:
    upload = store.start_upload("a")
    upload.write(1, 0, BIG)
    upload.complete()


OPERATIONS: dict[str, tuple[str, Callable[[S3Store], Any]]] = {
    "put": ("PutObject", lambda store: store.put("a", BIG)),
    "put if absent": ("PutObject", lambda store: store.put("a", [b"x"], if_absent=True)),
    "replace": ("PutObject", lambda store: store.replace("key", [b"x"], Version(b"content", '"00"'))),
    "create": ("CreateMultipartUpload", lambda store: store.start_upload("a")),
    "part": ("UploadPart", upload_part),
    "complete": ("CompleteMultipartUpload", complete),
    "abort": ("AbortMultipartUpload", lambda store: store.start_upload("a").abort()),
    "get": ("GetObject", lambda store: store.get("key", max_bytes=10**6)),
    "version": ("GetObject", lambda store: store.get_version("key", max_bytes=10**6)),
    "range": ("GetObject", lambda store: store.get_into("key", 0, memoryview(bytearray(5)))),
    "head": ("HeadObject", lambda store: store.head("key")),
    "list": ("ListObjectsV2", lambda store: list(store.list())),
    "delete": ("DeleteObject", lambda store: store.delete(["key"])),
    "delete many": ("DeleteObjects", lambda store: store.delete(["key", "b"])),
    "remove": ("DeleteObject", lambda store: store.remove("key", Version(b"content", '"00"'))),
}


@pytest.mark.parametrize("named", OPERATIONS)
@pytest.mark.parametrize(
    ("body", "headers"), [(PAGE, HTML), ("", PLAIN), ("<ok/>", {"Content-Length": "5"})], ids=["page", "empty", "xml"]
)
def test_a_200_that_is_not_s3s_is_worth_another_try_and_told(
    store: S3Store, named: str, body: str, headers: dict[str, str]
) -> None:
    operation, call = OPERATIONS[named]
    intercept(store, operation, lambda _: answer(200, "" if named == "head" else body, headers))
    with pytest.raises(TransientStoreError) as caught:
        call(store)
    assert caught.value.unanswered or named == "replace"  # its first request is a probe
    assert store._client().meta.endpoint_url in str(caught.value)
    assert "status 200" in str(caught.value)
    if body is PAGE and named != "head":
        assert "text/html" in str(caught.value)
        assert "<!DOCTYPE html>" in str(caught.value)


@pytest.mark.parametrize(
    ("named", "status"),
    [
        *((name, 404) for name in OPERATIONS if name != "head"),
        *(("put if absent", status) for status in (302, 400, 403, 405, 409, 412, 501)),
        *(("range", status) for status in (302, 416)),
    ],
)
def test_a_page_that_says_no_is_no_word_of_s3(store: S3Store, named: str, status: int) -> None:
    """A 404 would be a lost object, a 412 a taken step, a 416 damage, a 501 a store that knows no condition."""
    operation, call = OPERATIONS[named]
    intercept(store, operation, lambda _: answer(status, PAGE, HTML))
    with pytest.raises(TransientStoreError, match="not S3"):
        call(store)


@pytest.mark.parametrize("named", ["get", "range", "list", "put"])
def test_a_404_without_a_word_is_no_word_of_s3(store: S3Store, named: str) -> None:
    operation, call = OPERATIONS[named]
    intercept(store, operation, lambda _: answer(404, "", PLAIN))
    with pytest.raises(TransientStoreError, match="has a code"):
        call(store)


def test_what_s3_says_is_believed(store: S3Store) -> None:
    for status, code, kind in ((404, "NoSuchKey", ObjectNotFoundError), (403, "AccessDenied", StoreAuthError)):
        intercept(store, "GetObject", lambda _, status=status, code=code: refusal(status, code))
        with pytest.raises(kind):
            store.get("key", max_bytes=10)
        store.close()


def test_a_listing_of_another_bucket_is_not_believed(store: S3Store) -> None:
    other = "<ListBucketResult><Name>elsewhere</Name><IsTruncated>false</IsTruncated></ListBucketResult>"
    intercept(store, "ListObjectsV2", lambda _: answer(200, other))
    with pytest.raises(TransientStoreError, match="elsewhere"):
        list(store.list())


def test_a_listing_that_ends_in_the_middle_is_worth_another_try(store: S3Store) -> None:
    intercept(store, "ListObjectsV2", lambda _: answer(200, "<ListBucketResult><Name>buck"))
    with pytest.raises(TransientStoreError):
        list(store.list())


def test_one_page_in_between_loses_nothing(store: S3Store) -> None:
    pages = [answer(200, PAGE, HTML), answer(200, "", PLAIN)]
    intercept(store, "PutObject", lambda _: pages.pop() if pages else None)
    retrying = RetryingStore(store, RetryPolicy(deadline_s=60, first_wait_s=0.01, max_wait_s=0.1))
    retrying.put("a", BIG)
    assert store.get("a", max_bytes=10**6) == BIG[0]


def test_at_the_deadline_it_is_said_who_answers_and_no_secret_with_it(store: S3Store) -> None:
    page = f"<html>{'X-Amz-Security-Token=FwoGZXIvYXdzE'}</html>"
    intercept(store, "PutObject", lambda _: answer(200, page, {"Content-Type": "text/html"}))
    retrying = RetryingStore(store, RetryPolicy(deadline_s=0.05, first_wait_s=0.01, max_wait_s=0.01))
    with pytest.raises(DeadlineExceededError, match="login page") as caught:
        retrying.put("a", [b"x"])
    assert caught.value.unanswered
    assert "FwoGZXIvYXdzE" not in str(caught.value)
    assert store._client().meta.endpoint_url in str(caught.value)


def test_a_get_without_a_length_is_a_typed_error(store: S3Store) -> None:
    intercept(store, "GetObject", lambda _: answer(200, "content", {"ETag": '"a"', "Transfer-Encoding": "chunked"}))
    with pytest.raises(StoreError, match="content-length"):
        store.get("key", max_bytes=100)


@pytest.mark.parametrize(("size", "date"), [("5", "yesterday"), ("five", "2026-11-28T19:43:15.000Z")])
def test_a_number_or_a_date_that_is_none_is_worth_another_try(store: S3Store, size: str, date: str) -> None:
    item = f"<Contents><Key>run/a</Key><Size>{size}</Size><LastModified>{date}</LastModified></Contents>"
    page = f"<ListBucketResult><Name>{store._bucket}</Name>{item}</ListBucketResult>"
    intercept(store, "ListObjectsV2", lambda _: answer(200, page))
    with pytest.raises(TransientStoreError):
        list(store.list())
    intercept(
        store, "HeadObject", lambda _: answer(200, "", {"ETag": "a", "Content-Length": size, "Last-Modified": date})
    )
    with pytest.raises(TransientStoreError):
        store.head("key")


def test_a_listing_without_what_each_line_has_is_worth_another_try(store: S3Store) -> None:
    page = f"<ListBucketResult><Name>{store._bucket}</Name><Contents><Key>run/a</Key></Contents></ListBucketResult>"
    intercept(store, "ListObjectsV2", lambda _: answer(200, page))
    with pytest.raises(TransientStoreError):
        list(store.list())


def test_a_listing_of_uploads_without_what_each_line_has_stops_nothing(store: S3Store) -> None:
    root = "ListMultipartUploadsResult"
    lines = "<Upload/><Upload><Key>run/a</Key></Upload><Upload><UploadId>x</UploadId></Upload>"
    intercept(store, "ListMultipartUploads", lambda _: answer(200, f"<{root}>{lines}</{root}>"))
    store.start_upload("a").abort_others()
