"""What a plain optimizer's `state_dict()` holds, read without building it.

torch packs the state anew in every call, and then each of its inner dicts must be walked: 12 ms for 20,000 tensors. Read
in bulk, and compared with what was seen last time, the same takes 3.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

_DICT = frozenset({dict})
_STATE_DICT = Optimizer.state_dict  # torch's own: a patched one must be called
TENSOR_KINDS = frozenset({torch.Tensor, torch.nn.Parameter})


class Segment(tuple[Any, ...]):
    """Tokens of a part of a state, kept from one walk to the next: the same object is the same structure."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look leaves for the next: no tensor, only ids.

    `tokens` of the dict `state`. `owned`: the parameters of each group, `numbers` theirs in the state dict. `holders`: the
    parameters that have state, `names` and `sizes` of all its inner dicts.
    """

    tokens: Segment
    owned: list[list[int]]
    numbers: list[list[int]]
    holders: list[int]
    names: list[Any]
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class Packed:
    """`leaves`: the tensors of `state`, in its order. `groups`: as `state_dict()` has them, but for `params`."""

    seen: Seen
    leaves: list[torch.Tensor]
    groups: list[dict[str, Any]]


def pack(optimizer: Optimizer, before: Seen | None) -> Packed | None:
    """Look; None if `state_dict()` is customised, or the state of a parameter is no dict of tensors: then it must be called."""
    if not _is_plain(optimizer):
        return None
    inner = list(optimizer.state.values())
    if not _DICT.issuperset(map(type, inner)):
        return None
    leaves: list[torch.Tensor] = list(chain.from_iterable(map(dict.values, inner)))
    if not TENSOR_KINDS.issuperset(map(type, leaves)):
        return None
    names, sizes, holders = list(chain.from_iterable(inner)), list(map(len, inner)), list(map(id, optimizer.state))
    owned = [list(map(id, group["params"])) for group in optimizer.param_groups]
    seen = before
    if before is None or (before.holders, before.names, before.sizes, before.owned) != (holders, names, sizes, owned):
        first: dict[int, int] = {}
        for number, parameter in enumerate(chain.from_iterable(owned)):
            first.setdefault(parameter, number)
        if len(first) != sum(map(len, owned)) or not first.keys() >= set(holders):
            return None  # a parameter twice, or state of something else
        numbers = [[first[parameter] for parameter in group] for group in owned]
        seen = Seen(_tokens([first[holder] for holder in holders], inner), owned, numbers, holders, names, sizes)
    assert seen is not None
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return Packed(seen, leaves, groups)


def _tokens(numbers: list[int], inner: list[dict[Any, Any]]) -> Segment:
    tokens: list[Any] = [dict, len(numbers), *numbers]
    for one in inner:
        tokens += (dict, len(one), *one)
        tokens += [torch.Tensor] * len(one)
    return Segment(tokens)


def _is_plain(optimizer: Optimizer) -> bool:
    return (
        type(optimizer).state_dict is _STATE_DICT
        and "state_dict" not in optimizer.__dict__
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
    )
