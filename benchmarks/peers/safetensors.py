"""`safetensors.torch.save_file` to one file, then a sync. It blocks, and holds tensors alone (no param_groups)."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.measure import sync_file
from benchmarks.peers.base import Peer, Saving
from benchmarks.states import State


class Safetensors(Peer):
    name = "safetensors"

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        save_file(dict(_flat(state.state_dicts(), "")), self._path(step))
        sync_file(self._path(step))
        saving.durable()
        saving.returned()
        return saving

    @torch.no_grad()
    def restore(self, step: int, state: State) -> None:
        with safe_open(self._path(step), framework="pt") as file:
            for name, tensor in _flat(state.state_dicts(), ""):
                tensor.copy_(file.get_tensor(name))

    def stored_bytes(self, step: int) -> int:
        return self._path(step).stat().st_size

    def forget(self, step: int) -> None:
        self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}.safetensors"


def _flat(node: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        return [(name, node.detach())]
    children = node.items() if isinstance(node, dict) else ()
    return [leaf for key, child in children for leaf in _flat(child, f"{name}/{key}")]
