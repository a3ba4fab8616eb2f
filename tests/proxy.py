"""A TCP proxy on loopback whose faults are switched while it runs."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_NOT_FOUND = b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"
_HEAD_BYTES = 4096  # of an answer, at most
_THIN_BYTES = 4096  # of a connection, on their way or taken at once
_TRICKLE_BYTES_PER_S = 1000
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Proxy:
    """Forwards connections to `url`, and is found at `.url`. Set the attributes at any time, from any thread.

    `down`: connections, new and open, are reset. `delay_s`: waited before each piece is forwarded. `bytes_per_s`: of
    each direction of each connection. `uplink_bytes_per_s`: of all connections together, towards the server; made `thin`, or the kernel
    takes megabytes at once. `trickle`: GETs whose request line it accepts are answered at 1 kB/s. `truncate_response_bytes`: an answer
    is cut behind so many bytes.
    `drop_responses`: so many answers are lost: the request was forwarded, the connection is reset instead of its answer.
    `hide`: GETs whose request line it accepts are answered with S3's 404 and not forwarded. `flips`: asked for every piece of an answer
    that is certainly body (4 KiB behind its beginning); a bit is flipped in the middle of it.
    `flip_requests`: in so many bodies one bit changes on its way to the server. `connections`: how many were accepted.
    """

    def __init__(self, url: str, *, thin: bool = False) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        if thin:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _THIN_BYTES)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.uplink_bytes_per_s: float | None = None
        self._uplink_free_s = 0.0
        self.trickle: Callable[[str], bool] = lambda _: False
        self.truncate_response_bytes: int | None = None
        self.drop_responses = 0
        self.hide: Callable[[str], bool] = lambda _: False
        self.flips: Callable[[], bool] = lambda: False
        self.flip_requests = 0
        self.connections = 0
        self._down = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        if value:
            self._reset_all()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._reset_all()
        for thread in list(self._threads):
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._down:
                _reset(client)
                continue
            try:
                server = socket.create_connection(self._server, timeout=10)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            state = {"answered_bytes": 0, "flipped": 0, "trickles": 0}
            for source, target, is_answer in ((client, server, False), (server, client, True)):
                arguments = (source, target, is_answer, state)
                thread = threading.Thread(target=self._pump, args=arguments, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool, state: dict[str, int]) -> None:
        try:
            while piece := source.recv(65536 if is_answer or not self.uplink_bytes_per_s else _THIN_BYTES):
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.bytes_per_s:
                    time.sleep(len(piece) / self.bytes_per_s)
                if not is_answer:
                    self._take_uplink(len(piece))
                if is_answer:
                    piece = self._spoilt(piece, state)
                if not is_answer:
                    state["answered_bytes"] = 0
                    state["trickles"] = piece.startswith(b"GET ") and self.trickle(piece.partition(b"\r")[0].decode())
                    if piece.startswith(b"GET ") and self.hide(piece.partition(b"\r")[0].decode()):
                        head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(_NOT_FOUND)}\r\n\r\n"
                        source.sendall(head.encode() + _NOT_FOUND)
                        continue
                    piece = self._flipped(piece, state)
                elif not piece.startswith(b"HTTP/1.1 100 ") and not self._lets_pass(piece, target, state):
                    break
                if is_answer and state["trickles"]:
                    _trickle(piece, target)
                else:
                    target.sendall(piece)
        except OSError:
            pass
        finally:
            for one in (source, target):
                with self._lock:
                    self._open.discard(one)
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                if is_answer:
                    one.close()

    def _take_uplink(self, size_bytes: int) -> None:
        if not self.uplink_bytes_per_s:
            return
        with self._lock:
            now_s = time.monotonic()
            self._uplink_free_s = max(self._uplink_free_s, now_s) + size_bytes / self.uplink_bytes_per_s
            wait_s = self._uplink_free_s - now_s
        time.sleep(wait_s)

    def _flipped(self, piece: bytes, state: dict[str, int]) -> bytes:
        if piece.startswith((b"PUT ", b"POST ", b"GET ", b"HEAD ", b"DELETE ")):
            state["flipped"] = 0
        if len(piece) < 8192 or state["flipped"]:
            return piece
        with self._lock:
            if not self.flip_requests:
                return piece
            self.flip_requests -= 1
        state["flipped"] = 1
        return piece[:-1] + bytes([piece[-1] ^ 0x10])

    def _lets_pass(self, piece: bytes, client: socket.socket, state: dict[str, int]) -> bool:
        with self._lock:
            dropped = self.drop_responses > 0
            self.drop_responses -= dropped
        if dropped:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            return False
        limit = self.truncate_response_bytes
        if limit is not None and state["answered_bytes"] + len(piece) > limit:
            client.sendall(piece[: limit - state["answered_bytes"]])
            return False
        state["answered_bytes"] += len(piece)
        return True

    def _spoilt(self, piece: bytes, state: dict[str, int]) -> bytes:
        if state["answered_bytes"] < _HEAD_BYTES or not self.flips():
            return piece
        middle = len(piece) // 2
        return piece[:middle] + bytes([piece[middle] ^ 16]) + piece[middle + 1 :]

    def _reset_all(self) -> None:
        with self._lock:
            sockets, self._open = self._open, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _trickle(piece: bytes, target: socket.socket) -> None:
    for start in range(0, len(piece), _TRICKLE_BYTES_PER_S // 20):
        target.sendall(piece[start : start + _TRICKLE_BYTES_PER_S // 20])
        time.sleep(0.05)


def _reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    one.close()
