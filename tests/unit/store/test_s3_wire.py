"""S3 over thin, trickling and dead links: real sockets, with rates and patience a hundred times smaller than the real ones."""

import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from asyncckpt.errors import TransientStoreError
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store import s3_client, watch
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3 import S3Store
from asyncckpt.store.watch import Endurance
from tests.proxy import Proxy
from tests.unit.store.answers import intercept, refusal

QUICK = RetryPolicy(deadline_s=60, first_wait_s=0.01, max_wait_s=0.1)
SOON = Endurance(still_s=0.5, floor_bytes_per_s=50_000, sending_s=0.5, receiving_s=0.3, tick_s=0.05)
UPLINK_BYTES_PER_S = 1_000_000


@pytest.fixture
def proxy(moto_endpoint: str) -> Iterator[Proxy]:
    with Proxy(moto_endpoint, thin=True) as proxy:
        yield proxy


def over(proxy: Proxy, bucket: str, endurance: Endurance = SOON) -> S3Store:
    store = S3Store(bucket, "run", S3Options(endpoint_url=proxy.url), endurance=endurance)
    store.put("first", [b"finds out which checksum this store knows"])
    return store


def ranges_of_gets(store: S3Store) -> list[str]:
    seen: list[str] = []
    intercept(store, "GetObject", lambda request: seen.append(str(request.headers.get("Range"))))
    return seen


def test_sixteen_connections_that_share_a_thin_uplink_all_arrive(
    proxy: Proxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets less than the floor, takes longer than any timeout, and none is given up: they would only begin again."""
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(s3_client, "CONNECT_TIMEOUT_S", 0.5)
    bodies = [bytes([number]) * 80_000 for number in range(32)]
    with over(proxy, s3_bucket, Endurance(0.5, 1_000_000, 0.5, 0.3, 0.05)) as store:
        proxy.uplink_bytes_per_s = UPLINK_BYTES_PER_S
        began_s = time.monotonic()
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda number: store.put(f"a/{number}", [bodies[number]]), range(32)))
        took_s = time.monotonic() - began_s
        proxy.uplink_bytes_per_s = None
        assert took_s < 1.5 * sum(map(len, bodies)) / UPLINK_BYTES_PER_S
        assert [store.get(f"a/{number}", max_bytes=10**6) for number in range(32)] == bodies


def test_one_connection_that_is_slower_than_the_others_is_given_up(proxy: Proxy, s3_bucket: str) -> None:
    proxy.trickle = lambda line: "/sick " in line
    with over(proxy, s3_bucket) as store:
        for key in ("well", "sick"):
            store.put(key, [bytes(200_000)])
        store.get_into("well", 0, memoryview(bytearray(200_000)))
        with pytest.raises(TransientStoreError, match=r"get_object: \d\.\d kB/s for 0\.3 s, gave the connection up"):
            store.get_into("sick", 0, memoryview(bytearray(200_000)))


def test_a_get_that_trickles_is_asked_for_over_another_connection(proxy: Proxy, s3_bucket: str) -> None:
    content = random.Random(1).randbytes(400_000)
    sick = iter([True])
    proxy.trickle = lambda line: "/a " in line and next(sick, False)
    with over(proxy, s3_bucket) as inner:
        store = RetryingStore(inner, QUICK)
        store.put("a", [content])
        target, began_s = bytearray(len(content)), time.monotonic()
        store.get_into("a", 0, memoryview(target))
        assert time.monotonic() - began_s < 5.0
        assert target == content


def test_a_get_goes_on_where_its_connection_broke(proxy: Proxy, s3_bucket: str) -> None:
    content = random.Random(2).randbytes(900_000)
    with over(proxy, s3_bucket) as store:
        store.put("a", [content])
        proxy.truncate_response_bytes = 400_000
        seen = ranges_of_gets(store)
        target = bytearray(800_000)
        store.get_into("a", 50_000, memoryview(target))
        assert target == content[50_000:850_000]
        starts = [int(text.partition("=")[2].partition("-")[0]) for text in seen]
        assert len(starts) == 3
        assert all(later - earlier > 200_000 for earlier, later in pairwise(starts))
        assert store.get("a", max_bytes=10**6) == content


def test_a_get_does_not_go_on_in_another_object(proxy: Proxy, s3_bucket: str) -> None:
    with over(proxy, s3_bucket) as store:
        store.put("a", [bytes(900_000)])
        proxy.truncate_response_bytes = 400_000

        def replaced(request: Any) -> None:
            if "Range" in request.headers:
                store._client().meta.events.unregister("before-send.s3.GetObject", hook)
                store._client().put_object(Bucket=s3_bucket, Key="run/a", Body=b"\1" * 900_000)

        def hook(request: Any, **_: object) -> None:
            replaced(request)

        store._client().meta.events.register("before-send.s3.GetObject", hook)
        with pytest.raises(TransientStoreError, match="another object"):
            store.get("a", max_bytes=10**6)


def test_a_get_that_brings_next_to_nothing_has_failed(proxy: Proxy, s3_bucket: str) -> None:
    with over(proxy, s3_bucket) as store:
        store.put("a", [bytes(900_000)])
        proxy.truncate_response_bytes = 20_000
        for ask in (
            lambda: store.get("a", max_bytes=10**6),
            lambda: store.get_into("a", 10, memoryview(bytearray(800_000))),
        ):
            with pytest.raises(TransientStoreError):
                ask()


def test_a_body_of_which_no_byte_moves_is_given_up(proxy: Proxy, s3_bucket: str) -> None:
    with over(proxy, s3_bucket, replace(SOON, sending_s=60.0)) as store:
        proxy.delay_s = 1.5
        began_s = time.monotonic()
        with pytest.raises(TransientStoreError, match=r"put_object: no byte moved for 0\.5 s") as caught:
            store.put("a", [bytes(2_000_000)])
        assert time.monotonic() - began_s < 3.0
        assert caught.value.unanswered
        assert caught.value.key == "a"


def test_an_answer_that_does_not_come_is_given_up(proxy: Proxy, s3_bucket: str) -> None:
    with over(proxy, s3_bucket) as store:
        proxy.delay_s = 1.5
        with pytest.raises(TransientStoreError, match=r"head_object: no byte moved for 0\.5 s"):
            store.head("a")


def test_a_connection_under_tls_is_watched_too(silent_tls_server: str) -> None:
    options = S3Options(endpoint_url=silent_tls_server, checksum="none")
    with (
        S3Store("bucket", "run", options, endurance=SOON) as store,
        pytest.raises(TransientStoreError, match=r"put_object: no byte moved for 0\.5 s"),
    ):
        store.put("a", [bytes(20_000_000)])


@pytest.fixture
def silent_tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Shakes hands with whoever trusts it, and says no more."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "certificate").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(lambda: context.wrap_socket(listener.accept()[0], server_side=True))
        yield f"https://localhost:{listener.getsockname()[1]}"
        accepted.result(5.0).close()


def test_who_watches_says_that_something_moves(proxy: Proxy, s3_bucket: str) -> None:
    """Or a worker whose connections are all slow would be replaced as one that hangs."""
    beats: list[str] = []
    with S3Store(
        s3_bucket,
        "run",
        S3Options(endpoint_url=proxy.url),
        progress=lambda: beats.append(threading.current_thread().name),
        endurance=SOON,
    ) as store:
        proxy.uplink_bytes_per_s = 100_000
        store.put("a", [bytes(80_000)])
    assert beats.count("asyncckpt-watch") > 3


def test_without_the_kernels_counters_the_timeouts_hold(
    proxy: Proxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_moved", lambda _: None)
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.3)
    with over(proxy, s3_bucket) as store:
        proxy.delay_s = 1.5
        with pytest.raises(TransientStoreError, match=r"[Rr]ead timeout"):
            store.head("a")


def test_no_thread_watches_when_nothing_is_asked(proxy: Proxy, s3_bucket: str) -> None:
    def watchers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "asyncckpt-watch"]

    before = len(watchers())
    with over(proxy, s3_bucket) as store:
        until_s = time.monotonic() + 5.0
        while len(watchers()) > before and time.monotonic() < until_s:
            time.sleep(0.01)
        assert len(watchers()) == before
        store.put("a", [bytes(80_000)])
    assert len(watchers()) == before


def test_a_store_that_refuses_some_puts_has_fewer_at_once(proxy: Proxy, s3_bucket: str) -> None:
    lock, chance = threading.Lock(), random.Random(3)
    at_once: list[int] = []
    with over(proxy, s3_bucket) as inner:

        def refuse_some(_: Any) -> Any:
            with lock:
                at_once.append(inner._wire.sends._under_way)
                return refusal(503, "SlowDown") if chance.random() < 0.3 else None

        intercept(inner, "PutObject", refuse_some)
        store = RetryingStore(inner, QUICK)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda number: store.put(f"a/{number}", [bytes(70_000)]), range(48)))
        assert len(list(store.list("a/"))) == 48
    assert max(at_once) <= 16
    assert max(at_once[-10:]) <= 12
