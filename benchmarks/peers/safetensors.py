"""`safetensors.torch.save_file` to one file, then a sync. It blocks, and holds tensors alone (no param_groups)."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.measure import sync_file
from benchmarks.peers.base import Peer, Saving, leaf_paths
from benchmarks.states import State


class Safetensors(Peer):
    name = "safetensors"

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        save_file(_named(state), self._path(step))
        sync_file(self._path(step))
        saving.durable()
        saving.returned()
        return saving

    @torch.no_grad()
    def restore(self, step: int, state: State) -> None:
        with safe_open(self._path(step), framework="pt", device=str(state.device)) as file:
            for name, tensor in _named(state).items():
                tensor.copy_(file.get_tensor(name))

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor:
        with safe_open(self._path(step), framework="pt", device=str(state.device)) as file:
            return file.get_tensor(_name(leaf_paths(state)[index]))

    def stored_bytes(self, step: int) -> int:
        return self._path(step).stat().st_size

    def forget(self, step: int) -> None:
        self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}.safetensors"


def _named(state: State) -> dict[str, torch.Tensor]:
    return {_name(path): tensor for path, tensor in zip(leaf_paths(state), state.tensors(), strict=True)}


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))
