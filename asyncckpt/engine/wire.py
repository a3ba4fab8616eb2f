"""JSON messages and file descriptors over a private socketpair.

A message is a 4-byte big-endian length and that many bytes of JSON. A payload above `INLINE_BYTES` travels as a memory
file whose descriptor is passed, so a message never fills the socket and a sender never waits for a slow reader.
Nothing else is ever read from the socket, and nothing is unpickled.
"""

import errno
import functools
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

INLINE_BYTES = 16 * 1024
_MAX_FDS = 16
_READ_BYTES = 256 * 1024

REFUSED = {errno.EPERM, errno.EACCES, errno.ENOSYS}
"""How a kernel says that it will not do something at all: too old, a container's filter, a sandbox."""

Message = dict[str, Any]


@functools.cache
def memory_files_refused() -> str:
    """Why there are no memory files here, and so no service; empty if there are."""
    if not hasattr(os, "memfd_create"):
        return "memfd_create: this Python does not have it"
    try:
        os.close(os.memfd_create("asyncckpt-probe", os.MFD_CLOEXEC))
    except OSError as error:
        if error.errno in REFUSED:
            return f"memfd_create: {error.strerror}"
    return ""


def memory_file(name: str, data: bytes) -> int:
    """A new memory file that holds `data`; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_memory_file(fd: int) -> bytes:
    """All bytes of a memory file; the descriptor stays open."""
    left = os.fstat(fd).st_size
    parts: list[bytes] = []
    offset = 0
    while left:
        part = os.pread(fd, left, offset)
        if not part:
            raise EOFError("memory file is shorter than it states")
        parts.append(part)
        offset += len(part)
        left -= len(part)
    return b"".join(parts)


class Channel:
    """One end of the socketpair. `send` is thread-safe; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        """For selectors."""
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, and wait while the socket is full. `BrokenPipeError` if the other end is gone."""
        with self._lock:
            self._enqueue(message, fds)
            self._drain(wait=True)

    def post(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send without ever waiting; what does not fit goes out with later calls of `flush`."""
        with self._lock:
            self._enqueue(message, fds)
            self._drain(wait=False)

    def flush(self) -> None:
        """Send what `post` left."""
        with self._lock:
            self._drain(wait=False)

    @property
    def pending(self) -> bool:
        """Whether `post` left something."""
        return bool(self._outbox)

    def receive(self) -> list[tuple[Message, list[int]]] | None:
        """Wait for a message; those complete so far with their descriptors, or None at the end of the stream.

        Empty only from a non-blocking socket in which nothing more is to read.
        """
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self.sock, _READ_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except (ConnectionResetError, BrokenPipeError):
                return None
            except BlockingIOError:
                return []
            self._fds.extend(fds)
            if flags & socket.MSG_CTRUNC:
                raise OSError("descriptors were lost: the process has no free descriptor (raise `ulimit -n`)")
            if not data:
                return None
            self._buffer += data
            if found := self._complete():
                return found

    def close(self) -> None:
        """Close the socket and every descriptor that was received or queued and not taken."""
        with self._lock:
            self.leave_in_child()

    def leave_in_child(self) -> None:
        """The same in a forked child, where the lock may be held for ever and nobody else is."""
        while self._fds:
            os.close(self._fds.popleft())
        self._forget_queued()
        self.sock.close()

    def _forget_queued(self) -> None:
        while self._outbox:
            _, fds = self._outbox.popleft()
            for fd in fds:
                os.close(fd)

    def _enqueue(self, message: Message, fds: Sequence[int]) -> None:
        payload = json.dumps({**message, "fds": len(fds)}, separators=(",", ":")).encode()
        held: list[int] = []
        try:
            held.extend(os.dup(fd) for fd in fds)
            if len(payload) > INLINE_BYTES:
                held.append(memory_file("asyncckpt-message", payload))
                payload = b'{"large":true,"fds":%d}' % len(held)
        except BaseException:
            for fd in held:
                os.close(fd)
            raise
        self._outbox.append((memoryview(len(payload).to_bytes(4, "big") + payload), tuple(held)))

    def _drain(self, *, wait: bool) -> None:
        flags = 0 if wait else socket.MSG_DONTWAIT
        while self._outbox:
            data, fds = self._outbox[0]
            try:
                sent = socket.send_fds(self.sock, [data], list(fds), flags)
            except BlockingIOError:
                return
            except ConnectionError:  # nobody will read it: an arena must not stay for as long as the channel does
                self._forget_queued()
                raise
            if sent == len(data):
                self._outbox.popleft()
            else:
                self._outbox[0] = (data[sent:], ())
            for fd in fds:
                os.close(fd)

    def _complete(self) -> list[tuple[Message, list[int]]]:
        found: list[tuple[Message, list[int]]] = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < 4 + size:
                break
            message: Message = json.loads(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
            fds = [self._fds.popleft() for _ in range(message["fds"])]
            if message.get("large"):  # the payload is the last descriptor
                fd = fds.pop()
                message = json.loads(read_memory_file(fd))
                os.close(fd)
            found.append((message, fds))
        return found


def pair() -> tuple[socket.socket, socket.socket]:
    """A private pair of connected sockets, close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
