"""Why a stored state could not be loaded into an object, or would break it: asked before the first value changes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from asyncckpt.format import keys
from asyncckpt.state.capture import is_stateful_loader, loader_way_out
from asyncckpt.state.rng import RNG
from asyncckpt.state.tree import entries_of, leaves
from asyncckpt.state.walk import VALUE

_INNER = "_schedulers"
"""Of a scheduler that runs others: they (torch 2.13)."""
_RNG_KEYS = frozenset({"python", "numpy", "torch", "cuda"})
_SCALER_KEYS = frozenset({"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"})


def complaints(thing: Any, node: Any, path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Reasons, for the objects whose `load_state_dict` is known: it would raise, or take in silence what the next step stumbles over."""
    known = isinstance(thing, RNG | LRScheduler | torch.amp.GradScaler | torch.optim.Optimizer)
    entries = entries_of(node, path)
    if way_out := loader_way_out(thing):
        yield f"a {type(thing).__name__} keeps no place to restore; {way_out}"
    if is_stateful_loader(thing):
        yield from _other_workers(thing, entries or {}, path, values)
    kind = type(thing).__name__
    if not known or (isinstance(thing, torch.optim.Optimizer) and type(thing).state_dict is not _STATE_DICT):
        return
    if entries is None or isinstance(thing, torch.optim.Optimizer):
        yield f"the state of a {kind} in the state, something else in the checkpoint"
    elif isinstance(thing, RNG):
        yield from _lacking(kind, _RNG_KEYS, set(entries))
        cuda = entries.get("cuda")
        yield from thing.complaints(len(cuda.get("list", ())) if isinstance(cuda, dict) else 0)
    elif isinstance(thing, LRScheduler):
        yield from _other_scheduler(thing, entries, path)
    elif thing.is_enabled():
        if not entries:
            yield "the checkpoint was saved with a GradScaler that was disabled; disable this one, or leave it out of the state"
        else:
            yield from _lacking(kind, _SCALER_KEYS, set(entries))


_STATE_DICT = torch.optim.Optimizer.state_dict


def _lacking(kind: str, needed: frozenset[str], found: set[str]) -> Iterator[str]:
    if needed - found:
        yield f"without {', '.join(sorted(needed - found))}, which {kind} needs"


def _other_scheduler(scheduler: LRScheduler, entries: Mapping[str, Any], path: str) -> Iterator[str]:
    """Attributes that only one side has come and go with torch's versions; when both sides have some, the kinds differ.

    Nor is a scheduler of others (SequentialLR, ChainedScheduler) one without, or one of another number.
    """
    own, inner = scheduler.state_dict(), getattr(scheduler, _INNER, None)
    if (_INNER in own) != (_INNER in entries):
        yield f"a scheduler {'with' if _INNER in entries else 'without'} others inside was saved; the state's is a {type(scheduler).__name__}"
        return
    if _INNER in entries and isinstance(inner, list | tuple):
        nodes = entries[_INNER].get("list", ()) if isinstance(entries[_INNER], dict) else ()
        if len(nodes) != len(inner):
            yield f"{len(nodes)} schedulers inside another were saved; the state's has {len(inner)}"
            return
        for one, node in zip(inner, nodes, strict=True):
            yield from _other_scheduler(one, entries_of(node, path) or {}, path)
    ours = {keys.escape(key) for key in own if isinstance(key, str) and not key.startswith("_")}
    saved = {key for key in entries if not key.startswith("_")}
    if ours - saved and saved - ours:
        yield (
            f"another kind of scheduler was saved, with {', '.join(sorted(saved - ours))}; "
            f"the state's has {', '.join(sorted(ours - saved))}"
        )


def _other_workers(loader: Any, entries: Mapping[str, Any], path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """It would take another number in silence, and raise an AssertionError without a word at the next epoch (torchdata 0.11)."""
    saved = values.get(f"{path}/_snapshot/_main_snapshot/_num_workers") if "_snapshot" in entries else 0
    own = getattr(loader, "num_workers", None)
    if entries and isinstance(saved, int) and isinstance(own, int) and saved != own:
        yield (
            f"the loader was saved with num_workers={saved} and has {own}; make it with {saved}, or leave it out of the state "
            "to begin the epoch anew"
        )


def group_complaint(scheduler: LRScheduler, node: Any, path: str, values: Mapping[str, Any]) -> str | None:
    """Why a scheduler cannot be loaded beside an optimizer whose groups were saved otherwise. One rate for all does no harm."""
    entries = entries_of(node, path) or {}
    rates = values.get(f"{path}/base_lrs") if entries.get("base_lrs") == VALUE and not leaves(node, path) else None
    own = getattr(scheduler, "base_lrs", None)
    if isinstance(rates, list) and isinstance(own, list) and len(rates) == len(own) and len(set(rates)) == 1:
        return None
    return (
        "a scheduler knows the optimizer's parameter groups by their order, and they were saved in another; "
        "make the groups as they were, or leave the scheduler out of the state"
    )
