"""What is known of the live tensors of a structure between two saves."""

from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from asyncckpt.state.dtypes import PLAIN_KINDS, complaint
from asyncckpt.state.sight import Integers
from asyncckpt.state.walk import Walk

_FEW = 256
Positions = tuple[tuple[int | None, ...], ...]
"""For each optimizer and each of its parameters, over all groups: the leaf that is this parameter."""


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
    positions: Positions

    def holds(self, leaves: list[torch.Tensor], owned: list[int], moved: list[slice], addresses: Integers) -> bool:
        """Still true for these leaves, of which all outside of `moved` are where and what they were?

        A few new tensors that nothing is known of (generator states) are taken in.
        """
        if owned != self.owned:
            return False
        if any(view_of(leaves[a]) != view_of(leaves[b]) for a, b in self.ties if leaves[a] is not leaves[b]):
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


def bind(walk: Walk, owned: list[int], addresses: Integers) -> Binding:
    """Look at all tensors of a walk, which were found storable. `owned`: ids of the optimizers' parameters; `addresses` of the leaves."""
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
        positions=_positions(walk, addresses),
    )


def _positions(walk: Walk, addresses: Integers) -> Positions:
    """By identity; `model.state_dict()` gives other objects of the same memory."""
    if not walk.optimizers:
        return ()
    leaves = walk.leaves
    known = dict(zip(map(id, reversed(leaves)), range(len(leaves) - 1, -1, -1), strict=True))  # the first of each
    strangers = {p.data_ptr() for p in walk.parameters() if id(p) not in known and has_address(p)}
    views: dict[Any, int] = {}
    if strangers:
        for at, address in enumerate(addresses.tolist()):
            if address in strangers:
                views.setdefault(view_of(leaves[at]), at)

    def leaf(parameter: torch.Tensor) -> int | None:
        at = known.get(id(parameter))
        return views.get(view_of(parameter)) if at is None and views and has_address(parameter) else at

    return tuple(
        tuple(leaf(parameter) for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in walk.optimizers
    )


def has_address(parameter: torch.Tensor) -> bool:
    """Has it memory that `view_of` tells from others'?"""
    return type(parameter) in PLAIN_KINDS and parameter.layout is torch.strided and parameter.data_ptr() != 0


def _ties(leaves: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Pairs (leaf, earlier leaf that is the same memory seen the same way)."""
    first: dict[int, int] = {}
    full: dict[Any, int] = {}
    ties = []
    for at, leaf in enumerate(leaves):
        place = leaf.data_ptr() or -id(leaf)
        before = first.setdefault(place, at)
        if before != at:
            full.setdefault(view_of(leaves[before]), before)
            same = full.setdefault(view_of(leaf), at)
            if same != at:
                ties.append((at, same))
    return tuple(ties)


def view_of(leaf: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are tied: the same memory, seen the same way."""
    bits = (leaf.is_conj(), leaf.is_neg())
    return (leaf.device, leaf.data_ptr() or id(leaf), leaf.dtype, leaf.shape, leaf.stride(), bits)
