"""A byte that changes on its way to S3: the checksum that a put carries lets the store refuse it."""

import base64
import hashlib
import logging
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import StoreAuthError, StoreError, TransientStoreError, UnsafeStoreError
from asyncckpt.events import StoreRetried
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.base import Buffers
from asyncckpt.store.checksum import Crc, Summed, checksum, etag_of
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from tests.conftest import make_bucket
from tests.proxy import Proxy
from tests.servers import sink_server
from tests.unit.store.answers import intercept, refusal

BIG: Buffers = [bytes(300_000), memoryview(b"tail")]
QUICK = RetryPolicy(deadline_s=60, first_wait_s=0.01, max_wait_s=0.1)
SINKS = {"crc32c,crc32,md5": "crc32c", "crc32,md5": "crc32", "md5": "md5", "": "none"}
HEADERS = {"crc32c": "x-amz-checksum-crc32c", "crc32": "x-amz-checksum-crc32", "md5": "content-md5"}


@pytest.fixture(scope="module", params=SINKS)
def any_sink(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with sink_server(request.param) as url:
        yield url, SINKS[request.param]


@pytest.fixture(scope="module")
def sink() -> Iterator[str]:
    with sink_server("crc32c,crc32,md5") as url:
        yield url


@pytest.fixture
def proxy(sink: str) -> Iterator[Proxy]:
    with Proxy(sink) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: Proxy) -> Iterator[S3Store]:
    with S3Store(make_bucket(proxy.url), "run", S3Options(endpoint_url=proxy.url)) as store:
        yield store


def requests_of(store: S3Store, operation: str) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = []
    intercept(store, operation, lambda request: seen.append({n.lower(): _text(v) for n, v in request.headers.items()}))
    return seen


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_a_checksum_is_that_of_the_joined_buffers(buffers: list[bytes]) -> None:
    whole = b"".join(buffers)
    views = [memoryview(bytearray(buffer)) for buffer in buffers]
    assert base64.b64decode(checksum("crc32c", views)) == google_crc32c.value(whole).to_bytes(4, "big")
    assert base64.b64decode(checksum("crc32", views)) == zlib.crc32(whole).to_bytes(4, "big")
    assert etag_of(checksum("md5", views)) == hashlib.md5(whole).hexdigest()


@pytest.mark.parametrize("algorithm", ["crc32c", "crc32"])
@given(buffers=st.lists(st.binary(max_size=200), max_size=6))
def test_a_body_that_is_summed_as_it_comes_has_the_checksum_of_the_joined_buffers(
    algorithm: Crc, buffers: list[bytes]
) -> None:
    summed = Summed(algorithm)
    for buffer in buffers:
        summed.append(memoryview(bytearray(buffer)))
    assert checksum(algorithm, summed) == checksum(algorithm, buffers)


def test_a_sum_of_another_kind_than_the_store_asks_for_is_not_taken() -> None:
    summed = Summed("crc32c")
    summed.append(b"body")
    assert checksum("crc32", summed) == checksum("crc32", [b"body"])
    assert checksum("md5", summed) == checksum("md5", [b"body"])


def test_a_body_that_changes_after_it_was_gathered_is_refused_by_the_store(store: S3Store) -> None:
    """The sum is of what the encoder wrote: memory that changes while it waits for its upload is found, too."""
    content = bytearray(300_000)
    body = store.gather()
    body.append(memoryview(content))
    content[1000] ^= 1
    with pytest.raises(TransientStoreError, match="BadDigest"):
        store.put("step/shard", body)
    content[1000] ^= 1
    store.put("step/shard", body)
    assert store.get("step/shard", max_bytes=10**6) == bytes(content)


def test_a_checksum_of_many_megabytes_is_of_all_of_them() -> None:
    data = bytes(range(256)) * 10_000
    assert base64.b64decode(checksum("crc32c", [data])) == google_crc32c.value(data).to_bytes(4, "big")
    assert base64.b64decode(checksum("crc32", [data])) == zlib.crc32(data).to_bytes(4, "big")


def test_the_first_checksum_that_the_store_verifies_is_taken(
    any_sink: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    url, rung = any_sink
    with (
        S3Store(make_bucket(url), "run", S3Options(endpoint_url=url)) as store,
        caplog.at_level(logging.WARNING, "asyncckpt"),
    ):
        store.put("a/1", BIG)
        seen = requests_of(store, "PutObject")
        store.put("a/2", BIG)
        upload = store.start_upload("a/3")
        upload.write(1, 0, BIG)
        upload.complete()
        store.put("record", [b"x"], if_absent=True)
        assert [entry.key for entry in store.list()] == ["a/1", "a/2", "a/3", "record"]
    assert [sorted(set(sent) & set(HEADERS.values())) for sent in seen] == [
        [HEADERS[rung]] if rung in HEADERS else []
    ] * 2
    assert len(caplog.records) == (rung == "none")
    assert all("verifies no checksum" in record.getMessage() for record in caplog.records)


def test_every_rung_lets_a_flipped_body_be_refused(any_sink: tuple[str, str]) -> None:
    url, rung = any_sink
    with Proxy(url) as proxy, S3Store(make_bucket(url), "run", S3Options(endpoint_url=proxy.url)) as store:
        store.put("a/first", BIG)
        proxy.flip_requests = 1
        if rung == "none":
            store.put("a/flipped", BIG)
        else:
            with pytest.raises(TransientStoreError, match="BadDigest") as caught:
                store.put("a/flipped", BIG)
            assert not caught.value.unanswered
            assert store.head("a/flipped") is None


def test_a_flip_is_refused_resent_and_stored_right(proxy: Proxy, store: S3Store) -> None:
    told: list[StoreRetried] = []
    retrying = RetryingStore(store, QUICK, on_retry=told.append)
    proxy.flip_requests = 2
    retrying.put("a/b", BIG)
    assert store.get("a/b", max_bytes=10**6) == b"".join(BIG)
    assert len(told) == 2
    assert all("BadDigest" in event.error for event in told)


def test_a_flip_in_a_part_is_refused_resent_and_stored_right(proxy: Proxy, store: S3Store) -> None:
    retrying = RetryingStore(store, QUICK)
    ended: list[bytes] = []
    intercept(store, "CompleteMultipartUpload", lambda request: ended.append(request.body))
    begun = requests_of(store, "CreateMultipartUpload")
    parts = [b"a" * 5 * 2**20, b"b" * 100_000]
    upload = retrying.start_upload("a/b")
    proxy.flip_requests = 2
    upload.write(1, 0, [parts[0]])
    upload.write(2, len(parts[0]), [parts[1]])
    upload.complete()
    assert proxy.flip_requests == 0
    assert store.get("a/b", max_bytes=10**8) == b"".join(parts)
    assert begun[0]["x-amz-checksum-algorithm"] == "CRC32C"
    assert [checksum("crc32c", [part]).encode() in ended[0] for part in parts] == [True, True]


def test_three_flips_of_one_body_blame_the_path(proxy: Proxy, store: S3Store) -> None:
    told: list[StoreRetried] = []
    retrying = RetryingStore(store, QUICK, on_retry=told.append)
    proxy.flip_requests = 10**9
    with pytest.raises(StoreError, match="this path changes bytes") as caught:
        retrying.put("a/b", BIG)
    assert type(caught.value) is StoreError
    assert not caught.value.unanswered
    assert len(told) == 2


def test_a_flip_now_and_then_blames_nobody(proxy: Proxy, store: S3Store) -> None:
    retrying = RetryingStore(store, QUICK)
    for number in range(4):
        proxy.flip_requests = 1
        retrying.put("a/b", BIG)
        assert store.get("a/b", max_bytes=10**6) == b"".join(BIG), number


def test_where_the_etag_is_the_md5_it_is_held_against_the_body(moto_endpoint: str, s3_bucket: str) -> None:
    """moto verifies nothing, and says what it got."""
    with Proxy(moto_endpoint) as proxy, S3Store(s3_bucket, "run", S3Options(endpoint_url=proxy.url)) as store:
        store.put("a/first", BIG)
        proxy.flip_requests = 1
        with pytest.raises(TransientStoreError, match="other bytes than were sent") as caught:
            store.put("a/b", BIG)
        assert caught.value.unanswered  # the flipped body stands there
        store.put("a/b", BIG)
        assert store.get("a/b", max_bytes=10**6) == b"".join(BIG)


@pytest.mark.parametrize("choice", ["crc32c", "crc32", "md5", "none"])
def test_a_choice_is_taken_without_asking(sink: str, choice: Any) -> None:
    with S3Store(make_bucket(sink), "run", S3Options(endpoint_url=sink, checksum=choice)) as store:
        seen = requests_of(store, "PutObject")
        store.put("a/b", BIG)
    assert [sorted(set(sent) & set(HEADERS.values())) for sent in seen] == [
        [HEADERS[choice]] if choice in HEADERS else []
    ]


def test_a_word_that_is_no_checksum_is_refused() -> None:
    with pytest.raises(ValueError, match="when_required"):
        S3Options(checksum="when_required")  # type: ignore[arg-type]


def test_what_the_store_verifies_is_asked_once(store: S3Store) -> None:
    seen = requests_of(store, "PutObject")
    for number in range(5):
        store.put(f"a/{number}", BIG)
    assert len(seen) == 5 + 2


def test_before_it_is_known_a_put_without_a_folder_carries_crc32c(store: S3Store) -> None:
    seen = requests_of(store, "PutObject")
    store.put("record", [b"x"])
    assert [sorted(set(sent) & set(HEADERS.values())) for sent in seen] == [[HEADERS["crc32c"]]]


@pytest.mark.parametrize(
    ("status", "code"),
    [(501, "NotImplemented"), (400, "InvalidRequest"), (400, "InvalidArgument"), (403, "SignatureDoesNotMatch")],
)
def test_a_store_that_refuses_a_header_is_given_the_next(store: S3Store, status: int, code: str) -> None:
    def refuse(request: Any) -> Any:
        return refusal(status, code) if any("checksum" in name.lower() for name in request.headers) else None

    intercept(store, "PutObject", refuse)
    store.put("record", [b"x"])
    store.put("a/b", BIG)
    seen = requests_of(store, "PutObject")
    store.put("a/c", BIG)
    assert "content-md5" in seen[0]


@pytest.mark.parametrize(
    ("answered", "kind"), [((503, "SlowDown"), TransientStoreError), ((403, "AccessDenied"), StoreAuthError)]
)
def test_a_probe_that_fails_settles_nothing(store: S3Store, answered: tuple[int, str], kind: type[StoreError]) -> None:
    answers = [answered]
    intercept(store, "PutObject", lambda _: refusal(*answers.pop()) if answers else None)
    with pytest.raises(kind) as caught:
        store.put("a/b", BIG)
    assert not caught.value.unanswered
    store.put("a/b", BIG)
    seen = requests_of(store, "PutObject")
    store.put("a/c", BIG)
    assert HEADERS["crc32c"] in seen[0]


def test_a_probe_that_cannot_be_removed_fails_nobody(store: S3Store) -> None:
    intercept(store, "DeleteObject", lambda _: refusal(403, "AccessDenied"))
    store.put("a/b", BIG)
    assert [entry.key for entry in store.list()] == ["a/b", "a/probe"]


def test_a_store_that_ignores_if_match_replaces_nothing(rclone_endpoint: str, rclone_bucket: str) -> None:
    with S3Store(rclone_bucket, "run", S3Options(endpoint_url=rclone_endpoint)) as store:
        store.put("a/own", [b"x"])
        store.put("key", [b"first"])
        with pytest.raises(UnsafeStoreError, match="single_writer=True") as caught:
            store.replace("key", [b"second"], store.get_version("key", max_bytes=10))
        assert not caught.value.unanswered
        assert store.get("key", max_bytes=10) == b"first"
        assert [entry.key for entry in store.list()] == ["a/own", "key"]


def test_puts_beside_the_one_that_asks_wait_for_nobody(store: S3Store) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hold(request: Any) -> None:
        if request.url.endswith("/probe"):
            asked.set()
            assert go_on.wait(30)

    intercept(store, "PutObject", hold)
    asking = threading.Thread(target=store.put, args=("a/first", BIG))
    asking.start()
    assert asked.wait(30)
    seen = requests_of(store, "PutObject")
    store.put("a/beside", BIG)
    upload = store.start_upload("a/upload")
    upload.write(1, 0, BIG)
    upload.complete()
    assert HEADERS["crc32c"] in seen[0]
    go_on.set()
    asking.join(30)
    assert [entry.key for entry in store.list()] == ["a/beside", "a/first", "a/upload"]


def test_an_upload_whose_algorithm_is_refused_before_that_is_known_does_without(store: S3Store) -> None:
    def refuse(request: Any) -> Any:
        return refusal(501, "NotImplemented") if "x-amz-checksum-algorithm" in request.headers else None

    intercept(store, "CreateMultipartUpload", refuse)
    upload = store.start_upload("upload")
    seen = requests_of(store, "UploadPart")
    upload.write(1, 0, BIG)
    upload.complete()
    assert "content-md5" in seen[0]
    assert store.get("upload", max_bytes=10**6) == b"".join(BIG)
