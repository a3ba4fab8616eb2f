"""From a URL to a store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.opening import Location, open_store, parse_url

GOOD = {
    "s3://bucket": Location("s3", "bucket"),
    "s3://bucket/": Location("s3", "bucket"),
    "s3://my.bucket-1/runs/run 42/": Location("s3", "my.bucket-1", "runs/run 42"),
    "S3://bucket/Prefix": Location("s3", "bucket", "Prefix"),
    "file:///tmp/a%20b": Location("file", "/tmp/a b"),
    "file://localhost/tmp/a": Location("file", "/tmp/a"),
    "/tmp/a b": Location("file", "/tmp/a b"),
    "/tmp/a%20b": Location("file", "/tmp/a%20b"),
    "./odd:name": Location("file", str(Path.cwd() / "odd:name")),
    "runs": Location("file", str(Path.cwd() / "runs")),
    "memory://name": Location("memory", "name"),
}
BAD = [
    *("", "s3://", "s3:///prefix", "s3:/bucket/prefix", "s3://UPPER BUCKET/x", "s3://bucket/a//b", "s3://bucket/../b"),
    *(
        "s3://bucket/a\nb",
        "file://host/path",
        "file:///a?b",
        "file:///a#b",
        "file:relative",
        "memory://",
        "gs://bucket/x",
    ),
    *("http://host/x", "hf://repo", "a:b", "s3://-bucket", "nul\0"),
]


@pytest.mark.parametrize("url", GOOD)
def test_a_url_is_understood(url: str) -> None:
    assert parse_url(url) == GOOD[url]


@pytest.mark.parametrize("url", GOOD)
def test_a_location_prints_as_a_url_that_means_the_same(url: str) -> None:
    assert parse_url(str(GOOD[url])) == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url)


def test_a_path_object_is_a_path_even_with_a_colon() -> None:
    assert parse_url(Path("/tmp/s3:x")) == Location("file", "/tmp/s3:x")
    assert parse_url(Path("s3:x")) == Location("file", str(Path.cwd() / "s3:x"))


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_url("~/runs").place == "/home/somebody/runs"


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="do not belong") as caught:
        parse_url("s3://AKIAIOSFODNN7EXAMPLE:secret@bucket/prefix")
    assert "secret" not in str(caught.value)


def test_memories_are_shared_by_name() -> None:
    open_store("memory://opening-a").put("key", [b"x"])
    assert open_store("memory://opening-a").get("key", max_bytes=1) == b"x"
    assert open_store("memory://opening-b").head("key") is None


def test_a_folder_is_opened(tmp_path: Path) -> None:
    with open_store(tmp_path / "run") as store:
        store.put("a/key", [b"x"])
    assert (tmp_path / "run" / "a" / "key").read_bytes() == b"x"


def test_a_bucket_is_opened_with_its_options(moto_endpoint: str, s3_bucket: str) -> None:
    options = S3Options(endpoint_url=moto_endpoint, single_writer=True, retry=RetryPolicy(deadline_s=5))
    with open_store(f"s3://{s3_bucket}/a/b", options) as store:
        store.put("key", [b"x"])
        assert store.conditional_puts == "single_writer"
        assert store.min_part_bytes == 5 * 2**20
    with open_store(f"s3://{s3_bucket}", options) as store:
        assert [entry.key for entry in store.list()] == ["a/b/key"]


def test_options_of_s3_for_another_store_are_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://"):
        open_store(tmp_path, S3Options(region="eu-west-3"))
    open_store(tmp_path, S3Options())


def test_a_local_store_needs_no_boto(tmp_path: Path) -> None:
    program = (
        "import sys; from asyncckpt.store.opening import open_store; open_store(sys.argv[1]).put('key', [b'x'])\n"
        "assert not {'boto3', 'botocore', 'urllib3', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, os.fspath(tmp_path)], check=False)
    assert done.returncode == 0
