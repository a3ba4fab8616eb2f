"""S3 against a server, behind a proxy with faults, and with answers no server gives at will."""

import gc
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asyncckpt.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAuthError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsafeStoreError,
    UploadLostError,
)
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store import s3_client
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from tests.proxy import Proxy
from tests.unit.store.answers import answer, intercept, refusal

BIG = [bytes(300_000), memoryview(b"tail")]
QUICK = RetryPolicy(deadline_s=60, first_wait_s=0.01, max_wait_s=0.1)


@pytest.fixture
def store(moto_endpoint: str, s3_bucket: str) -> Iterator[S3Store]:
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint)) as store:
        yield store


@pytest.fixture
def proxy(moto_endpoint: str) -> Iterator[Proxy]:
    with Proxy(moto_endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxied(proxy: Proxy, s3_bucket: str) -> Iterator[S3Store]:
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=proxy.url)) as store:
        yield store


def headers_of_puts(store: S3Store) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = []

    def note(request: Any) -> None:
        seen.append({name.lower(): str(value) for name, value in request.headers.items()})

    intercept(store, "PutObject", note)
    return seen


def test_over_loopback_no_hash_of_the_body_is_sent(store: S3Store) -> None:
    seen = headers_of_puts(store)
    store.put("a", BIG)
    assert "UNSIGNED-PAYLOAD" in seen[0]["x-amz-content-sha256"]


def test_a_payload_is_signed_when_asked(moto_endpoint: str, s3_bucket: str) -> None:
    options = S3Options(endpoint_url=moto_endpoint, sign_payload=True)
    with S3Store(s3_bucket, "run", options) as store:
        seen = headers_of_puts(store)
        store.put("a", BIG)
        store.put("folder/a", BIG)
        assert len(seen) == 2
        for sent in seen:
            assert "UNSIGNED" not in sent["x-amz-content-sha256"]
            assert not [name for name in sent if "checksum" in name or name == "content-md5"]
        assert store.get("a", max_bytes=10**6) == b"".join(BIG)


def test_plain_http_to_another_host_is_signed_and_warned_of() -> None:
    options = S3Options(endpoint_url="http://minio.example:9000", region="us-east-1")
    with pytest.warns(UserWarning, match=r"minio\.example over plain http"):
        client = s3_client.make_client(options, s3_client.Expectation())
    assert client.meta.config.s3["payload_signing_enabled"] is True
    client.close()


@pytest.mark.parametrize(
    ("endpoint_url", "style"), [(None, "virtual"), ("https://s3.example", "path"), ("http://127.0.0.1:1", "path")]
)
def test_the_addressing_style_follows_the_endpoint(endpoint_url: str | None, style: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = S3Options(endpoint_url=endpoint_url, region="us-east-1")
        client = s3_client.make_client(options, s3_client.Expectation())
    assert client.meta.config.s3["addressing_style"] == style
    assert client.meta.config.s3["payload_signing_enabled"] is False
    client.close()


def test_an_endpoint_from_the_environment_is_addressed_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    client = s3_client.make_client(S3Options(region="us-east-1"), s3_client.Expectation())
    assert client.meta.endpoint_url == "https://s3.example"
    assert client.meta.config.s3["addressing_style"] == "path"
    client.close()


def test_the_first_body_is_asked_for_beforehand_and_later_ones_are_not(store: S3Store) -> None:
    seen = headers_of_puts(store)
    store.put("a", BIG)
    store.put("b", BIG)
    assert ["expect" in headers for headers in seen] == [True, False]
    intercept(store, "UploadPart", lambda _: refusal(503, "SlowDown"))
    with pytest.raises(TransientStoreError):
        store.start_upload("c").write(1, 0, BIG)
    store.put("d", BIG)
    assert ["expect" in headers for headers in seen] == [True, False, True]


def test_threads_share_one_client(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        clients = set(pool.map(lambda _: id(store._client()), range(16)))
    assert len(clients) == 1


def test_a_missing_bucket_is_told_at_once(moto_endpoint: str) -> None:
    with S3Store("no-such-bucket", "run", S3Options(endpoint_url=moto_endpoint)) as store:
        with pytest.raises(StoreNotFoundError, match=r"NoSuchBucket\): no-such-bucket; check"):
            store.put("a", [b"x"])
        with pytest.raises(StoreNotFoundError, match="no-such-bucket"):
            list(store.list())


def test_missing_credentials_are_told_at_once(
    moto_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = RetryingStore(S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint)))
    with pytest.raises(StoreAuthError, match="profile"):
        store.put("a", [b"x"])


def test_expired_credentials_are_looked_up_once_more(store: S3Store) -> None:
    first = store._client()
    intercept(store, "PutObject", lambda _: refusal(400, "ExpiredToken"))
    store.put("a", BIG)
    assert store._client() is not first
    assert store.get("a", max_bytes=10**6) == b"".join(BIG)


def test_a_listing_goes_over_pages(moto_endpoint: str, s3_bucket: str) -> None:
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint), page_keys=2) as store:
        names = [f"step-{step}.json" for step in range(5)]
        for name in (*names, "step-1/a/x", "step-3/a/x"):
            store.put(name, [b"x"])
        assert [entry.key for entry in store.list()] == sorted([*names, "step-1/a/x", "step-3/a/x"])
        assert [entry.key for entry in store.list(delimiter=True)] == sorted([*names, "step-1/", "step-3/"])


def test_a_listing_leaves_foreign_objects_out(store: S3Store) -> None:
    client, bucket = store._client(), store._bucket
    for name in ("run/", "run/Read Me.TXT", "run/folder/", "run/ok", "elsewhere"):
        client.put_object(Bucket=bucket, Key=name, Body=b"x")
    assert [entry.key for entry in store.list()] == ["ok"]


def test_an_outage_is_ridden_through(proxy: Proxy, proxied: S3Store) -> None:
    refused = threading.Event()
    store = RetryingStore(proxied, QUICK, on_retry=lambda _: refused.set())
    proxy.down = True

    def repair() -> None:
        refused.wait()
        proxy.down = False

    thread = threading.Thread(target=repair)
    thread.start()
    store.put("a", BIG)
    thread.join()
    assert store.get("a", max_bytes=10**6) == b"".join(BIG)


def test_a_lost_answer_of_a_conditional_put_reads_as_taken(proxy: Proxy, proxied: S3Store) -> None:
    store = RetryingStore(proxied, QUICK)
    proxy.drop_responses = 1
    with pytest.raises(ObjectExistsError):
        store.put("record", [b"mine"], if_absent=True)
    assert store.get("record", max_bytes=100) == b"mine"


def test_a_lost_answer_of_complete_is_success(proxy: Proxy, proxied: S3Store) -> None:
    store = RetryingStore(proxied, QUICK)
    upload = store.start_upload("a")
    upload.write(1, 0, BIG)
    proxy.drop_responses = 1
    upload.complete()
    assert store.get("a", max_bytes=10**6) == b"".join(BIG)


def test_complete_of_an_upload_that_expired_fails(store: S3Store) -> None:
    intercept(store, "CompleteMultipartUpload", lambda _: refusal(404, "NoSuchUpload"))
    store.put("a", [b"another size"])
    upload = store.start_upload("a")
    upload.write(1, 0, BIG)
    with pytest.raises(UploadLostError, match="NoSuchUpload"):
        upload.complete()


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [("UploadPart", 404, "NoSuchUpload"), ("CompleteMultipartUpload", 400, "InvalidPart")],
)
def test_an_upload_or_a_part_that_the_store_has_lost_is_told_apart(
    store: S3Store, operation: str, status: int, code: str
) -> None:
    intercept(store, operation, lambda _: refusal(status, code))
    store.put("a", BIG)  # of the size that the upload would have: a lost part is lost all the same
    upload = store.start_upload("a")
    with pytest.raises(UploadLostError, match=code):
        upload.write(1, 0, BIG)
        upload.complete()
    upload.abort()
    upload.abort()


def test_a_server_that_knows_no_expectation_is_sent_the_body_without_one(store: S3Store) -> None:
    seen = []

    def refuse(request: Any) -> Any:
        seen.append("Expect" in request.headers)
        return answer(417, "<html>Expectation Failed</html>", {"Content-Type": "text/html"}) if seen[-1] else None

    intercept(store, "PutObject", refuse)
    retrying = RetryingStore(store, QUICK)
    retrying.put("a", BIG)
    assert seen == [True, False]
    assert store.get("a", max_bytes=10**6) == b"".join(BIG)
    intercept(store, "GetObject", lambda _: refusal(503, "SlowDown"))
    with pytest.raises(TransientStoreError):
        store.get("a", max_bytes=10**6)
    intercept(store, "UploadPart", lambda _: refusal(503, "SlowDown"))
    with pytest.raises(TransientStoreError):
        store.start_upload("b").write(1, 0, BIG)
    retrying.put("c", BIG)  # behind a failure it would be asked again
    assert seen == [True, False, False]


def test_a_session_token_in_free_text_is_not_repeated(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = "an/opaque+token==of-somebody-elses-store"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    caplog.set_level("DEBUG", logger="asyncckpt")
    echoes = {
        "code": refusal(503, "SlowDown", f"slow down, {token}"),
        "page": answer(200, f"<html>{'x' * 70}{token}</html>", {"Content-Type": "text/html"}),
        "header": answer(200, "", {"Content-Type": token}),
    }
    for echo in echoes.values():
        intercept(store, "PutObject", lambda _, echo=echo: echo)
        told = []
        retrying = RetryingStore(
            store, RetryPolicy(deadline_s=0.02, first_wait_s=0.01, max_wait_s=0.01), on_retry=told.append
        )
        with pytest.raises(StoreError) as caught:
            retrying.put("a", [b"x"])
        text = "".join(traceback.format_exception(caught.value)) + repr(told) + caplog.text
        assert token[:10] not in text
        store.close()


def test_an_error_inside_a_200_of_complete_is_transient(store: S3Store) -> None:
    intercept(store, "CompleteMultipartUpload", lambda _: refusal(200, "InternalError"))
    upload = store.start_upload("a")
    upload.write(1, 0, BIG)
    with pytest.raises(TransientStoreError):
        upload.complete()
    upload.abort()


def test_a_lost_answer_of_a_start_leaves_no_upload_open(proxy: Proxy, proxied: S3Store) -> None:
    store = RetryingStore(proxied, QUICK)
    proxy.drop_responses = 1
    upload = store.start_upload("a")
    upload.write(1, 0, BIG)
    client = proxied._client()
    assert len(client.list_multipart_uploads(Bucket=proxied._bucket)["Uploads"]) == 1
    upload.complete()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=proxied._bucket)


@pytest.mark.parametrize("status", [400, 405, 501])
def test_without_batches_objects_are_deleted_one_by_one(store: S3Store, status: int) -> None:
    asked = []

    def refuse(_: object) -> Any:
        asked.append(1)
        return refusal(status, "NotImplemented")

    intercept(store, "DeleteObjects", refuse)
    for name in ("a", "b", "c", "d"):
        store.put(name, [b"x"])
    store.delete(["a", "b"])
    store.delete(["c", "d", "absent"])
    assert list(store.list()) == []
    assert len(asked) == 1


def test_a_key_that_a_batch_did_not_delete_is_named(store: S3Store) -> None:
    failed = "<Error><Key>run/b</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    intercept(store, "DeleteObjects", lambda _: answer(200, f"<DeleteResult>{failed}</DeleteResult>"))
    with pytest.raises(StoreAuthError) as caught:
        store.delete(["a", "b"])
    assert caught.value.key == "b"


def test_a_store_that_refuses_the_condition_is_unsafe(store: S3Store) -> None:
    def refuse(request: Any) -> Any:
        return refusal(501, "NotImplemented") if "If-None-Match" in request.headers else None

    intercept(store, "PutObject", refuse)
    with pytest.raises(UnsafeStoreError, match="single_writer=True"):
        store.put("a", [b"x"], if_absent=True)


def test_a_single_writer_does_without_the_condition(moto_endpoint: str, s3_bucket: str) -> None:
    def refuse(request: Any) -> Any:
        return refusal(501, "NotImplemented") if "If-None-Match" in request.headers else None

    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint, single_writer=True)) as store:
        intercept(store, "PutObject", refuse)
        store.put("a", BIG, if_absent=True)
        assert store.get("a", max_bytes=10**6) == b"".join(BIG)
        with pytest.raises(ObjectExistsError):
            store.put("a", [b"x"], if_absent=True)


@pytest.mark.parametrize("sent", ["bytes 0-4/10", "bytes 2-4/10", "nonsense"])
def test_another_range_than_asked_for_is_refused(store: S3Store, sent: str) -> None:
    headers = {"Content-Range": sent, "Content-Length": "5"}
    intercept(store, "GetObject", lambda _: answer(206, "01234", headers))
    with pytest.raises(StoreError):
        store.get_into("a", 1, memoryview(bytearray(5)))


def test_progress_is_told_while_bytes_move(moto_endpoint: str, s3_bucket: str) -> None:
    beats = []
    with S3Store(s3_bucket, "", S3Options(endpoint_url=moto_endpoint), progress=lambda: beats.append(1)) as store:
        store.put("a", [bytes(2**22)] * 6)
        sent = len(beats)
        store.get_into("a", 0, memoryview(bytearray(6 * 2**22)))
    assert sent >= 12
    assert len(beats) - sent >= 3


def test_a_slow_server_is_waited_for(proxy: Proxy, proxied: S3Store) -> None:
    proxy.delay_s = 0.05
    started_s = time.monotonic()
    proxied.put("a", [b"x"])
    assert time.monotonic() - started_s >= 0.1
    assert proxied.get("a", max_bytes=1) == b"x"


def test_a_store_that_refuses_the_condition_of_a_deletion_is_unsafe(store: S3Store) -> None:
    intercept(
        store, "DeleteObject", lambda request: refusal(501, "NotImplemented") if "If-Match" in request.headers else None
    )
    store.put("a", [b"x"])
    with pytest.raises(UnsafeStoreError, match="single_writer=True"):
        store.remove("a", store.get_version("a", max_bytes=1))
    assert store.get("a", max_bytes=1) == b"x"


@pytest.mark.parametrize(("code", "kind"), [("NoSuchKey", ObjectNotFoundError), ("NoSuchBucket", StoreNotFoundError)])
def test_a_404_of_a_replacement_says_what_is_gone(store: S3Store, code: str, kind: type[StoreError]) -> None:
    store.put("a", [b"x"])
    old = store.get_version("a", max_bytes=1)
    store.replace("a", [b"y"], old)
    intercept(store, "PutObject", lambda _: refusal(404, code))
    with pytest.raises(kind):
        store.replace("a", [b"z"], old)


def test_a_conflict_of_a_replacement_is_worth_another_try_and_changed_nothing(store: S3Store) -> None:
    store.put("a", [b"x"])
    old = store.get_version("a", max_bytes=1)
    store.replace("a", [b"y"], old)
    intercept(store, "PutObject", lambda _: refusal(409, "ConditionalRequestConflict"))
    with pytest.raises(TransientStoreError) as caught:
        store.replace("a", [b"z"], old)
    assert not caught.value.unanswered


def test_a_lost_answer_of_a_replacement_reads_as_changed(proxy: Proxy, proxied: S3Store) -> None:
    store = RetryingStore(proxied, QUICK)
    store.put("record", [b"first"])
    store.replace("record", [b"second"], store.get_version("record", max_bytes=100))
    old = store.get_version("record", max_bytes=100)
    proxy.drop_responses = 1
    with pytest.raises(ObjectChangedError) as caught:
        store.replace("record", [b"mine"], old)
    assert caught.value.unanswered
    assert store.get("record", max_bytes=100) == b"mine"


@pytest.mark.parametrize(
    ("answered", "unanswered"),
    [
        ((503, "SlowDown"), True),  # a gateway may say so, and carry the put out all the same
        ((400, "BadDigest"), False),
        ((500, "InternalError"), True),
        ((503, "ServiceUnavailable"), True),
        ((429, ""), False),
    ],
)
def test_an_answer_says_whether_anything_may_have_been_done(
    store: S3Store, answered: tuple[int, str], unanswered: bool
) -> None:
    intercept(store, "PutObject", lambda _: refusal(*answered))
    with pytest.raises(TransientStoreError) as caught:
        store.put("record", [b"x"], if_absent=True)
    assert caught.value.unanswered is unanswered


def test_what_never_left_this_host_has_changed_nothing(proxy: Proxy, proxied: S3Store) -> None:
    proxied.put("a/b", [b"x"])
    proxy.close()
    proxied.close()
    with pytest.raises(TransientStoreError) as caught:
        proxied.put("record", [b"x"], if_absent=True)
    assert not caught.value.unanswered


def test_a_put_whose_answer_was_lost_is_unanswered(proxy: Proxy, proxied: S3Store) -> None:
    proxied.put("a/b", [b"x"])
    proxy.drop_responses = 1
    with pytest.raises(TransientStoreError) as caught:
        proxied.put("record", [b"x"], if_absent=True)
    assert caught.value.unanswered


@pytest.mark.parametrize("fault", ["lost answer", "refused", "reset", "forbidden"])
def test_a_put_lets_go_of_its_buffers_whatever_came_of_it(proxy: Proxy, proxied: S3Store, fault: str) -> None:
    """They are views of an arena, which is to be unmapped."""
    store = RetryingStore(proxied, QUICK, sleep=lambda _: setattr(proxy, "down", False))
    store.put("a/first", BIG)
    source = bytearray(300_000)
    if fault == "lost answer":
        proxy.drop_responses = 1
    elif fault == "refused":
        answers = [refusal(503, "SlowDown"), refusal(500, "InternalError")]
        intercept(proxied, "PutObject", lambda _: answers.pop() if answers else None)
    elif fault == "reset":
        proxy.down = True
    else:
        intercept(proxied, "PutObject", lambda _: refusal(403, "AccessDenied"))
    gc.collect()
    gc.disable()
    try:
        try:
            store.put("a/second", [memoryview(source)])
        except StoreAuthError:
            assert fault == "forbidden"
        source.append(1)  # BufferError while anybody looks into it
    finally:
        gc.enable()
