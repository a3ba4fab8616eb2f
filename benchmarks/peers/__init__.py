"""Every system in the benchmark, one file each. A module is imported when its peer is asked for."""

import importlib
from typing import Any

from benchmarks.peers.base import Peer
from benchmarks.stores.base import Place

_HOMES = {
    "asyncckpt": ("asyncckpt", "AsyncCkpt"),
    "asyncckpt-none": ("asyncckpt", "AsyncCkptNone"),
    "asyncckpt-planes": ("asyncckpt", "AsyncCkptPlanes"),
    "asyncckpt-zstd": ("asyncckpt", "AsyncCkptZstd"),
    "asyncckpt-eager": ("asyncckpt", "AsyncCkptEager"),
    "asyncckpt-1worker": ("asyncckpt", "AsyncCkptOneWorker"),
    "dcp-thread": ("dcp", "DcpThread"),
    "dcp-thread-default": ("dcp", "DcpThreadDefault"),
    "dcp-process": ("dcp", "DcpProcess"),
    "dcp-process-default": ("dcp", "DcpProcessDefault"),
    "dcp.save": ("dcp", "DcpSave"),
    "torch.save": ("torch_save", "TorchSave"),
    "torch.save+boto3": ("torch_save_boto3", "TorchSaveBoto3"),
    "safetensors": ("safetensors", "Safetensors"),
    "torch_checkpointing": ("torch_checkpointing", "TorchCheckpointing"),
    "s3torchconnector": ("s3torchconnector", "S3TorchConnector"),
    "s3torchconnector-save": ("s3torchconnector", "S3TorchConnectorSave"),
}
NAMES = tuple(_HOMES)


def peer_type(name: str) -> type[Peer]:
    """What a peer says of itself (`stores`, `asynchronous`, `guards_steps`), without one. ImportError as in `open_peer`."""
    module, kind = _HOMES[name]
    try:
        found: type[Peer] = getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)
    except ImportError as error:
        raise ImportError(f"{name} is not installed ({error}): pip install -e '.[bench]'") from error
    return found


def open_peer(name: str, place: Place, **options: Any) -> Peer:
    """A peer that saves to an empty place of its own. `options` are the peer's; ImportError: its package is not installed."""
    return peer_type(name)(place, **options)
