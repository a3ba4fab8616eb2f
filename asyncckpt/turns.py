"""Turns at a Saver: one thread at a time begins a save, and a signal handler may call in the middle of its own thread's turn."""

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

from asyncckpt.errors import CheckpointError, ReentrantCallError

T = TypeVar("T")


class Turns:
    """Who is in the middle of what. The locks know it: written in C, they stay right whatever a handler raises, at whatever moment."""

    def __init__(self) -> None:
        self.closed = False
        """Nobody may begin anything."""
        self.owed = False
        """A `close()` came in the middle of a turn, which may write into an arena: whoever has the turn ends the rest."""
        self._saving = threading.RLock()
        self._restoring = threading.RLock()
        self.ending = threading.RLock()
        """Held while the engine ends and the arenas are freed."""

    def within(self) -> bool:
        """Whether this very thread is in the middle of a turn: a signal handler asks, or a hook."""
        return _is_mine(self._saving) or _is_mine(self._restoring)

    def is_ending(self) -> bool:
        """Whether this very thread is about to end it all: every save has its answer then."""
        return _is_mine(self.ending)

    def begin_save(self, act: Callable[[], T]) -> T:
        """Do it alone, or within a turn of this thread."""
        if _is_mine(self._restoring):
            raise ReentrantCallError(
                "save() was called in the middle of restore(), when the state is neither the old nor the new one; in a signal handler, set a "
                "flag and save after the next step"
            )
        return self._take(self._saving, act)

    def prepare(self, act: Callable[[], T]) -> T:
        """Do it alone."""
        self._refuse_within("prepare")
        return self._take(self._saving, act)

    def restore(self, act: Callable[[], T]) -> T:
        """Do it while this thread does nothing else; other threads may save."""
        self._refuse_within("restore")
        return self._take(self._restoring, act)

    def _refuse_within(self, call: Literal["prepare", "restore"]) -> None:
        if self.within():
            raise ReentrantCallError(
                f"{call}() was called in the middle of another call of this Saver on the same thread, which reads or writes the state; in a "
                f"signal handler, set a flag and call {call}() after the next step"
            )

    def check(self) -> None:
        """`CheckpointError` if the Saver is closed."""
        if self.closed:
            raise CheckpointError("this Saver is closed; make another one from its url")

    def finish(self, act: Callable[[], T], *, end: Callable[[], None], leave: Callable[[], None]) -> T:
        """Have a turn, and `end` what a `close()` in the middle of it left, or `leave` it after an error."""
        try:
            result = act()
        except BaseException:
            if self._owes():
                leave()
            raise
        if self._owes():
            end()
        return result

    def _owes(self) -> bool:
        return self.owed and not self.within()

    def _take(self, lock: threading.RLock, act: Callable[[], T]) -> T:
        with lock:
            self.check()  # once more: it may have been closed while this thread waited
            return act()


def _is_mine(lock: threading.RLock) -> bool:
    return bool(lock._is_owned())  # type: ignore[attr-defined]
