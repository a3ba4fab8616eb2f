"""What connections can carry: the same number of bytes as plain HTTP, nothing encoded, nothing kept.

It is the limit of a save or restore behind a slow network, with what the server and this machine's loopback cost beside it.
"""

import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import asyncckpt
from asyncckpt.engine.pipeline import PART_BYTES as OUR_PART_BYTES
from asyncckpt.engine.pipeline import REMOTE_UPLOADS
from asyncckpt.store.opening import open_store
from benchmarks.stores.s3 import SinkStore

CONNECTIONS = (16, 32)
PART_BYTES = 8 * 2**20


def plain_s(store: SinkStore, size_bytes: int) -> tuple[float, float]:
    """Seconds to put that many bytes in parts of 8 MiB over connections side by side, and to get them: each over the better number."""
    found = [_plain_s(store, size_bytes, count) for count in CONNECTIONS]
    return min(put_s for put_s, _ in found), min(get_s for _, get_s in found)


def _plain_s(store: SinkStore, size_bytes: int, connections: int) -> tuple[float, float]:
    place = store.place("plain")
    assert place.endpoint_url is not None
    address = urlsplit(place.endpoint_url).netloc
    starts = range(0, size_bytes, PART_BYTES)
    parts = [(f"/{place.bucket}/{place.prefix}/{at:012d}", min(PART_BYTES, size_bytes - at)) for at in starts]
    body = memoryview(bytes(PART_BYTES))
    put_s = _side_by_side(address, "PUT", parts, body, connections)
    get_s = _side_by_side(address, "GET", parts, body, connections)
    _side_by_side(address, "DELETE", parts, body, connections)
    return put_s, get_s


def put_cpu_s(store: SinkStore, size_bytes: int) -> float:
    """CPU seconds of this process for putting that many bytes as a worker of this package does: no copy, no digest, no encoding."""
    place = store.place("own")
    assert place.url is not None
    options = asyncckpt.S3Options(endpoint_url=place.endpoint_url, region=place.region)
    body = memoryview(bytearray(b"\x5a") * size_bytes)  # nothing twice, as from an arena
    parts = [(f"part-{at:012d}", body[at : at + OUR_PART_BYTES]) for at in range(0, size_bytes, OUR_PART_BYTES)]
    with open_store(place.url, options) as own, ThreadPoolExecutor(REMOTE_UPLOADS) as threads:
        own.put("first", [b""])  # makes the client
        before_s = time.process_time()
        for done in [threads.submit(own.put, key, [data]) for key, data in parts]:
            done.result()
        cpu_s = time.process_time() - before_s
        own.delete([key for key, _ in parts])
    return cpu_s


def _side_by_side(address: str, verb: str, parts: list[tuple[str, int]], body: memoryview, connections: int) -> float:
    errors: list[BaseException] = []

    def carry(mine: list[tuple[str, int]]) -> None:
        connection = http.client.HTTPConnection(address)
        into = bytearray(PART_BYTES) if verb == "GET" else bytearray()
        try:
            for path, size_bytes in mine:
                _carry(connection, verb, path, body[:size_bytes], into)
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=carry, args=(parts[n::connections],)) for n in range(connections)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


def _carry(connection: http.client.HTTPConnection, verb: str, path: str, body: memoryview, into: bytearray) -> None:
    connection.request(verb, path, body=body if verb == "PUT" else None)
    answer = connection.getresponse()
    count = 0
    while verb == "GET" and count < len(body):
        took = answer.readinto(memoryview(into)[count:])
        if not took:
            break
        count += took
    answer.read()
    if answer.status >= 300 or count != (len(body) if verb == "GET" else 0):
        raise OSError(f"{verb} {path}: {answer.status} after {count} of {len(body)} bytes")
