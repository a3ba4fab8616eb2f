"""`torch.save` to one file, then a sync: what most training scripts do. It blocks until the end.

Without the CRC32 of each record (`torch.serialization.set_crc32_options(False)`), which takes more than half of its time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import sync_file
from benchmarks.peers.base import Peer, Saving, leaf_paths
from benchmarks.states import State


@contextmanager
def without_crc32() -> Iterator[None]:
    """`torch.save` as fast as it can be; `torch.load` reads such files."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TorchSave(Peer):
    name = "torch.save"

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        with without_crc32():
            torch.save(state.state_dicts(), self._path(step))
        sync_file(self._path(step))
        saving.durable()
        saving.returned()
        return saving

    def restore(self, step: int, state: State) -> None:
        loaded = torch.load(self._path(step), mmap=True, map_location="cpu", weights_only=True)
        for name, held in state.objects.items():
            held.load_state_dict(loaded[name])

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor:
        node = torch.load(self._path(step), mmap=True, map_location="cpu", weights_only=True)
        for key in leaf_paths(state)[index]:
            node = node[key]
        return node.clone()

    def stored_bytes(self, step: int) -> int:
        return self._path(step).stat().st_size

    def forget(self, step: int) -> None:
        self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}.pt"
