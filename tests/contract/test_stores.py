"""Every store, held to the contract; S3 against two servers that were written by others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt.errors import TransientStoreError
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.base import Store
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from tests.contract.store_contract import AtomicContract, ConditionalContract, StoreContract
from tests.faulty import FaultyStore


class TestMemoryStore(AtomicContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocalStore(AtomicContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "made" / "by the first write")


class TestRetryingStore(AtomicContract):
    @pytest.fixture
    def store(self) -> Store:
        def refusal() -> TransientStoreError:
            error = TransientStoreError("injected")
            error.unanswered = False
            return error

        every_second_call = range(1, 1_000_000, 2)
        policy = RetryPolicy(first_wait_s=1e-6, max_wait_s=1e-6)
        return RetryingStore(FaultyStore(MemoryStore(), every_second_call, error=refusal), policy)


class TestS3StoreOnMoto(AtomicContract):
    @pytest.fixture
    def store(self, moto_endpoint: str, s3_bucket: str) -> Iterator[Store]:
        with S3Store(s3_bucket, "some/prefix", S3Options(endpoint_url=moto_endpoint)) as store:
            yield store


class TestS3StoreOnRclone(StoreContract):
    @pytest.fixture
    def store(self, rclone_endpoint: str, rclone_bucket: str) -> Iterator[Store]:
        with S3Store(rclone_bucket, "some/prefix", S3Options(endpoint_url=rclone_endpoint)) as store:
            yield store

    def test_a_server_may_ignore_the_condition_so_the_store_is_unproven(self, store: Store) -> None:
        store.put("key", [b"first"], if_absent=True)
        store.put("key", [b"second"], if_absent=True)
        assert store.conditional_puts == "unproven"


class TestS3StoreOfASingleWriterOnRclone(ConditionalContract):
    """The promise of a single writer makes a look enough, where the server ignores the condition."""

    @pytest.fixture
    def store(self, rclone_endpoint: str, rclone_bucket: str) -> Iterator[Store]:
        options = S3Options(endpoint_url=rclone_endpoint, single_writer=True)
        with S3Store(rclone_bucket, "", options) as store:
            yield store
