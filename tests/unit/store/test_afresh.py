"""Reading again over other connections: what `Store.afresh` gives."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.opening import open_store
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from tests.faulty import FaultyStore
from tests.proxy import Proxy


@pytest.fixture
def proxy(rclone_endpoint):
    """Before a server that keeps connections open."""
    with Proxy(rclone_endpoint) as started:
        yield started


@pytest.fixture
def far(rclone_bucket, proxy):
    with open_store(f"s3://{rclone_bucket}/run", S3Options(endpoint_url=proxy.url)) as store:
        store.put("a/b", [b"0123456789"])
        yield store


def read(store):
    target = bytearray(4)
    store.get_into("a/b", 3, memoryview(target))
    return bytes(target)


def test_every_fresh_reading_from_s3_has_a_connection_of_its_own_and_the_usual_one_stays(far, proxy):
    assert read(far) == read(far) == b"3456"
    usual = proxy.connections
    for count in (1, 2, 3):
        with far.afresh() as fresh:
            assert read(fresh) == b"3456"
            assert fresh.head("a/b").stored_bytes == 10
            assert [entry.key for entry in fresh.list("a/")] == ["a/b"]
        assert proxy.connections == usual + count
    assert read(far) == b"3456"
    assert proxy.connections == usual + 3


def test_a_fresh_reading_from_s3_asks_caches_to_stand_aside_and_an_ordinary_one_does_not(far, proxy):
    heads = []
    hear = proxy._pump

    def pump(source, target, is_answer, state):
        class Heard:
            def __getattr__(self, name):
                return getattr(source, name)

            def recv(self, size):
                data = source.recv(size)
                heads.append(data.lower())
                return data

        return hear(source if is_answer else Heard(), target, is_answer, state)

    proxy._pump = pump
    with far.afresh() as fresh:
        read(fresh)
    assert b"cache-control: no-cache" in heads[0]
    signed = heads[0].partition(b"signedheaders=")[2].partition(b",")[0]
    assert b"host" in signed
    assert b"cache-control" not in signed, "a proxy may change it"
    heads.clear()
    far.close()
    read(far)
    assert heads
    assert not any(b"cache-control" in head for head in heads)


def test_two_may_read_afresh_at_once(far):
    with far.afresh() as one, far.afresh() as other:
        assert one is not other
        assert read(one) == read(other) == b"3456"


def test_a_store_without_connections_is_its_own(tmp_path):
    for store in (MemoryStore(), LocalStore(tmp_path)):
        store.put("a/b", [b"0123456789"])
        with store.afresh() as fresh:
            assert read(fresh) == b"3456"


def test_a_fresh_reading_is_retried_like_any_other():
    inner = FaultyStore(MemoryStore(), {1, 2}, operations={"get_into"})
    inner.inner.put("a/b", [b"0123456789"])
    naps = []
    with RetryingStore(inner, RetryPolicy(), sleep=naps.append).afresh() as fresh:
        assert read(fresh) == b"3456"
    assert naps


def test_two_that_want_the_one_idle_connection_at_the_same_moment_both_get_one():
    class Idle(list):
        """Where a look and a removal are two steps, both threads have looked before either removes."""

        def __len__(self):
            seen = super().__len__()
            with suppress(threading.BrokenBarrierError):
                looked.wait(0.2)
            return seen

    looked, both_have = threading.Barrier(2), threading.Barrier(2)
    with S3Store("bucket") as store:
        store._spares = Idle([store._twin()])

        def read_afresh(_):
            with store.afresh(), suppress(threading.BrokenBarrierError):
                both_have.wait(5)

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(read_afresh, range(2)))
