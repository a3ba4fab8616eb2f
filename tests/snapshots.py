"""What tests of snapshots share: a state with its plan and arena, and a way to act at one moment of a copy."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import TornSnapshotError
from asyncckpt.format.plan import plan
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.snapshot import Copier
from asyncckpt.state.tree import Flattener

PATIENCE_S = 30.0  # for events that come at once unless something hangs


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of the values, in row order."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


class Rig:
    """Saves one state into one arena, as a Saver would, and reads back what stands there."""

    def __init__(self, state: Mapping[Any, Any], copier: Copier) -> None:
        self.state = state
        self.copier = copier
        self._flattener = Flattener()
        self.flat = self._flattener.flatten(state)
        self.plan = plan(self.flat.structure)
        self.arena = Arena.create(0, self.plan.arena_bytes)
        self.expected: dict[str, bytes] = {}
        self.then: list[Copy] = []

    def save(self, *, overlap: bool = True, begins: Callable[[], None] | None = None) -> Copy:
        self.flat = self._flattener.flatten(self.state)
        self.expected = {self.flat.structure.path(i): raw(tensor) for i, tensor in enumerate(self.flat.tensors)}
        return self.copier.copy(
            self.flat,
            self.plan,
            self.arena,
            overlap=overlap,
            started_s=time.perf_counter(),
            then=self.then.append,
            begins=begins,
        )

    def stored(self) -> dict[str, bytes]:
        found = {}
        for i, spec in enumerate(self.plan.structure.tensors):
            offset = self.plan.tensor_offsets[i]
            length = len(self.expected[self.plan.structure.path(i)])
            found[self.plan.structure.path(i)] = self.arena.buffer[offset : offset + length]
            assert spec is self.flat.structure.tensors[i]
        return found

    def assert_exact(self, copy: Copy) -> None:
        copy.wait(PATIENCE_S)
        assert copy.error is None
        assert self.stored() == self.expected

    def assert_torn(self, copy: Copy, *paths: str) -> None:
        copy.wait(PATIENCE_S)
        assert isinstance(copy.error, TornSnapshotError)
        assert copy.error.key in paths

    def close(self) -> None:
        self.copier.forget(self.arena)
        self.arena.close()


class Moment:
    """A point that a copy thread reaches and passes only when it is let; give it to `Copier(before_copy=)`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE_S)

    def pass_(self) -> None:
        self._open.set()


def in_thread(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread
