"""With several ranks, rank 0's state is stored for all: what may be stored so, and what would be wrong on every other rank."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset, Sampler

from asyncckpt.errors import UnsupportedObjectError
from asyncckpt.format import keys
from asyncckpt.state.capture import Replicated, is_stateful, unwrap
from asyncckpt.state.ranks import rank, world_size
from asyncckpt.state.rng import RNG
from asyncckpt.state.walk import MAX_DEPTH, SCALARS
from asyncckpt.telling import warn

_SAME_EVERYWHERE = (nn.Module, torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler)
_OWN = (RNG, DataLoader, Sampler, IterableDataset)
_PLAIN = SCALARS | {torch.Tensor, nn.Parameter}
_warned: set[tuple[str, ...]] = set()


def check(state: Mapping[Any, Any], call: Literal["save", "restore"]) -> None:
    """Refuse, on every rank that calls, what each rank has of its own. Calls no code of the objects, and no collective.

    Raises:
        UnsupportedObjectError: A generator, a loader, a sampler or a dataset that is a stream, and more than one rank.
    """
    ranks = world_size()
    if ranks == 1:
        return
    found = list(objects(state))
    own = [(path, thing) for path, thing in found if _is_own(thing)]
    if own:
        shown = ", ".join(f"{path!r} (a {type(thing).__name__})" for path, thing in own[:20])
        raise UnsupportedObjectError(
            f"every one of the {ranks} ranks has its own {shown}, and rank 0's would be given to all of them. Leave it out of the "
            "state, or say asyncckpt.Replicated(x) if it is the same on every rank. Each rank that calls "
            f"{call}() gets this error; where only rank 0 calls it, end the others too: they would wait for it in their next collective",
            key=own[0][0],
        )
    unknown = tuple(path for path, thing in found if is_stateful(thing) and not isinstance(thing, _SAME_EVERYWHERE))
    if unknown and rank() == 0 and unknown not in _warned:
        _warned.add(unknown)
        warn(
            f"rank 0's {', '.join(map(repr, unknown[:20]))} is stored for all {ranks} ranks; say asyncckpt.Replicated(x) if it is the same on "
            "every rank, and leave it out of the state if it is not",
            UserWarning,
            stacklevel=3,
        )


def generators(state: Mapping[Any, Any]) -> list[RNG]:
    """Those of a state, anywhere."""
    return [thing for _, thing in objects(state, inside=True) if isinstance(thing, RNG)]


def objects(value: Any, path: str = "", *, inside: bool = False) -> Iterator[tuple[str, Any]]:
    """Whatever is no container, tensor or scalar, out of its wrappers, with its path. `inside`: of `Replicated`, too."""
    if path.count("/") > MAX_DEPTH:  # a container that holds itself: the walk refuses it
        return
    if type(value) is Replicated:
        if inside:
            yield from objects(value.value, path, inside=inside)
        return
    if isinstance(value, Mapping):
        items = [(str(key) if type(key) not in (str, int) else keys.escape(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple | set):
        items = [(keys.escape(at), child) for at, child in enumerate(value)]
    else:
        yield path, unwrap(value)
        return
    for name, child in items:
        if type(child) not in _PLAIN:
            yield from objects(child, f"{path}/{name}" if path else name, inside=inside)


def _is_own(thing: Any) -> bool:
    return isinstance(thing, _OWN) or any(
        base.__name__ == "IterableDataset"
        or base.__module__.partition(".")[0] == "torchdata"
        or (base.__module__.startswith("accelerate.") and "DataLoader" in base.__name__)
        for base in type(thing).__mro__
    )
