"""Ends the requests whose connection moves no byte any more, or far too few."""

import fcntl
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from asyncckpt.errors import StoreError, TransientStoreError
from asyncckpt.store.base import Progress

_TCP_INFO_BYTES = 136
_COUNTERS_AT = 120  # tcpi_bytes_acked, tcpi_bytes_received; include/uapi/linux/tcp.h, since Linux 4.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what waits in the kernel's buffers would go on filling the link
_FINISHED = 64  # requests that tell what a connection carries
_LARGE_BYTES = 2**16  # below it a request takes what its round trips take


@dataclass(frozen=True, slots=True)
class Endurance:
    """When a connection is given up.

    Links below 0.1 MB/s are too thin: a part of the least size that S3 takes would need a minute of all of it.

    Args:
        still_s: No byte moved for so long, in either direction. A worker counts as hung after twice as long.
        floor_bytes_per_s: It moved fewer, though half of what other connections got was more.
        sending_s: So long below the floor; a body that is sent again loses all that had arrived.
        receiving_s: So long below the floor; an answer is asked for from where it stopped, and loses nothing.
        tick_s: Between two looks.
    """

    still_s: float = 30.0
    floor_bytes_per_s: float = 16 * 2**10
    sending_s: float = 60.0
    receiving_s: float = 10.0
    tick_s: float = 1.0


class _Here(threading.local):
    request: "Request | None" = None


_here = _Here()


def attend(sock: socket.socket | None) -> bool:
    """The request of this thread goes over `sock` now. Whether somebody watches it, and it needs no timeout of its own."""
    request = _here.request
    return request is not None and request.attend(sock)


def answered() -> None:
    """The request of this thread has an answer, whose body follows."""
    if _here.request is not None:
        _here.request.is_answered = True


class Request:
    """One request under way. `body_bytes`: that it sends or receives. `may_dawdle`: the store answers a byte at a time while it works."""

    def __init__(self, endurance: Endurance, watched: bool, body_bytes: int, may_dawdle: bool) -> None:
        self._endurance = endurance
        self._watched = watched
        self.body_bytes = body_bytes
        self._may_dawdle = may_dawdle
        self._sock: socket.socket | None = None
        self._moved_bytes = 0
        self._still_s = 0.0
        self._waits: deque[tuple[float, int]] = (
            deque()
        )  # for the network, not for us: seconds, and bytes that moved in them
        self._was_answered = False
        self.waited_s = 0.0  # all of these together
        self.waited_bytes = 0
        self.is_answered = False
        self.given_up = ""
        """Why, if it was."""

    def attend(self, sock: socket.socket | None) -> bool:
        if sock is not self._sock:
            moved = _moved(sock) if self._watched else None
            self._sock = None if moved is None else sock
            self._moved_bytes = moved or 0
        return self._sock is not None

    def look(self, elapsed_s: float) -> bool:
        """Note what happened since the last look. Whether anything moved."""
        sock = self._sock
        moved = _moved(sock)
        if sock is None or moved is None:
            return False
        count, self._moved_bytes = moved - self._moved_bytes, moved
        if self.is_answered != self._was_answered:
            self._was_answered = self.is_answered
            self._waits.clear()
            self.waited_s, self.waited_bytes = 0.0, 0
        unsent_bytes, unread_bytes = _queued(sock)
        self._still_s = 0.0 if count or unread_bytes else self._still_s + elapsed_s
        if unread_bytes == 0 if self.is_answered else unsent_bytes > 0:
            self._waits.append((elapsed_s, count))
            self.waited_s += elapsed_s
            self.waited_bytes += count
            if self.waited_s - self._waits[0][0] >= self._window_s:
                seconds, early_bytes = self._waits.popleft()
                self.waited_s -= seconds
                self.waited_bytes -= early_bytes
        return count != 0

    @property
    def _window_s(self) -> float:
        return self._endurance.receiving_s if self._was_answered else self._endurance.sending_s

    def judge(self, share: Callable[["Request"], float]) -> None:
        """Give the connection up if it is time. `share`: bytes a second that other connections got, infinite without others."""
        if self._still_s >= self._endurance.still_s:
            self._give_up(f"no byte moved for {self._endurance.still_s:g} s")
        elif self.waited_s >= self._window_s and not self._may_dawdle:
            rate = self.waited_bytes / self.waited_s
            if rate < self._endurance.floor_bytes_per_s and rate < share(self) / 2:
                self._give_up(f"{rate / 1000:.1f} kB/s for {self._window_s:g} s")

    def _give_up(self, reason: str) -> None:
        sock, self._sock = self._sock, None
        self.given_up = reason
        if sock is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS's own would let its owner go on in plain text


class Watch:
    """Looks at the connections of a store's requests, on a thread that lives while there are any.

    The kernel counts the bytes that the other side acknowledged and sent. So what waits in its buffers does not count as sent, a body
    of megabytes is not given up while it moves, and a connection that trickles is. Where it does not count, the socket's timeouts decide.

    Args:
        endurance: When to give up.
        progress: Called when anything moved.
        clock: Monotonic seconds.
    """

    def __init__(
        self, endurance: Endurance, progress: Progress, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._endurance = endurance
        self._progress = progress
        self._clock = clock
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._thread: threading.Thread | None = None
        self._finished: deque[tuple[float, int, float]] = deque(maxlen=_FINISHED)  # when, bytes, seconds

    @contextmanager
    def over(self, operation: str, *, body_bytes: int = 0, may_dawdle: bool = False) -> Iterator[None]:
        """Watch what this thread asks; `TransientStoreError` says why it was given up. Within another one, that one goes on."""
        if _here.request is not None:
            yield
            return
        with self._changed:
            request = Request(self._endurance, self._is_awake(), body_bytes, may_dawdle)
            self._requests.append(request)
        began_s = self._clock()
        _here.request = request
        try:
            yield
            if body_bytes >= _LARGE_BYTES:
                self._note(body_bytes, began_s)
        except StoreError as error:
            if not request.given_up:
                raise
            raise TransientStoreError(f"{operation}: {request.given_up}, gave the connection up", key=error.key) from (
                error.__cause__
            )
        finally:
            _here.request = None
            with self._changed:
                self._requests.remove(request)

    def close(self) -> None:
        """End the thread, unless requests are under way."""
        with self._changed:
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(self._endurance.tick_s)

    def _is_awake(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._live, name="asyncckpt-watch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter ends
                return False
            self._thread = thread
        return True

    def _note(self, body_bytes: int, began_s: float) -> None:
        now_s = self._clock()
        with self._changed:
            self._finished.append((now_s, body_bytes, now_s - began_s))

    def _live(self) -> None:
        try:
            self._look_on()
        finally:
            with self._changed:
                if self._thread is threading.current_thread():  # it failed: the next request starts another
                    self._thread = None

    def _look_on(self) -> None:
        seen_s = self._clock()
        while True:
            with self._changed:
                self._changed.wait(self._endurance.tick_s)
                if not self._requests:
                    self._thread = None
                    return
                requests = tuple(self._requests)
            now_s = self._clock()
            elapsed_s = min(now_s - seen_s, 2 * self._endurance.tick_s)  # longer: it was us who stood still
            seen_s = now_s
            moved = [request.look(elapsed_s) for request in requests]
            if any(moved):
                with suppress(OSError):  # who wanted to know is gone
                    self._progress()
            for request in requests:
                request.judge(self._share_beside)

    def _share_beside(self, request: Request) -> float:
        """Bytes a second that a connection got lately, this one left out."""
        since_s = self._clock() - self._endurance.sending_s
        with self._changed:
            seen = [(count, took_s) for ended_s, count, took_s in self._finished if ended_s >= since_s]
            seen += [(one.waited_bytes, one.waited_s) for one in self._requests if one is not request]
        took_s = sum(seconds for _, seconds in seen)
        return sum(count for count, _ in seen) / took_s if took_s else float("inf")


def _moved(sock: socket.socket | None) -> int | None:
    """Bytes that the other side acknowledged or sent; None if nobody counts them."""
    if not isinstance(sock, socket.socket):  # TLS within TLS, through a proxy
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    return sum(struct.unpack_from("QQ", info, _COUNTERS_AT)) or None if len(info) == _TCP_INFO_BYTES else None


def _queued(sock: socket.socket) -> tuple[int, int]:
    """Bytes that were not acknowledged yet, and bytes that were not read yet."""
    counts = []
    for question in (termios.TIOCOUTQ, termios.FIONREAD):
        try:
            counts.append(struct.unpack("i", fcntl.ioctl(sock, question, bytes(4)))[0])
        except (OSError, ValueError):
            counts.append(0)
    return counts[0], counts[1]
