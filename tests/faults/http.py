"""Faults of requests on their way to a real S3 server: a proxy in a process of its own, with real sockets."""

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from asyncckpt.store.checksum import HEADERS, checksum
from tests.faults.fates import ALWAYS, KILLS, WIRE_FAULTS, Fate, Names, Point

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
_SLOW_S = 0.3  # what a delayed request waits, and what a throttled answer takes
_PIECES = 10  # of a throttled answer
_CHECKSUMS = {"crc32c": "x-amz-checksum-crc32c", "crc32": "x-amz-checksum-crc32", "md5": "content-md5"}
Answer = tuple[int, list[Any], bytes]


class Proxy:
    """In front of the server at `endpoint`, for one run; `root` is the bucket and prefix that its keys are below."""

    def __init__(self, endpoint: str, root: str, fate: Fate) -> None:
        self._control, theirs = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.pid = os.fork()
            if self.pid == 0:
                with contextlib.suppress(BaseException):
                    self._control.close()
                    _Server(listener, endpoint, root, fate).control(theirs)
                os._exit(0)
        theirs.close()
        self._stream = self._control.makefile("rw")

    def ask(self, command: str, *arguments: Any) -> Any:
        """Have the proxy do something: `begin(life, victim)`, `away(bool)`, `deliver()`, `facts()`."""
        self._stream.write(json.dumps([command, *arguments]) + "\n")
        self._stream.flush()
        return json.loads(self._stream.readline())

    def close(self) -> None:
        self._stream.close()
        self._control.close()
        os.waitpid(self.pid, 0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, endpoint: str, root: str, fate: Fate) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.host = urlsplit(endpoint).netloc
        self.root, self.fate, self.names = root, fate, Names()
        self.lock = threading.RLock()
        self.life = self.victim = 0
        self.over = ""  # how this life's network ended
        self.always: dict[tuple[str, str], str] = {}
        self.late: list[tuple[int, tuple[Any, ...]]] = []
        self.points: list[Point] = []
        self.fired: list[str] = []

    def control(self, commands: socket.socket) -> None:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        stream = commands.makefile("rw")
        for line in stream:
            command, *arguments = json.loads(line)
            with self.lock:
                answer = getattr(self, command)(*arguments)
            stream.write(json.dumps(answer) + "\n")
            stream.flush()

    def begin(self, life: int, victim: int) -> None:
        self.life, self.victim, self.over, self.always = life, victim, "", {}

    def away(self, is_away: bool) -> None:
        self.over = "outage" if is_away else ""

    def facts(self) -> dict[str, Any]:
        return {"points": [str(point) for point in self.points], "fired": self.fired}

    def deliver(self, *, everything: bool = True) -> None:
        due = [late for late in self.late if everything or late[0] <= len(self.points)]
        self.late = [late for late in self.late if late not in due]
        for _, request in due:
            self.forward(*request)

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """The server's answer; but the server verifies no checksum of a body, so that is done here, as S3 does it."""
        sent = {name.lower(): value for name, value in headers.items()}
        for algorithm in HEADERS:
            if sent.get(_CHECKSUMS[algorithm], expected := checksum(algorithm, [body])) != expected:
                return error(400, "BadDigest")
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        skipped = {"connection", "expect", "transfer-encoding"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        request = (self.command, self.path, headers, body)
        server = self.server
        with server.lock:
            if server.over:
                return self.reset()
            point = server.names.point(server.life, *self.named())
            server.points.append(point)
            server.deliver(everything=False)
            fault = server.always.get((point.operation, point.key)) or server.fate.fault(point)
            if not fault:
                return self.answer(*server.forward(*request))
            server.fired.append(f"{point} {fault}")
            if fault not in WIRE_FAULTS:
                return self.meet(fault, point, request)
        return self.spoil(fault, *request)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def named(self) -> tuple[str, str]:
        """What this request is to the store, and its key."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        key = parts.path.strip("/").removeprefix(self.server.root).strip("/")
        words = {("POST", "uploads"): "start_upload", ("PUT", "partNumber"): "write", ("POST", "uploadId"): "complete"}
        words |= {("DELETE", "uploadId"): "abort", ("GET", "list-type"): "list", ("POST", "delete"): "delete"}
        for (method, word), operation in words.items():
            if self.command == method and word in query:
                return operation, key
        plain = {"PUT": "put", "GET": "get", "HEAD": "head", "DELETE": "remove"}[self.command]
        return ("replace" if plain == "put" and "if-match" in self.headers else plain), key

    def meet(self, fault: str, point: Point, request: tuple[Any, ...]) -> None:
        server = self.server
        if fault.endswith(ALWAYS):
            server.always[point.operation, point.key] = fault
            fault = fault.removesuffix(ALWAYS)
        if fault in (*KILLS, "outage"):
            server.over = fault
        if fault in ("late", "doubled"):
            server.late.append((len(server.points) + server.fate.delay(point), request))
        if fault in ("kill-after", "lost-answer", "doubled"):
            answer = server.forward(*request)
            if fault == "doubled":
                return self.answer(*answer)
        if fault in KILLS:
            os.kill(server.victim, signal.SIGKILL)
        if fault in ("refused", "absent"):
            return self.answer(*(error(403, "AccessDenied") if fault == "refused" else error(404, "NoSuchKey")))
        return self.reset()

    def spoil(self, fault: str, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        """A fault of bytes on their way; nobody else waits for it."""
        if fault == "delay":
            time.sleep(_SLOW_S)
        with self.server.lock:
            sent = flipped(body) if fault == "flip" else body
            status, names, content = self.server.forward(method, path, headers, sent)
        if fault == "flip" and not body:
            content = flipped(content)
        self.answer(status, names, content, how=fault)

    def answer(self, status: int, headers: list[Any], body: bytes, how: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        pieces = _PIECES if how == "throttle" else 1
        for at in range(0, len(body), size := -(-len(body) // pieces) or 1):
            time.sleep(_SLOW_S / _PIECES if how == "throttle" else 0)
            self.wfile.write(body[at : at + size] if how != "truncate" else body[: len(body) // 2])
        if how == "truncate":
            self.reset()

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


def error(status: int, code: str) -> Answer:
    """S3's words for a refusal."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return status, [("Content-Type", "application/xml")], body.encode()


def flipped(body: bytes) -> bytes:
    """With one bit in the middle changed."""
    middle = len(body) // 2
    return body[:middle] + bytes(byte ^ 16 for byte in body[middle : middle + 1]) + body[middle + 1 :]
