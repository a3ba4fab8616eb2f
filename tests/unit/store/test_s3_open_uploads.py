"""Which uploads of a bucket are open, idle, and ours."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from asyncckpt.errors import StoreAuthError, StoreError, TransientStoreError
from asyncckpt.options import S3Options
from asyncckpt.store.base import OpenUpload
from asyncckpt.store.s3 import S3Store
from tests.unit.store.answers import answer, intercept, refusal

DAY_S = 24 * 3600.0
KEY = "step-0000000001/0123abcd-000001/x"


@pytest.fixture
def store(moto_endpoint: str, s3_bucket: str) -> Iterator[S3Store]:
    with S3Store(s3_bucket, "run", S3Options(endpoint_url=moto_endpoint)) as made:
        yield made


def asked(request: Any) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(request.url).query).items()}


def said(hours_ago: float) -> str:
    return datetime.fromtimestamp(1.8e9 - hours_ago * 3600, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def uploads(*rows: tuple[str, str, float], following: str = "") -> str:
    lines = "".join(
        f"<Upload><Key>{key}</Key><UploadId>{name}</UploadId><Initiated>{said(hours)}</Initiated></Upload>"
        for key, name, hours in rows
    )
    more = f"<NextKeyMarker>{following}</NextKeyMarker><NextUploadIdMarker>1</NextUploadIdMarker>" if following else ""
    truncated = "true" if following else "false"
    return (
        f"<ListMultipartUploadsResult><IsTruncated>{truncated}</IsTruncated>{more}{lines}</ListMultipartUploadsResult>"
    )


def parts(*hours: float) -> str:
    lines = "".join(f"<Part><PartNumber>1</PartNumber><LastModified>{said(one)}</LastModified></Part>" for one in hours)
    return f"<ListPartsResult><IsTruncated>false</IsTruncated>{lines}</ListPartsResult>"


def test_uploads_below_another_root_are_not_ours(store: S3Store, moto_endpoint: str) -> None:
    with S3Store(store._bucket, "run-2", S3Options(endpoint_url=moto_endpoint)) as other:
        other.start_upload(KEY)
        store.start_upload(KEY)
        store.start_upload("step-0000000002/0123abcd-000001/x")
        assert [upload.key for upload in store.open_uploads()] == [KEY, "step-0000000002/0123abcd-000001/x"]
        (mine,) = store.open_uploads("step-0000000001/0123abcd-000001/")
        store.abort_upload(mine)
        assert [upload.key for upload in store.open_uploads()] == ["step-0000000002/0123abcd-000001/x"]
        assert [upload.key for upload in other.open_uploads()] == [KEY]


def test_every_page_is_read(store: S3Store) -> None:
    pages = {"": uploads((f"run/{KEY}", "1", 30), following=f"run/{KEY}"), f"run/{KEY}": uploads(("run/b", "2", 30))}
    intercept(store, "ListMultipartUploads", lambda request: answer(200, pages[asked(request).get("key-marker", "")]))
    assert store.open_uploads() == [OpenUpload(KEY, "1"), OpenUpload("b", "2")]


def test_a_listing_that_goes_round_is_refused(store: S3Store) -> None:
    intercept(store, "ListMultipartUploads", lambda _: answer(200, uploads(("run/a", "1", 30), following="run/a")))
    with pytest.raises(TransientStoreError, match="goes on"):
        store.open_uploads()


AGES = {"young": 23.0, "old": 30.0, "slow": 30.0, "gone": 30.0, "empty": 30.0, "of-2010": 150_000.0}
AGES["of-2010-with-a-part"] = 150_000.0  # hours: the store does not tell when uploads began


def test_an_upload_is_idle_if_it_is_old_and_so_is_its_newest_part(store: S3Store) -> None:
    rows = [(f"run/{name}", name, hours) for name, hours in AGES.items()]
    intercept(store, "ListMultipartUploads", lambda _: answer(200, uploads(*rows)))
    answers = {
        "old": answer(200, parts(30, 29)),
        "slow": answer(200, parts(29, 1)),
        "gone": refusal(404, "NoSuchUpload"),
        "empty": answer(200, parts()),
        "of-2010": answer(200, parts()),
        "of-2010-with-a-part": answer(200, parts(30)),
    }
    intercept(store, "ListParts", lambda request: answers[asked(request)["uploadId"]])
    assert [one.key for one in store.open_uploads(idle_since_s=1.8e9 - DAY_S)] == [
        "old",
        "empty",
        "of-2010-with-a-part",
    ]


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (400, "NotImplemented"), (405, "MethodNotAllowed")]
)
def test_a_store_that_cannot_list_uploads_has_none(store: S3Store, status: int, code: str) -> None:
    intercept(store, "ListMultipartUploads", lambda _: refusal(status, code))
    assert store.open_uploads() == []


def test_a_missing_permission_is_told(store: S3Store) -> None:
    intercept(store, "ListMultipartUploads", lambda _: refusal(403, "AccessDenied"))
    with pytest.raises(StoreAuthError):
        store.open_uploads()


def test_an_upload_of_which_no_time_is_told_is_not_idle(store: S3Store) -> None:
    rows = "".join(f"<Upload><Key>run/{name}</Key><UploadId>{name}</UploadId></Upload>" for name in ("a", "b", "c"))
    body = f"<ListMultipartUploadsResult>{rows}</ListMultipartUploadsResult>"
    untold = "<ListPartsResult><Part><PartNumber>1</PartNumber></Part></ListPartsResult>"
    answers = {"a": answer(200, parts()), "b": answer(200, parts(30)), "c": answer(200, untold)}
    intercept(store, "ListMultipartUploads", lambda _: answer(200, body))
    intercept(store, "ListParts", lambda request: answers[asked(request)["uploadId"]])
    assert [one.key for one in store.open_uploads(idle_since_s=1.8e9 - DAY_S)] == ["b"]


def test_the_clock_is_the_servers_not_this_hosts(store: S3Store) -> None:
    listing = f"<ListBucketResult><Name>{store._bucket}</Name><IsTruncated>false</IsTruncated></ListBucketResult>"
    headers = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    intercept(store, "ListObjectsV2", lambda _: answer(200, listing, headers))
    assert store.clock_s() == datetime(2015, 10, 21, 7, 28, tzinfo=UTC).timestamp()
    headers["Date"] = "half past nine"
    with pytest.raises(StoreError, match="half past nine") as caught:
        store.clock_s()
    assert not isinstance(caught.value, TransientStoreError), "another try would fail alike"
