"""Which process of a distributed run this is. Without torch.distributed: the only one that writes."""

import os

import torch


def rank() -> int:
    """This process among all."""
    return torch.distributed.get_rank() if _distributed() else 0


def world_size() -> int:
    """How many processes train together; before torch.distributed is initialised what the launcher says (`WORLD_SIZE`)."""
    if _distributed():
        return torch.distributed.get_world_size()
    said = os.environ.get("WORLD_SIZE", "")
    return max(1, int(said)) if said.isdecimal() else 1


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
