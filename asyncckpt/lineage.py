"""Which run's checkpoints a Saver goes on with, and the look at its folder before its first save.

A run inherits the lineage of the checkpoint that it restored, so that retention knows which checkpoints are its own.
"""

import os
import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.checkpoints.admission import admit, newest_lineage
from asyncckpt.format import keys
from asyncckpt.latch import Latch
from asyncckpt.store.base import PerStore, Store
from asyncckpt.store.opening import parse_url

_HURRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Note:
    """What this process knows of a root. `restored`: the step that it last read there; None if it only saved."""

    lineage: str
    restored: int | None


Root = Store | str
"""What tells one root from another: a URL in its one form, or the user's own Store."""

_by_url: dict[str, Note] = {}
_by_store = PerStore[Note]()


def root_of(url: str | os.PathLike[str], store: object) -> Root:
    """The root that a front door was given."""
    return store if isinstance(store, Store) else str(parse_url(url))


def note(root: Root, lineage: str, *, restored: int | None) -> None:
    """This process has restored a checkpoint of this lineage below the root, of this step, or committed one (None)."""
    before = known(root)
    made = Note(lineage, before.restored if restored is None and before is not None else restored)
    if isinstance(root, str):
        _by_url[root] = made
    else:
        _by_store.set(root, made)


def known(root: Root) -> Note | None:
    """What this process knows of the root."""
    return _by_url.get(root) if isinstance(root, str) else _by_store.get(root)


@dataclass(slots=True, eq=False)
class _Look:
    """At a folder, for the save of one step. `begun`: its thread runs; `answered`: the store did, before `told`."""

    step: int
    told: Latch
    begun: bool = False
    answered: bool = False
    conflict: errors.CheckpointConflictError | None = None
    nowhere: errors.StoreNotFoundError | None = None
    thread: threading.Thread | None = None


class Arrival:
    """One Saver's right to write below its root, and the lineage that its checkpoints get.

    `open_store`: for the look, which has a thread and a store of its own, so that nothing waits for one that is away. `adopt`: take the
    newest checkpoint's lineage instead of asking whose it is. `wait_s`: so long a first save waits for the answer; then it goes on, and the
    service looks as soon as the store answers.
    """

    def __init__(
        self,
        root: Root,
        open_store: Callable[[], AbstractContextManager[Store]],
        *,
        adopt: bool,
        wait_s: float,
    ) -> None:
        self.lineage = secrets.token_hex(4)
        self._root = root
        self._open_store = open_store
        self._adopt = adopt
        self._wait_s = wait_s
        self.restored = -1
        """The step that this process last read there, -1 if none: what stands above it is another branch."""
        self._settled = False
        self._waited = False
        self._look: _Look | None = None

    @property
    def newcomer(self) -> bool:
        """Whether the engine must look before it commits, since nobody could yet."""
        return not self._settled and not self._adopt

    def resume(self, step: int, *, newest: int) -> None:
        """The checkpoint of this step was restored from this root: its run goes on. If a newer one stands there, the first save looks."""
        if (found := known(self._root)) is not None:
            self.lineage = found.lineage
        self.restored = step
        self._settled = newest <= step or self._adopt
        if not self._settled:
            self._look, self._waited = None, False

    def begin(self, step: int) -> None:
        """Start to look, in the background; `admit` hears the answer."""
        if self._settled or self._look is not None:
            return
        found = known(self._root)
        if found is not None:
            self.lineage = found.lineage
            self.restored = -1 if found.restored is None else found.restored
        look = self._look = _Look(step, Latch())
        look.thread = threading.Thread(target=self._run, args=(look,), name="asyncckpt-arrival", daemon=True)
        try:
            look.thread.start()
        except RuntimeError as error:  # the limit of threads: the engine looks
            self._look = None
            if error.__context__ is not None:  # an interrupt in the middle of start()
                raise
        look.begun = True

    def admit(self, step: int) -> errors.StoreNotFoundError | None:
        """Wait for the answer; `CheckpointConflictError` if another run's checkpoints stand above the step.

        Only the first save waits. Where the store does not answer it goes on, and the engine looks before it commits. Returns an error if
        there is no such store: then the save fails, and the next one looks again.
        """
        look = self._look
        if self._settled or not self._is_told(look, 0 if self._waited else self._wait_s + _HURRY_S):
            return None
        if look is not None and look.nowhere is not None:
            self._look = None
            look.nowhere.key = look.nowhere.key or keys.record_key(step)
            return look.nowhere.at(step=step)
        if look is not None and look.answered and look.step != step and not self._adopt:
            self._look = None  # it was for another save, which came to nothing
            self.begin(step)
            look = self._look
            if not self._is_told(look, self._wait_s):
                return None
        if look is None:
            return None
        if look.conflict is not None:
            self._look, self._waited = None, False  # the next save looks again: the user may have rewound
            raise look.conflict
        if look.answered:
            self._settled = True
        elif self._adopt:
            self._look = None  # the next save asks again, and does not wait
        return None

    def committed(self) -> None:
        """A checkpoint of this Saver stands."""
        if not self._adopt:
            self._settled = True
        note(self._root, self.lineage, restored=None)

    def close(self) -> None:
        """Wait until nothing looks any more, for a second at most: the store may be away, and nobody needs the answer."""
        if self._look is not None and self._look.thread is not None:
            with suppress(RuntimeError):  # an interrupt came before it was started
                self._look.thread.join(min(self._wait_s, _HURRY_S))

    def _is_told(self, look: _Look | None, wait_s: float) -> bool:
        """Whether it has ended, after so long a wait at most."""
        if look is None:
            return False
        told = look.told.wait(
            wait_s if look.begun else 0
        )  # a signal handler may have come before its thread was started
        self._waited = True
        return told

    def _run(self, look: _Look) -> None:
        look.begun = True
        try:
            with self._open_store() as store:
                if self._adopt:
                    self.lineage = newest_lineage(store) or self.lineage
                else:
                    admit(store, look.step, restored=self.restored)
        except errors.CheckpointConflictError as error:
            look.conflict = error
            look.answered = True
        except errors.StoreNotFoundError as error:
            look.nowhere = error
            look.answered = True
        except Exception:  # noqa: BLE001 - the save itself meets the same store, and tells
            return
        else:
            look.answered = True
        finally:
            look.told.set()
