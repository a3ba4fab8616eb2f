"""Fixtures that every test may use: real S3 servers, started once a session and only if asked for."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy import Proxy
from tests.servers import ACCESS_KEY, SECRET_KEY, moto_server, rclone_server
from tests.warm import Warm

# Before anything makes a client, and inherited by every child process: never the credentials of who runs the tests.
for _name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(_name, None)
os.environ.update(
    AWS_ACCESS_KEY_ID=ACCESS_KEY,
    AWS_SECRET_ACCESS_KEY=SECRET_KEY,
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_CONFIG_FILE="/dev/null",
    AWS_SHARED_CREDENTIALS_FILE="/dev/null",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """URL of a moto server: honours `If-None-Match`."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session")
def rclone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rclone server serves: a subfolder is a bucket, a file an object."""
    return tmp_path_factory.mktemp("rclone")


@pytest.fixture(scope="session")
def rclone_endpoint(rclone_folder: Path) -> Iterator[str]:
    """URL of `rclone serve s3`: ignores `If-None-Match`."""
    with rclone_server(rclone_folder) as url:
        yield url


@pytest.fixture
def s3_bucket(moto_endpoint: str) -> str:
    """Name of a fresh bucket on the moto server."""
    return make_bucket(moto_endpoint)


@pytest.fixture
def rclone_bucket(rclone_endpoint: str) -> str:
    """Name of a fresh bucket on the rclone server."""
    return make_bucket(rclone_endpoint)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Forks trainers from a process that has imported torch."""
    with Warm() as started:
        yield started


@pytest.fixture
def proxy(moto_endpoint: str) -> Iterator[Proxy]:
    """In front of a real S3 server; `down` holds every save in the middle."""
    with Proxy(moto_endpoint) as started:
        yield started


@pytest.fixture
def s3_url(s3_bucket: str) -> str:
    """Where the checkpoints of a test go."""
    return f"s3://{s3_bucket}/run"


def make_bucket(endpoint_url: str) -> str:
    import boto3
    from botocore.config import Config

    name = f"bucket-{secrets.token_hex(6)}"
    client = boto3.client("s3", endpoint_url=endpoint_url, config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=name)
    client.close()
    return name
