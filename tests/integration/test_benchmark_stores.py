"""The stores of the benchmark: the sink is an S3 server, held to the contract of stores, and its pace is what it says."""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from asyncckpt.options import S3Options
from asyncckpt.store.base import Store
from asyncckpt.store.s3 import S3Store
from benchmarks.peers import objects
from benchmarks.stores import NAMES, Place, open_store
from benchmarks.stores.local import DISK
from benchmarks.stores.s3 import SinkStore
from tests.contract.store_contract import AtomicContract

pytestmark = pytest.mark.bench

MB = 10**6


@pytest.fixture(scope="module")
def sink() -> Iterator[SinkStore]:
    with SinkStore("sink") as store:
        yield store


@pytest.fixture
def place(sink: SinkStore) -> Place:
    return sink.place("test")


@pytest.fixture
def client(place: Place) -> Iterator[Any]:
    """As boto3 comes: with trailing checksums, chunked bodies and `Expect: 100-continue`."""
    config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
    made = boto3.client("s3", endpoint_url=place.endpoint_url, config=config)
    yield made
    made.close()


class TestS3StoreOnTheSink(AtomicContract):
    @pytest.fixture
    def store(self, place: Place) -> Iterator[Store]:
        with S3Store(place.bucket, place.prefix, S3Options(endpoint_url=place.endpoint_url)) as store:
            yield store


@pytest.mark.parametrize("delimiter", [False, True])
def test_a_listing_in_pages_is_the_listing_in_one(place: Place, delimiter: bool) -> None:
    names = ["a-b", "a.json", "a/b/c", "a/b.json", "a0", "b/x", "b/y", "c"]

    def listed(page_keys: int) -> list[str]:
        options = S3Options(endpoint_url=place.endpoint_url)
        with S3Store(place.bucket, place.prefix, options, page_keys=page_keys) as store:
            for name in names:
                store.put(name, [b"x"])
            return [entry.key for entry in store.list(delimiter=delimiter)]

    assert listed(1) == listed(3) == listed(1000)


def test_a_chunked_body_with_a_trailing_checksum_is_decoded(client: Any, place: Place) -> None:
    data = os.urandom(3 * MB)
    client.put_object(Bucket=place.bucket, Key="a key", Body=data, ChecksumAlgorithm="CRC32")
    assert client.get_object(Bucket=place.bucket, Key="a key")["Body"].read() == data


def test_a_body_in_chunks_of_http_and_of_s3_at_once_is_decoded(sink: SinkStore, client: Any, place: Place) -> None:
    inner = b"5;chunk-signature=ab\r\nhello\r\n3\r\n, w\r\n4\r\norld\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    for length in ({"x-amz-decoded-content-length": "12"}, {}):
        connection = http.client.HTTPConnection(sink.endpoint_url.removeprefix("http://"))
        pieces = [inner[at : at + 7] for at in range(0, len(inner), 7)]
        headers = {"Content-Encoding": "aws-chunked", "Transfer-Encoding": "chunked", **length}
        connection.request("PUT", f"/{place.bucket}/nested", pieces, headers, encode_chunked=True)
        assert connection.getresponse().read() == b""
        connection.request("GET", f"/{place.bucket}/nested")  # on the same connection: nothing was left over
        assert connection.getresponse().read() == b"hello, world"
        connection.close()


def test_upload_file_arrives_in_parts(client: Any, place: Place, tmp_path: Path) -> None:
    data = os.urandom(20 * MB)
    (tmp_path / "file").write_bytes(data)
    client.upload_file(str(tmp_path / "file"), place.bucket, "file")
    client.download_file(place.bucket, "file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_a_completed_upload_of_a_taken_key_is_refused(client: Any, place: Place) -> None:
    key = f"{place.prefix}/key"
    client.put_object(Bucket=place.bucket, Key=key, Body=b"first")
    upload = client.create_multipart_upload(Bucket=place.bucket, Key=key)["UploadId"]
    tag = client.upload_part(Bucket=place.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"second")["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
    named = {"Bucket": place.bucket, "Key": key, "UploadId": upload, "MultipartUpload": parts}
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.complete_multipart_upload(**named, IfNoneMatch="*")
    client.complete_multipart_upload(**named)
    assert client.get_object(Bucket=place.bucket, Key=key)["Body"].read() == b"second"


def test_a_copy_holds_the_same_bytes(client: Any, place: Place) -> None:
    client.put_object(Bucket=place.bucket, Key="a b+c", Body=b"content")
    client.copy_object(Bucket=place.bucket, Key="copy", CopySource={"Bucket": place.bucket, "Key": "a b+c"})
    assert client.get_object(Bucket=place.bucket, Key="copy", Range="bytes=-3")["Body"].read() == b"ent"


def test_objects_of_a_place_are_counted_and_deleted(client: Any, place: Place) -> None:
    for number in range(3):
        client.put_object(Bucket=place.bucket, Key=f"{place.prefix}/step-{number}/x", Body=b"12345")
    assert objects.bytes_at(place, "step-") == 15
    objects.delete_at(place, "step-1")
    assert objects.bytes_at(place, "step-") == 10


def test_the_counters_tell_what_was_done(client: Any, place: Place, sink: SinkStore) -> None:
    before = sink.stats()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: client.put_object(Bucket=place.bucket, Key=f"{n}", Body=bytes(MB)), range(8)))
    after = sink.stats()
    assert after["requests"] - before["requests"] == 8
    assert 8 * MB < after["bytes_in"] - before["bytes_in"] < 8.1 * MB
    assert after["most_connections"] >= 2
    assert sink.server_cpu_s() > 0


def test_a_server_that_discards_knows_the_size_of_what_it_threw_away() -> None:
    with SinkStore("sink", discard=True) as store:
        place = store.place("test")
        with S3Store(place.bucket, "", S3Options(endpoint_url=place.endpoint_url)) as s3:
            s3.put("small", [bytes(2**16)])
            s3.put("large", [bytes(10 * MB)])
            upload = s3.start_upload("parts")
            upload.write(1, 0, [bytes(6 * MB)])
            upload.write(2, 6 * MB, [bytes(1000)])
            upload.complete()
            sizes = {entry.key: entry.stored_bytes for entry in s3.list()}
            assert sizes == {"small": 2**16, "large": 10 * MB, "parts": 6 * MB + 1000}
            assert len(s3.get("small", max_bytes=2**16)) == 2**16


def test_every_request_waits_and_every_connection_keeps_its_pace() -> None:
    with SinkStore("wan", latency_ms=30, mb_per_s=90) as store:
        place = store.place("test")
        with S3Store(place.bucket, "", S3Options(endpoint_url=place.endpoint_url)) as s3:
            s3.put("warm", [b"x"])
            started = time.perf_counter()
            s3.put("small", [b"x"])
            assert 0.030 <= time.perf_counter() - started < 0.060
            data = bytes(18 * MB)  # 0.2 s
            target = memoryview(bytearray(len(data)))
            for move in (lambda: s3.put("large", [data]), lambda: s3.get_into("large", 0, target)):
                started = time.perf_counter()
                move()
                assert 0.21 <= time.perf_counter() - started < 0.35


def test_a_server_ends_when_its_parent_is_killed() -> None:
    code = (
        "from benchmarks.stores.s3 import SinkStore\n"
        "import os, signal\n"
        "store = SinkStore('sink').__enter__()\n"
        "print(store.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_store_gives_empty_places_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    disk = DISK.expanduser()
    before = set(disk.iterdir()) if disk.is_dir() else set()
    environment = dict(os.environ)
    (tmp_path / "scratch").mkdir()
    with open_store(name, tmp_path / "scratch") as store:
        first, second = store.place("torch.save+boto3"), store.place("torch.save+boto3")
        assert first != second
        for place in (first, second):
            if place.folder is not None:
                assert list(place.folder.iterdir()) == []
            else:
                assert objects.bytes_at(place, "") == 0
        assert store.requests() >= 0
    assert os.environ == environment
    assert not list((tmp_path / "scratch").iterdir())
    assert (set(disk.iterdir()) if disk.is_dir() else set()) == before
