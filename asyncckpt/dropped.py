"""A Saver that nobody holds any more, as after a notebook's cell was run again: its saves are finished, then its service and its memory go."""

import contextlib
import math
import os
import threading

from asyncckpt.backing import Backing
from asyncckpt.launch import Launcher
from asyncckpt.save import Ledger

_dropped: "set[Dropped]" = set()  # those that are not finished yet


class Dropped:
    """What is left of one Saver. `begin` is called when it is gone."""

    def __init__(self, launcher: Launcher, ledger: Ledger, backing: Backing) -> None:
        self._pid = os.getpid()
        self._launcher = launcher
        self._ledger = ledger
        self._backing = backing
        self._ending = threading.Lock()
        self._is_ended = False

    def begin(self) -> None:
        """Called in the middle of whatever code drops the last reference or collects garbage: takes no lock and waits for nothing of ours."""
        if os.getpid() != self._pid or not self._launcher.used:
            return
        _dropped.add(self)
        with contextlib.suppress(RuntimeError):  # the limit of threads: the interpreter's end hands the saves over
            threading.Thread(target=self._finish, name="asyncckpt-dropped", daemon=True).start()

    def _finish(self) -> None:
        """Whoever holds a Save has its answer; a failure is an ERROR in the log."""
        for save in self._ledger.underway():
            save._ended.wait()
        self._end(wait_s=math.inf)
        _dropped.discard(self)

    def _hand_over(self) -> None:
        for save in self._ledger.underway():
            save._staged.wait()
            if self._backing.engine_name == "inline":
                save._ended.wait()
        self._end(wait_s=math.inf if self._backing.engine_name == "inline" else 0.0)

    def _end(self, *, wait_s: float) -> None:
        """Once; whoever comes second waits. A tensor that a thread of ours frees while the interpreter ends aborts the process."""
        with self._ending:
            if not self._is_ended:
                self._is_ended = True
                self._launcher.close(wait_s=wait_s)
                self._backing.close()


def hand_over_dropped() -> None:
    """At the interpreter's end: nothing that was saved may be lost."""
    for dropped in list(_dropped):
        dropped._hand_over()


def leave_dropped_in_child() -> None:
    """In a forked child: let go of descriptors and maps, wait for nothing."""
    for dropped in list(_dropped):
        dropped._launcher.leave_in_child()
