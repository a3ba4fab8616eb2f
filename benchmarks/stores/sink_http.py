"""HTTP of the sink: requests, bodies straight into memory, answers straight out of it, and how fast the bytes of a connection may pass.

One thread serves one connection, with blocking calls: a body is received by a single `recv` into memory of its size, which holds no lock of
the interpreter. No large body is hashed, checked or copied twice, so that a benchmark on loopback measures the client.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import unquote, unquote_plus

import numpy as np

_HEAD_BYTES = 2**16
_SLICE_BYTES = 2**17  # of a paced connection
_LATE_S = 0.1
_REASONS = {100: "Continue", 200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found"}


class HangUpError(Exception):
    """The client closed the connection, or no longer speaks HTTP."""


class Pace:
    """A token bucket: bytes of one direction of one connection. None: as fast as it goes."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # when the bytes so far should have passed
        self.slice_bytes = _SLICE_BYTES if bytes_per_s else 2**40

    def begin(self) -> None:
        """A body begins: the silence before it earned nothing."""
        self._free_s = max(self._free_s, time.monotonic())

    def passed(self, count_bytes: int) -> None:
        """Wait until so many bytes may have passed. What a late wake-up lost is made good."""
        if self._bytes_per_s is None:
            return
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s - _LATE_S) + count_bytes / self._bytes_per_s
        if self._free_s > now_s:
            time.sleep(self._free_s - now_s)


@dataclass(frozen=True, slots=True)
class Request:
    """`bucket`, `key`: of the path, "" where it ends before. Names of headers are in lower case."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """`pieces` follow each other; for HEAD they are what a GET would send, and `sent` is False."""

    status: int
    headers: dict[str, str]
    pieces: Sequence[memoryview | bytes] = ()
    sent: bool = True
    length_bytes: int | None = None  # of a HEAD


class Connection:
    """The server's end of one connection. `bytes_in`, `bytes_out`: bodies and heads so far."""

    def __init__(self, peer: socket.socket, bytes_per_s: float | None) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._early = bytearray()  # received with the head, belongs to the body or the next request
        self._pace_in, self._pace_out = Pace(bytes_per_s), Pace(bytes_per_s)
        self.bytes_in = 0
        self.bytes_out = 0

    def request(self) -> Request:
        """The next head."""
        while (end := self._early.find(b"\r\n\r\n")) < 0:
            if len(self._early) > _HEAD_BYTES:
                raise HangUpError
            self._receive_early()
        lines = bytes(self._early[:end]).decode("latin-1").split("\r\n")
        del self._early[: end + 4]
        try:
            method, target, _version = lines[0].split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        except ValueError as error:
            raise HangUpError from error
        path, _, words = target.partition("?")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        query = dict(_pair(word) for word in words.split("&") if word)
        return Request(method, bucket, key, query, headers)

    def body(self, request: Request, *, keep_below_bytes: int | None) -> tuple[memoryview | None, int]:
        """The request's body, decoded, and its size; None instead of a body that has `keep_below_bytes` or more."""
        headers = request.headers
        self._pace_in.begin()
        if headers.get("expect", "").lower() == "100-continue":
            self._peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        layers: list[_Chunked] = []
        source: Connection | _Chunked = self
        length: str | None = headers.get("content-length", "0")
        if "chunked" in headers.get("transfer-encoding", ""):
            length = None
            layers.append(source := _Chunked(source))
        if "aws-chunked" in headers.get("content-encoding", ""):
            length = headers.get("x-amz-decoded-content-length")
            layers.append(source := _Chunked(source))
        if length is None:
            content = bytearray()
            while count := layers[-1].pending():
                content += bytes(count)
                source.fill(memoryview(content)[-count:])
            size_bytes, kept = len(content), memoryview(content)
        else:
            size_bytes = int(length)
            keep = keep_below_bytes is None or size_bytes < keep_below_bytes
            # not zeroed: that would cost as much as receiving
            kept = memoryview(np.empty(size_bytes if keep else min(size_bytes, _SLICE_BYTES), np.uint8))
            left = size_bytes
            while left:
                source.fill(kept[: min(left, len(kept))])
                left -= min(left, len(kept))
        for layer in reversed(layers):
            layer.finish()
        return (kept if len(kept) == size_bytes else None), size_bytes

    def answer(self, answer: Answer) -> None:
        """Send it."""
        self._pace_out.begin()
        length_bytes = sum(map(len, answer.pieces)) if answer.length_bytes is None else answer.length_bytes
        lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Other')}", "Server: sink"]
        lines.append(f"Date: {formatdate(usegmt=True)}")
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        if answer.status != 204:
            lines.append(f"Content-Length: {length_bytes}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        pieces = [memoryview(head), *(memoryview(piece) for piece in answer.pieces if answer.sent)]
        if sum(map(len, pieces)) <= _HEAD_BYTES:
            pieces = [memoryview(b"".join(pieces))]
        for piece in pieces:
            for at in range(0, len(piece), self._pace_out.slice_bytes):
                part = piece[at : at + self._pace_out.slice_bytes]
                self._peer.sendall(part)
                self.bytes_out += len(part)
                self._pace_out.passed(len(part))

    def fill(self, view: memoryview) -> None:
        """Receive exactly as many bytes as the view has."""
        if self._early:
            count = min(len(self._early), len(view))
            view[:count] = self._early[:count]
            del self._early[:count]
            view = view[count:]
        while view:
            count = self._peer.recv_into(view[: self._pace_in.slice_bytes], 0, socket.MSG_WAITALL)
            if not count:
                raise HangUpError
            self.bytes_in += count
            self._pace_in.passed(count)
            view = view[count:]

    def line(self) -> bytes:
        """The next line, without its end."""
        while (end := self._early.find(b"\r\n")) < 0:
            self._receive_early()
        found = bytes(self._early[:end])
        del self._early[: end + 2]
        return found

    def _receive_early(self) -> None:
        received = self._peer.recv(_HEAD_BYTES)
        if not received:
            raise HangUpError
        self.bytes_in += len(received)
        self._early += received


class _Chunked:
    """A body in chunks: of HTTP itself, or of S3 (`aws-chunked`, whose signatures and trailing checksums are passed over)."""

    def __init__(self, inner: "Connection | _Chunked") -> None:
        self._inner = inner
        self._left = 0
        self._ended = False

    def pending(self) -> int:
        """Bytes left of the chunk at hand; 0 at the end."""
        if not self._left and not self._ended:
            self._left = int(self._inner.line().partition(b";")[0], 16)
            if not self._left:
                self._ended = True
                while self._inner.line():
                    pass  # trailers
        return self._left

    def fill(self, view: memoryview) -> None:
        while view:
            count = min(self.pending(), len(view))
            if not count:
                raise HangUpError
            self._inner.fill(view[:count])
            view = view[count:]
            self._left -= count
            if not self._left:
                self._inner.line()

    def line(self) -> bytes:
        found = bytearray()
        byte = bytearray(1)
        while not found.endswith(b"\r\n"):
            self.fill(memoryview(byte))
            found += byte
        return bytes(found[:-2])

    def finish(self) -> None:
        """Read what stands behind the content."""
        if self.pending():
            raise HangUpError


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return unquote_plus(name), unquote_plus(value)
