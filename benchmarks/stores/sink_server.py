"""A small S3 server on loopback that costs next to nothing, so that what is measured is its client.

    python -m benchmarks.stores.sink_server --port 0                              # prints its address, keeps objects in memory
    python -m benchmarks.stores.sink_server --latency-ms 30 --mb-per-s 90         # as far away as a region, and as slow
    python -m benchmarks.stores.sink_server --discard                             # bodies above 64 KiB are counted, not kept
    curl http://127.0.0.1:PORT/_stats                                             # requests, bytes, CPU seconds, connections

    python -m benchmarks.stores.sink_server --verify md5 --verify-large           # what it holds against a body; crc32c,crc32,md5 by default

Left out, for everybody: signatures, durability, and checksums of bodies above 64 KiB unless `--verify-large` says so: the small ones show
a client that the store knows a checksum, the large ones would cost the server what is measured in the client. An answer begins `--latency-ms` after the request is complete
(a `100 Continue` at once), and every connection carries at most `--mb-per-s` in each direction, however many there are. It ends with its
parent.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

from benchmarks.stores.sink_http import Answer, Connection, HangUpError
from benchmarks.stores.sink_objects import Objects
from benchmarks.stores.sink_operations import CHECKSUMS, answer_to

KEPT_BYTES = 2**16
_PACED_BUFFER_BYTES = 2**18  # or loopback would take megabytes at once, whatever the pace
_PR_SET_PDEATHSIG = 1

# mallopt: one arena, nothing mapped apart, nothing given back. Objects that were deleted make room for the next ones, whose pages then
# exist: a page's first touch costs three times what receiving it does.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEEP_FREED_MEMORY = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the server answers. None and 0: as fast as it can."""

    discard: bool = False
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    verifies: tuple[str, ...] = CHECKSUMS
    verifies_large: bool = False


class Server:
    """Listens from the start; `serve()` answers, a thread a connection."""

    def __init__(self, port: int, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._objects = Objects()
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._most_open = 0
        self._counts = {"requests": 0, "bytes_in": 0, "bytes_out": 0}
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if behaviour.bytes_per_s:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER_BYTES)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PACED_BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(512)
        self.port: int = self._listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            threading.Thread(target=self._converse, args=(peer,), daemon=True).start()

    def _converse(self, peer: socket.socket) -> None:
        connection = Connection(peer, self._behaviour.bytes_per_s)
        try:
            while self._one(connection):
                pass
        except (HangUpError, OSError):
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
                self._count(connection)
            peer.close()

    def _one(self, connection: Connection) -> bool:
        """One request; False if it is the connection's last."""
        request = connection.request()
        if request.bucket == "_stats":
            connection.answer(Answer(200, {"Content-Type": "application/json"}, [self._stats()]))
            connection.bytes_in = connection.bytes_out = 0
            return False
        with self._lock:
            self._counts["requests"] += 1
            self._open.add(connection)
            self._most_open = max(self._most_open, len(self._open))
        body, size_bytes = connection.body(
            request, keep_below_bytes=KEPT_BYTES + 1 if self._behaviour.discard else None
        )
        known = body is not None and (size_bytes <= KEPT_BYTES or self._behaviour.verifies_large)
        verifies = self._behaviour.verifies if known else ()
        answer = answer_to(self._objects, request, self._objects.content(body, size_bytes), verifies=verifies)
        if self._behaviour.latency_s:
            time.sleep(self._behaviour.latency_s)
        connection.answer(answer)
        with self._lock:
            self._count(connection)
        return request.headers.get("connection", "").lower() != "close"

    def _count(self, connection: Connection) -> None:
        self._counts["bytes_in"] += connection.bytes_in
        self._counts["bytes_out"] += connection.bytes_out
        connection.bytes_in = connection.bytes_out = 0

    def _stats(self) -> bytes:
        with self._lock:
            found = {**self._counts, "cpu_s": time.process_time(), "most_connections": self._most_open}
        return json.dumps(found).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: one that the kernel chooses")
    parser.add_argument("--discard", action="store_true", help="keep no body above 64 KiB")
    parser.add_argument("--latency-ms", type=float, default=0.0, metavar="MS")
    parser.add_argument("--mb-per-s", type=float, metavar="MB", help="of each connection, in each direction")
    parser.add_argument(
        "--verify", default=",".join(CHECKSUMS), metavar="NAMES", help="checksums in headers that are verified"
    )
    parser.add_argument("--verify-large", action="store_true", help="of bodies above 64 KiB too")
    args = parser.parse_args()
    verifies = tuple(name for name in args.verify.split(",") if name)
    if unknown := set(verifies) - set(CHECKSUMS):
        parser.error(f"no such checksum: {', '.join(sorted(unknown))}")
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        return  # the parent ended before the kernel was asked
    for parameter, value in _KEEP_FREED_MEMORY:
        libc.mallopt(parameter, value)
    pace = args.mb_per_s * 1e6 if args.mb_per_s else None
    behaviour = Behaviour(args.discard, args.latency_ms / 1000, pace, verifies, args.verify_large)
    server = Server(args.port, behaviour)
    print(f"http://127.0.0.1:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
