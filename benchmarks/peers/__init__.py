"""Every system in the benchmark, one file each. A module is imported when its peer is asked for."""

import importlib
from pathlib import Path

from benchmarks.peers.base import Peer

_HOMES = {
    "asyncckpt": ("asyncckpt", "AsyncCkpt"),
    "asyncckpt-none": ("asyncckpt", "AsyncCkptRaw"),
    "dcp-thread": ("dcp", "DcpThread"),
    "dcp-process": ("dcp", "DcpProcess"),
    "dcp.save": ("dcp", "DcpSave"),
    "torch.save": ("torch_save", "TorchSave"),
    "safetensors": ("safetensors", "Safetensors"),
}
NAMES = tuple(_HOMES)


def open_peer(name: str, folder: Path) -> Peer:
    """A peer with an empty folder of its own below `folder`."""
    module, kind = _HOMES[name]
    peer: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)(folder)
    return peer
