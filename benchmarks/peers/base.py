"""The one contract of every system in the benchmark."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from benchmarks.states import State
from benchmarks.stores.base import Place


class Saving:
    """One save on its way. Every stamp is taken by the harness's clock, in seconds from the moment `save()` was called.

    An asynchronous system stamps on its own thread, at once, so that a busy main thread delays no stamp by its own slowness.
    `on_staged`, if the harness sets it, runs right behind that stamp, and writes to the state: a system that stamps before its
    snapshot is complete stores what it should not.
    """

    on_staged: ClassVar[Callable[[], None] | None] = None

    def __init__(self, step: int) -> None:
        self.step = step
        self.returned_s = 0.0
        self.staged_s = 0.0
        self.durable_s = 0.0
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._staged = threading.Event()
        self._durable = threading.Event()
        self._started_s = time.perf_counter()

    def returned(self) -> None:
        """The call is over."""
        self.returned_s = time.perf_counter() - self._started_s

    def staged(self, after_s: float | None = None, *, error: BaseException | None = None) -> None:
        """The snapshot is complete: the state may change. `after_s`: since when, if the news comes later."""
        now_s = time.perf_counter() - self._started_s
        with self._lock:
            if not self._staged.is_set():  # news of the snapshot may come after news of the end
                self.staged_s = now_s if after_s is None else after_s
                self._error = self._error or error
                self._now_staged()

    def durable(self, error: BaseException | None = None) -> None:
        """The checkpoint is complete and synced: a crash of the machine leaves it whole."""
        self.durable_s = time.perf_counter() - self._started_s
        with self._lock:
            self._error = self._error or error
            if not self._staged.is_set():
                self.staged_s = self.durable_s
                self._now_staged()
        self._durable.set()

    def done(self) -> bool:
        return self._durable.is_set()

    def wait_staged(self) -> None:
        self._staged.wait()
        self._raise()

    def wait_durable(self) -> None:
        self._durable.wait()
        self._raise()

    def _now_staged(self) -> None:
        if Saving.on_staged is not None:
            Saving.on_staged()
        self._staged.set()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Peer(ABC):
    """A system that saves a state to a place of its own.

    `guards_steps`: it holds an optimizer's step back itself until the snapshot is complete; for others the loop must wait.
    `asynchronous`: `save()` returns before the checkpoint is durable. `stores`: the kinds of place that it can save to.
    """

    name: str
    guards_steps = False
    asynchronous = False
    stores = frozenset({"folder"})
    measures_itself = False  # its first saves try what it may choose

    def __init__(self, place: Place, **options: Any) -> None:
        if place.kind not in self.stores:
            raise ValueError(f"{self.name} cannot save to a place of kind {place.kind!r}")
        if options:
            raise TypeError(f"{self.name} has no such options: {', '.join(options)}")
        self.place = place

    @property
    def folder(self) -> Path:
        """Of a place that is a folder."""
        assert self.place.folder is not None
        return self.place.folder

    def prepare(self, state: State) -> None:  # noqa: B027 - most offer nothing
        """Whatever the system offers to do ahead of the first save. Not timed."""

    @abstractmethod
    def save(self, step: int, state: State) -> Saving:
        """Start a save, as soon as the system returns; durable means synced, for everybody."""

    @abstractmethod
    def restore(self, step: int, state: State) -> None:
        """Load into the objects of `state`."""

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor | None:  # noqa: ARG002 - some cannot
        """One tensor out of a checkpoint: `state.tensors()[index]`, read without the rest. None: the system cannot."""
        return None

    @abstractmethod
    def stored_bytes(self, step: int) -> int:
        """Bytes of the checkpoint in the store."""

    @abstractmethod
    def forget(self, step: int) -> None:
        """Delete a checkpoint, outside of all timing."""

    def close(self) -> None:  # noqa: B027 - most have no background
        """End whatever runs in the background."""


def bytes_below(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


_known_paths: WeakKeyDictionary[State, list[tuple[str | int, ...]]] = WeakKeyDictionary()


def leaf_paths(state: State) -> list[tuple[str | int, ...]]:
    """Where each of `state.tensors()` lies in `state.state_dicts()`, in the same order. Kept: structures do not change."""
    if state not in _known_paths:
        _known_paths[state] = _paths_below(state.state_dicts(), ())
    return _known_paths[state]


def _paths_below(node: Any, path: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    if isinstance(node, torch.Tensor):
        return [path]
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    return [leaf for key, child in children for leaf in _paths_below(child, (*path, key))]
