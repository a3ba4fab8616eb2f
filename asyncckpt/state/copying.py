"""Exact copies between tensors."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

Getter = Callable[[str], torch.Tensor]
"""Gives a restored tensor by its full path. It belongs to the restore: copy from it, never keep it."""


def private(get: Getter) -> Getter:
    """The same tensors as copies that an object may keep."""
    return lambda path: get(path).detach().clone()


def overlaps(tensor: torch.Tensor) -> bool:
    """Do elements share memory (an expanded tensor)? `copy_` refuses those."""
    return not torch.nn.parameter.is_lazy(tensor) and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def copy_exact(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bit for bit, in place, whatever autograd thinks of `target`; nothing to do if it is `source` itself."""
    if target is source:
        return
    with torch.inference_mode() if target.is_inference() else nullcontext(), torch.no_grad():
        if not overlaps(target):
            target.copy_(source)
            return
        for dimension, step in enumerate(target.stride()):
            if step == 0 and target.shape[dimension] > 1:
                target, source = target.narrow(dimension, 0, 1), _single(source, dimension)
        target.copy_(source)


def _single(source: torch.Tensor, dimension: int) -> torch.Tensor:
    """The one slice that fills an expanded dimension."""
    if not _is_one(source, dimension):
        raise ValueError("an expanded tensor has one value along a dimension where the checkpoint has several")
    return source.narrow(dimension, 0, 1)


def _is_one(source: torch.Tensor, dimension: int) -> bool:
    return bits_equal(source.narrow(dimension, 0, 1).expand_as(source), source)


def takes(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Can `copy_exact` keep every value? Not if an expanded target has one where `source` has several."""
    return not overlaps(target) or all(
        _is_one(source, dimension)
        for dimension, step in enumerate(target.stride())
        if step == 0 and target.shape[dimension] > 1
    )


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Same bytes: NaN equals the same NaN, and 0.0 differs from -0.0."""
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    left, right = left.cpu().contiguous(), right.cpu().contiguous()
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
