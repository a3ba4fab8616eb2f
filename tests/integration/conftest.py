"""Trainers in processes of their own, and a store that goes down when a test says so."""

from collections.abc import Iterator

import pytest

from tests.proxy import Proxy
from tests.warm import Warm


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
