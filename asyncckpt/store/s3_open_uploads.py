"""Multipart uploads that outlived their writers: S3 holds them open, unseen in any listing of objects."""

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from asyncckpt.errors import ObjectNotFoundError, StoreError, TransientStoreError, UploadLostError
from asyncckpt.store.base import OpenUpload, is_key
from asyncckpt.store.s3_errors import code_of, status_of

Ask = Callable[..., Any]
"""Sends one request: its operation, the key that it is about, and its parameters."""
_UNKNOWN = {405, 501}
_FIRST_UPLOAD_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""No upload of this program is older. Of one that is said to be, or without a time, nobody knows when it began: moto says 2010 of all."""


def find(ask: Ask, root: str, prefix: str, idle_since_s: float | None) -> list[OpenUpload]:
    """Those below `root`; keys are relative to it. A store that knows no such request has none that it could tell."""
    found = []
    try:
        for one in _pages(ask, "list_multipart_uploads", prefix, "Uploads", Prefix=root + prefix):
            name, upload_id = str(one["Key"]), str(one["UploadId"])
            key = name.removeprefix(root)
            if name.startswith(root + prefix) and is_key(key) and _is_idle(ask, key, one, idle_since_s):
                found.append(OpenUpload(key, upload_id))
    except KeyError as error:
        raise TransientStoreError(f"an open upload is listed without {error}", key=prefix) from error
    except (ObjectNotFoundError, UploadLostError):  # rclone's word for none
        return []
    except StoreError as error:
        if status_of(error.__cause__) not in _UNKNOWN and code_of(error.__cause__) != "NotImplemented":
            raise
    return found


def _is_idle(ask: Ask, key: str, one: dict[str, Any], idle_since_s: float | None) -> bool:
    """Whether it was begun before, and no part came since: over a thin link an upload may take more than a day."""
    if idle_since_s is None:
        return True
    begun_s = _seconds(one.get("Initiated"), 0.0)
    if begun_s >= idle_since_s:
        return False
    parts = _pages(ask, "list_parts", key, "Parts", Key=one["Key"], UploadId=one["UploadId"])
    try:
        times_s = [_seconds(part.get("LastModified"), math.inf) for part in parts]
    except (ObjectNotFoundError, UploadLostError):
        return False  # it has ended since
    return max(times_s) < idle_since_s if times_s else begun_s >= _FIRST_UPLOAD_S


def _seconds(said: datetime | None, unsaid_s: float) -> float:
    return unsaid_s if said is None else said.timestamp()


_NEXT = {
    "list_multipart_uploads": {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
    "list_parts": {"PartNumberMarker": "NextPartNumberMarker"},
}


def _pages(ask: Ask, operation: str, key: str, rows: str, **params: Any) -> Iterator[dict[str, Any]]:
    markers: dict[str, Any] = {}
    while True:
        page = ask(operation, key, **params, **markers)
        yield from page.get(rows, ())
        if not page.get("IsTruncated"):
            return
        following = {name: page[told] for name, told in _NEXT[operation].items() if page.get(told)}
        if not following or following == markers:
            raise TransientStoreError("a listing of uploads goes on, and does not say where", key=key)
        markers = following
