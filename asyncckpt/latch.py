"""A latch: it is set once, and whoever waits for it goes on."""

import threading


class Latch:
    """What `threading.Event` is, without a lock that is held while Python code runs.

    A signal handler that comes in the middle of `Event.wait()` finds its lock held: neither it nor any other thread can set that event
    until the handler returns. Here every step is one call in C, so a handler may set it or wait for it at any moment, and may raise.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()  # free once it is set
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it is."""
        return self._is_set

    def set(self) -> None:
        """Let everybody go on; again does nothing."""
        self._is_set = True
        self._open()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is set, or for `timeout` seconds; whether it is."""
        if not self._is_set:
            try:
                self._lock.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
            finally:
                if self._is_set:
                    self._open()  # for the next who waits
        return self._is_set

    def _open(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # it is free
            return
