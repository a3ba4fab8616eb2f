"""What is known of the live tensors of a structure between two saves."""

from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from asyncckpt.state.dtypes import complaint
from asyncckpt.state.sight import Integers
from asyncckpt.state.walk import Walk

_FEW = 256


@dataclass(slots=True)
class Binding:
    """What is known of the live tensors of one structure, which are known by their ids.

    No references: they would keep a dropped model in memory. No weak ones either: `torch.utils.swap_tensors` refuses tensors
    that have one. So a tensor may be mistaken for a dead one at its address; whatever matters then is compared at every save
    (kind by the walk, dtype, shape, layout and device by `Makeup`, owners and ties here).
    """

    ids: list[int]
    owned: list[int]  # ids of the optimizers' parameters
    ties: tuple[tuple[int, int], ...]  # (leaf, earlier leaf that is stored for it)
    stored: list[bool]  # per leaf: not tied to an earlier one
    resolved: tuple[int, ...]  # leaves with a conj or neg bit
    flags: list[bool]  # overlappable, per leaf
    overlappable: tuple[bool, ...]  # per stored tensor

    def holds(self, leaves: list[torch.Tensor], owned: list[int], moved: list[slice], addresses: Integers) -> bool:
        """Still true for these leaves, of which all outside of `moved` are where and what they were?

        A few new tensors that nothing is known of (generator states) are taken in.
        """
        if owned != self.owned:
            return False
        if any(_view(leaves[a]) != _view(leaves[b]) for a, b in self.ties if leaves[a] is not leaves[b]):
            return False
        new: list[int] = []
        for where in moved:
            ids = list(map(id, leaves[where]))
            if ids != self.ids[where]:
                new += (
                    where.start + at
                    for at, pair in enumerate(zip(self.ids[where], ids, strict=True))
                    if pair[0] != pair[1]
                )
        if not new:
            return True
        special = {*self.resolved, *chain.from_iterable(self.ties)}
        if len(new) > _FEW or any(self.flags[at] or at in special for at in new):
            return False
        tied = any(addresses[at] and np.count_nonzero(addresses == addresses[at]) > 1 for at in new)
        if tied or any(complaint(leaves[at]) or leaves[at].is_conj() or leaves[at].is_neg() for at in new):
            return False
        for at in new:
            self.ids[at] = id(leaves[at])
        return True


def bind(walk: Walk, owned: list[int]) -> Binding:
    """Look at all tensors of a walk, which were found storable. `owned`: ids of the optimizers' parameters."""
    leaves = walk.leaves
    resolved = tuple(at for at, leaf in enumerate(leaves) if leaf.is_conj() or leaf.is_neg())
    ties = _ties(leaves)
    tied = {leaf for leaf, _ in ties}
    stored = [at not in tied for at in range(len(leaves))]
    owners = walk.owned_memory()
    cuda = any(leaf.is_cuda for leaf in leaves)
    flags = [
        (leaf.is_cuda or (leaf.is_cpu and not cuda))
        and (leaf.data_ptr(), leaf.numel()) in owners
        and not leaf.is_inference()
        for leaf in leaves
    ]
    for at in resolved:
        flags[at] = False
    return Binding(
        ids=list(map(id, leaves)),
        owned=owned,
        ties=ties,
        stored=stored,
        resolved=resolved,
        flags=flags,
        overlappable=tuple(compress(flags, stored)),
    )


def _ties(leaves: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Pairs (leaf, earlier leaf that is the same memory seen the same way)."""
    first: dict[int, int] = {}
    full: dict[Any, int] = {}
    ties = []
    for at, leaf in enumerate(leaves):
        place = leaf.data_ptr() or -id(leaf)
        before = first.setdefault(place, at)
        if before != at:
            full.setdefault(_view(leaves[before]), before)
            same = full.setdefault(_view(leaf), at)
            if same != at:
                ties.append((at, same))
    return tuple(ties)


def _view(leaf: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are tied: the same memory, seen the same way."""
    bits = (leaf.is_conj(), leaf.is_neg())
    return (leaf.device, leaf.data_ptr() or id(leaf), leaf.dtype, leaf.shape, leaf.stride(), bits)
