"""A system of the benchmarks that may lie about its snapshots."""

import threading
import time
from pathlib import Path

import torch

from benchmarks.peers.base import Peer, Saving
from benchmarks.states import State
from benchmarks.stores.base import Place


class Eager(Peer):
    """Reads the live tensors on a thread, `pause_s` later; unless it is honest, it says at once that its snapshot is complete."""

    name = "eager"
    asynchronous = True

    def __init__(self, folder: Path, *, honest: bool, pause_s: float = 0.0) -> None:
        super().__init__(Place("folder", folder))
        self._honest, self._pause_s = honest, pause_s

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)

        def write() -> None:
            if not self._honest:
                saving.staged()
            time.sleep(self._pause_s)
            torch.save(state.state_dicts(), self.folder / str(step))
            saving.durable()

        threading.Thread(target=write).start()
        saving.returned()
        return saving

    def restore(self, step: int, state: State) -> None:
        loaded = torch.load(self.folder / str(step), weights_only=True)
        for name, held in state.objects.items():
            held.load_state_dict(loaded[name])

    def stored_bytes(self, step: int) -> int:
        return (self.folder / str(step)).stat().st_size

    def forget(self, step: int) -> None:
        (self.folder / str(step)).unlink()
