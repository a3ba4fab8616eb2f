"""Whether a store answers: what is told while it does not, and whether it ever did."""

import logging
import math
import threading
import time
from collections.abc import Callable

from asyncckpt.errors import StoreError
from asyncckpt.events import StoreAway, StoreBack
from asyncckpt.options import RetryPolicy

AWAY_S, AGAIN_S = 10.0, 60.0
_ASK_LATER = (408, 425, 429)
_LOG = logging.getLogger("asyncckpt")

Tell = Callable[[StoreAway | StoreBack], None]

_met: set[str] = set()


def is_met(address: str) -> bool:
    """Whether somebody has answered there, to this process or to the one that started it."""
    return address in _met


def meet(address: str) -> None:
    """Somebody has answered there."""
    _met.add(address)


def line(name: str, event: StoreAway | StoreBack, meanwhile: str) -> str:
    """What people read of it. `meanwhile`: what happens to their program."""
    if isinstance(event, StoreBack):
        return f"{name} answers again, after {event.after_s:.0f} s"
    end = time.strftime("%H:%M:%S", time.localtime(time.time() + event.left_s))
    reason = event.error or "requests are under way, and no byte moves"
    return (
        f"cannot reach {name}: no answer for {event.since_s:.0f} s; retrying until {end}, {meanwhile}. Last: {reason}"
    )


class Outage:
    """One story of several contacts with the same store, such as each worker's. Moments are monotonic seconds."""

    def __init__(self) -> None:
        self._told_s: float | None = None
        self._answered_s = -math.inf

    def answered(self, now_s: float) -> None:
        """The store answered one of them."""
        self._answered_s = now_s

    def is_news(self, event: StoreAway | StoreBack, now_s: float) -> bool:
        """Whether what one of them says is to be told: none had an answer lately, and none has just said so."""
        if isinstance(event, StoreBack):
            was_told, self._told_s = self._told_s is not None, None
            return was_told
        is_repeated = self._told_s is not None and now_s - self._told_s < AGAIN_S / 2
        if is_repeated or now_s - self._answered_s < event.since_s / 2:
            return False
        self._told_s = now_s
        return True


class Contact:
    """One store object as it answers or does not, over all its requests. Thread-safe.

    The store is *away* when a request is pending and none was answered for ten seconds. An answer is what S3 itself says: any status below 500
    but those that ask to come later. While no request has failed, bytes that move are a sign of life, too: a part may take
    longer on a thin link. `tell` hears of it then and once a minute, and once when it is over; on the thread that watches, or that was answered.

    Args:
        name: The store's URL, for people.
        address: What tells one store from another in this process.
        policy: How long requests are tried.
        tell: None writes the lines itself.
        met: Told when somebody answers at the address for the first time.
        away_s: After so long without an answer the store is away.
        clock: Monotonic seconds.
        watches: Whether a thread calls `look` while requests are pending.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        policy: RetryPolicy,
        tell: Tell | None = None,
        met: Callable[[], None] = lambda: None,
        away_s: float = AWAY_S,
        clock: Callable[[], float] = time.monotonic,
        watches: bool = True,
    ) -> None:
        self._name = name
        self._address = address
        self._policy = policy
        self._tell = tell or (lambda event: _LOG.warning("%s", line(name, event, "reading waits")))
        self._tell_met = met
        self._away_s = away_s
        self._clock = clock
        self._watches = watches
        self._changed = threading.Condition()
        self._pending: dict[int, float] = {}  # ticket to when it was asked
        self._next = 0
        self._quiet_s = 0.0  # since the last answer, or since something was first asked behind it
        self._moved_s = 0.0
        self._error = ""  # of a request that failed since the last answer
        self._finds_nobody = False  # and that is why
        self._away = False
        self._told_s = 0.0
        self._closed = False
        self._is_watched = False
        self._thread: threading.Thread | None = None  # the last one that watched; it may be about to end

    @property
    def is_met(self) -> bool:
        """Whether this is not the first contact."""
        return is_met(self._address)

    def asks(self) -> int:
        """A request is pending from now on; `ends` must follow with what this returns."""
        with self._changed:
            now_s = self._clock()
            if not self._pending:
                self._quiet_s = self._quiet_s if self._away else now_s
                self._error = self._error if self._away else ""
            self._next += 1
            self._pending[self._next] = self._moved_s = now_s
            if self._watches and not self._is_watched and not self._closed:
                self._watch()
            return self._next

    def ends(self, ticket: int) -> None:
        """It has its answer, or was given up."""
        with self._changed:
            del self._pending[ticket]
            if not self._pending:
                self._changed.notify_all()  # the thread that watches ends, unless more is asked at once

    def moves(self) -> None:
        """Bytes moved."""
        self._moved_s = self._clock()

    def answers(self) -> None:
        """The store answered a request."""
        self._meets()
        with self._changed:
            was_away, since_s = self._away, self._quiet_s
            self._away, self._error, self._finds_nobody = False, "", False
            self._quiet_s = self._clock()
            after_s = self._quiet_s - since_s
        if was_away:
            self._tell(StoreBack(after_s))

    def fails(self, error: StoreError) -> None:
        """A request failed. Some failures are answers."""
        if error.status and error.status < 500 and error.status not in _ASK_LATER:
            self.answers()
            return
        if error.status:
            self._meets()
        with self._changed:
            self._error, self._finds_nobody = error.message, error.unreached
        self.look()

    def look(self) -> float:
        """Tell if there is something to tell; in how many seconds there may be more."""
        with self._changed:
            now_s = self._clock()
            alive_s = self._quiet_s if self._error else max(self._quiet_s, self._moved_s)
            due_s = self._told_s + AGAIN_S if self._away else alive_s + self._away_s
            if not self._pending or now_s < due_s:
                return max(due_s - now_s, 0.01)
            self._away, self._told_s = True, now_s
            left_s = max(0.0, min(self._pending.values()) + self._patience_s() - now_s)
            event = StoreAway(now_s - self._quiet_s, self._error, 0, left_s)
        self._tell(event)
        return AGAIN_S

    def close(self) -> None:
        """Nothing is asked any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _patience_s(self) -> float:
        if self._finds_nobody and not self.is_met:
            return min(self._policy.first_contact_s, self._policy.deadline_s)
        return self._policy.deadline_s

    def _meets(self) -> None:
        if not is_met(self._address):
            meet(self._address)
            self._tell_met()

    def _watch(self) -> None:
        if self._thread is not None:
            self._thread.join()  # it has left the lock, and only has to end
        thread = threading.Thread(target=self._look_on, name="asyncckpt-contact", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads: whoever is refused looks
            return
        self._thread, self._is_watched = thread, True

    def _look_on(self) -> None:
        while True:
            wait_s = self.look()
            with self._changed:
                if self._pending and not self._closed:
                    self._changed.wait(wait_s)
                if self._closed or not self._pending:
                    self._is_watched = False
                    return
