"""Which process of a distributed run this is. Without torch.distributed: the only one."""

import torch


def rank() -> int:
    """This process among all."""
    return torch.distributed.get_rank() if _distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
