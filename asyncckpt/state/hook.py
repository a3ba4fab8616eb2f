"""The gate in front of every optimizer step: while a snapshot is being copied, steps of this process wait for it.

One global hook of torch (`register_optimizer_step_pre_hook`) serves all savers. torch runs it ahead of an optimizer's
own hooks, for every `torch.optim.Optimizer`: second, fused, wrapped and deep-copied ones too.
"""

import os
import threading
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook


class Guarded(Protocol):
    """A copy that steps must not overtake."""

    def hold_step(self) -> None:
        """Return when the sources may be written. Called on the thread of the step."""

    def abandon(self) -> None:
        """The process was forked and this is the child: nobody copies here."""


_in_flight: set[Guarded] = set()


class StepGate:
    """`enter` and `leave` say what is in flight; the hook exists between the first `open` and the last `close`.

    What a copy thread or a step calls takes no lock: a signal handler that came in the middle would keep it from all others.
    """

    def __init__(self) -> None:
        self.forks = 0
        """How many forks lie between this process and the one that imported this module."""
        self._users: set[object] = set()
        self._handle: Any = None
        self._lock = threading.RLock()  # a finalizer may close while this thread opens

    def open(self, user: object) -> None:
        """Install the hook, if this is its first user."""
        with self._lock:
            self._users.add(user)
            if self._handle is None:
                self._handle = register_optimizer_step_pre_hook(_before_step)

    def close(self, user: object) -> None:
        """Mirror of `open`."""
        with self._lock:
            self._users.discard(user)
            if not self._users and self._handle is not None:
                self._handle.remove()
                self._handle = None

    def enter(self, copy: Guarded) -> None:
        """From now on steps wait for this copy."""
        _in_flight.add(copy)

    def leave(self, copy: Guarded) -> None:
        """Steps need not wait for this copy any more."""
        _in_flight.discard(copy)

    def in_flight(self) -> tuple[Guarded, ...]:
        """The copies that steps wait for."""
        return tuple(_in_flight)

    def forked(self) -> None:
        """In a forked child no thread copies: nothing is in flight, and locks held by others are gone."""
        self.forks += 1
        self._lock = threading.RLock()
        for copy in tuple(_in_flight):
            copy.abandon()
        _in_flight.clear()


gate = StepGate()


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - torch's signature
    if _in_flight:
        for copy in gate.in_flight():
            copy.hold_step()


# torch.compile must not trace into a wait (what `torch.compiler.disable` sets, without importing the compiler).
_before_step._torchdynamo_disable = True  # type: ignore[attr-defined]

os.register_at_fork(after_in_child=gate.forked)
