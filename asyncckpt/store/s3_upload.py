"""Multipart uploads of `S3Store`."""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from asyncckpt.errors import ObjectNotFoundError, StoreError, UploadLostError
from asyncckpt.store.base import Buffers, Upload, byte_views
from asyncckpt.store.s3_checksums import Rung
from asyncckpt.store.s3_errors import status_of

if TYPE_CHECKING:
    from asyncckpt.store.s3 import S3Store

_LOG = logging.getLogger("asyncckpt")
ALGORITHMS: dict[Rung, str] = {"crc32c": "CRC32C", "crc32": "CRC32"}
"""What an upload announces at its begin; its parts carry it, and its end lists it."""


class S3Upload(Upload):
    """A multipart upload. `rung`: the checksum of its parts."""

    def __init__(self, store: "S3Store", key: str, upload_id: str, rung: Rung = "none") -> None:
        self._store = store
        self._key = key
        self._name = store._key(key)
        self._id = upload_id
        self._rung = rung
        self._parts: dict[int, tuple[dict[str, str], int]] = {}  # number to what the end lists of it, and bytes

    def write(self, part: int, offset: int, data: Buffers) -> None:  # noqa: ARG002 - the number alone orders the parts
        params = {"Key": self._name, "UploadId": self._id, "PartNumber": part}
        answer, sent = self._store._send_checked("upload_part", self._key, data, self._rung, part=part, **params)
        listed = {"ETag": answer["ETag"]}
        if self._rung in ALGORITHMS:
            listed |= sent
        self._parts[part] = (listed, sum(view.nbytes for view in byte_views(data)))

    def complete(self) -> None:
        """Also when an earlier try succeeded and its answer was lost: then the upload is gone and the object is there."""
        parts = [{"PartNumber": part, **listed} for part, (listed, _) in sorted(self._parts.items())]
        params = {"Key": self._name, "UploadId": self._id, "MultipartUpload": {"Parts": parts}}
        try:
            self._store._ask("complete_multipart_upload", self._key, **params)
        except UploadLostError as error:
            found = self._store.head(self._key) if status_of(error.__cause__) == 404 else None  # else a part is gone
            if found is None or found.stored_bytes != sum(part_bytes for _, part_bytes in self._parts.values()):
                raise

    def abort(self) -> None:
        with suppress(ObjectNotFoundError, UploadLostError):
            self._store._ask("abort_multipart_upload", self._key, Key=self._name, UploadId=self._id)

    def abort_others(self) -> None:
        """Abort other uploads of this key: a key has one writer, so they are ours, begun by a try whose answer was lost."""
        try:
            open_ones = self._store._ask("list_multipart_uploads", self._key, Prefix=self._name).get("Uploads", ())
            for one in open_ones:
                number = one.get("UploadId", self._id)
                if one.get("Key") == self._name and number != self._id:
                    S3Upload(self._store, self._key, number).abort()
        except StoreError as error:
            _LOG.warning("an upload of %s may have been left open: %s", self._key, error)
