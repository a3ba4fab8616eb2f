"""The front door to restoring: `restore` into objects, `load` without them.

All or nothing: names, shapes, dtypes and every digest are checked before the first value reaches an object.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from asyncckpt import errors, events
from asyncckpt.checkpoints.marks import mark_damaged, unmark
from asyncckpt.collector import seldom
from asyncckpt.engine.catalog import find_checkpoints, read_index, read_values
from asyncckpt.engine.resolve import first_good
from asyncckpt.format import keys
from asyncckpt.format.index import Index
from asyncckpt.format.record import Record
from asyncckpt.lineage import Root, note, root_of
from asyncckpt.options import Best, S3Options, StepChoice
from asyncckpt.staging import bring, fetch_tensors, shown_progress
from asyncckpt.state import replicas
from asyncckpt.state import tree as trees
from asyncckpt.state.statefile import read_state
from asyncckpt.state.stateful import plan_restore
from asyncckpt.state.walk import VALUE
from asyncckpt.store.base import Store
from asyncckpt.store.opening import open_store
from asyncckpt.telling import warn

_LOG = logging.getLogger("asyncckpt")

SILENT = events.Hooks()


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored. `step`: optimizer steps completed.

    What `strict=False` left alone, as paths: `missing` in the checkpoint, `unexpected` in it, and `reshaped`: there with another shape.
    """

    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    config: Any
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`restored`: None if there was nothing to choose from. `damaged`: steps that did not verify and were passed over, and why.

    `whole`: every tensor that the checkpoint holds was read, and not only the groups that the state names.
    """

    restored: Restored | None
    damaged: Mapping[int, errors.CheckpointError] = field(default_factory=dict)
    whole: bool = False


def restore(
    url: str | os.PathLike[str],
    state: Any,
    *,
    step: StepChoice = "latest",
    strict: bool = True,
    store: S3Options | Store | None = None,
    hooks: Sequence[events.Hook] = (),
) -> Restored:
    """Bring `state` (as it was given to `Saver.save`) back, in place.

    `"latest"` and `Best` pass over a damaged checkpoint, with a warning that names what is wrong, to the next one; a step asked
    for by number raises. Bytes that change from reading to reading are no damage, but a `StoreError`; a checkpoint of a newer asyncckpt is
    none either, but a `FormatVersionError`, also as the latest. `strict=False` leaves alone what the checkpoint lacks. Groups that `state` does not name are ignored
    and not downloaded; None in the place of anything takes what is stored. Moments go to their parameters by name where the optimizer and its
    model stand in both states as objects, else by position, which is logged. Raises `CheckpointNotFoundError`,
    `StateMismatchError` or a `CorruptCheckpointError`; the state is then as it was, unless the message says that an object changed between
    its two readings. Where a `load_state_dict` raises, the `CheckpointError` names the object, what is overwritten and the way out.
    """
    with opened(url, store, hooks) as place:
        all_hooks = events.Hooks(tuple(hooks))
        restored = restore_from(
            place, state, url=os.fspath(url), step=step, strict=strict, hooks=all_hooks, root=root_of(url, store)
        ).restored
        if restored is None:
            raise _nothing_to_choose(place, step, os.fspath(url))
    return restored


def load(
    url: str | os.PathLike[str],
    *,
    step: StepChoice = "latest",
    prefix: str | None = None,
    map_location: str | torch.device = "cpu",
    store: S3Options | Store | None = None,
    hooks: Sequence[events.Hook] = (),
) -> Any:
    """The state as nested containers of tensors and values; no objects are needed, and none are made: each is what its `state_dict()` gave.

    With `prefix`, a path such as `"model"` or `"optimizer/state"`, only that part, and only its bytes are downloaded. The
    tensors of one call share one block of memory, which is freed with the last of them.
    """
    with opened(url, store, hooks) as place, seldom():
        hook = events.Hooks(tuple(hooks))

        def read(record: Record) -> Any:
            index = read_index(place, record)
            loaded = load_from(place, record, index, prefix, map_location=map_location, hooks=hook)
            note(root_of(url, store), record.lineage, restored=record.step)
            return loaded

        found = first_good(place, step, hook, read)
        if found is None:
            raise _nothing_to_choose(place, step, os.fspath(url))
    return found[0]


def _nothing_to_choose(store: Store, step: StepChoice, url: str) -> errors.CheckpointNotFoundError:
    """What there is instead: the way out depends on that."""
    good = sorted(find_checkpoints(store).good)
    if not good:
        return errors.CheckpointNotFoundError(f"no checkpoint for step={step!r} at {url}: there is none at all yet")
    last = ", ".join(map(str, good[-5:]))
    way_out = 'take step="latest", or a step by its number'
    if isinstance(step, Best):
        way_out = f"none of them was saved with metrics={{{step.metric!r}: ...}}; {way_out}"
    return errors.CheckpointNotFoundError(
        f"no checkpoint for step={step!r} at {url}: {len(good)} are there (the last: {last}), but {way_out}"
    )


def restore_from(
    store: Store,
    state: Any,
    *,
    url: str,
    step: StepChoice = "latest",
    strict: bool = True,
    hooks: events.Hooks = SILENT,
    root: Root | None = None,
) -> Outcome:
    """`restore` from an open store; where there is no checkpoint at all nothing is restored. `url`: what the store is called.

    `root`: what this process notes of it, so that a Saver there goes on with the run that was restored.
    """
    if not isinstance(state, Mapping):
        raise errors.StateMismatchError(
            f'the state is a dict, as it was saved: {{"model": model}}, not a {type(state).__name__}'
        )
    replicas.check(state, "restore")

    def read(record: Record) -> Outcome:
        index = read_index(store, record)
        values = read_values_of(store, record)
        trees.check_stored(index.tree, values)
        wanted = plan_restore(
            state,
            index.tree,
            specs_of(index),
            values,
            strict=strict,
            parameters=index.parameters,
            aliases=index.aliases,
        )
        bring(store, index, wanted, step=record.step, strict=strict, hooks=hooks)
        if root is not None:
            note(root, record.lineage, restored=record.step)
        skipped = (wanted.missing, wanted.unexpected, wanted.reshaped)
        whole = len({index.aliases.get(path, path) for path in wanted.paths}) == len(index.tensors)
        return Outcome(Restored(record.step, record.epoch, record.metrics, record.config, *skipped), whole=whole)

    with seldom():
        found = first_good(store, step, hooks, read)
    if found is not None:
        outcome, damaged = found
        return replace(outcome, damaged=damaged)
    if isinstance(step, Best) and find_checkpoints(store).good:  # a misspelt metric must not begin a run anew
        raise _nothing_to_choose(store, step, url)
    _LOG.info("nothing to restore at %s: there is no checkpoint yet", url)
    return Outcome(None)


def set_aside(store: Store, damaged: Mapping[int, errors.CheckpointError], *, restored: int) -> None:
    """Mark the damaged checkpoints that were passed over, so that their steps can be saved again.

    The state is that of `restored` by now, so where nothing can be written that is a warning.
    """
    for step, found in damaged.items():
        try:
            mark_damaged(store, step, found)
        except errors.CheckpointError as error:
            warn(
                f"checkpoint {step} is damaged and could not be set aside ({type(error).__name__}: {error.message}), so a save of step "
                f"{step} will be skipped as if it were good: delete it, or rewind to step {restored} with Run(url).rewind({restored}), once "
                "the store takes writes",
                UserWarning,
                stacklevel=3,
            )


def take_back(store: Store, step: int) -> None:
    """Remove the mark of a checkpoint that was just restored whole, whatever had been wrong with it before."""
    try:
        unmark(store, step)
    except errors.CheckpointError as error:
        warn(
            f"checkpoint {step} is good, and its mark of damage could not be removed ({type(error).__name__}: {error.message})",
            UserWarning,
            stacklevel=3,
        )


def load_from(
    store: Store,
    record: Record,
    index: Index,
    prefix: str | None = None,
    *,
    map_location: str | torch.device = "cpu",
    hooks: events.Hooks = SILENT,
) -> Any:
    """`load` of one checkpoint whose index was read."""
    node = index.tree if prefix is None else _subtree(index.tree, prefix, record.step)
    values = read_values_of(store, record) if _holds_values(node) else {}
    paths = trees.leaves(node, prefix)
    with shown_progress(record.step, hooks) as shown:
        tensors = fetch_tensors(store, index, paths, progress=shown, map_location=map_location)
    return trees.unflatten(node, tensors.__getitem__, values, prefix)


@contextmanager
def opened(
    url: str | os.PathLike[str], store: S3Options | Store | None, hooks: Sequence[events.Hook] = ()
) -> Iterator[Store]:
    """The store at `url`, closed at the end unless it is the caller's own."""
    if isinstance(store, Store):
        with nullcontext(store) as place:
            yield place
        return
    with closing(open_store(os.fspath(url), store, on_retry=events.Hooks(tuple(hooks)))) as place:
        yield place


def specs_of(index: Index) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor by its full path, aliases too."""
    specs = {path: (tensor.dtype, tensor.shape) for path, tensor in index.tensors.items()}
    return specs | {alias: specs[path] for alias, path in index.aliases.items()}


def read_values_of(store: Store, record: Record) -> dict[str, Any]:
    """Everything that is no tensor: path to value."""
    values: dict[str, Any] = {}
    for ref, data in zip(record.states, read_values(store, record), strict=True):
        try:
            found = read_state(data)
            if twice := next(iter(values.keys() & found.keys()), None):
                raise errors.CorruptCheckpointError(f"the value {twice!r} stands in two state files")
            values |= found
        except errors.CheckpointError as error:
            error.at(step=record.step, key=ref.key, attempt=record.attempt)
            raise
    return values


def _subtree(node: Any, prefix: str, step: int) -> Any:
    for part in prefix.split("/"):
        inner = next(iter(node.values())) if isinstance(node, dict) else None
        if isinstance(inner, list):
            inner = {keys.escape(number): item for number, item in enumerate(inner)}
        if not isinstance(inner, dict) or part not in inner:
            there = ", ".join(list(inner)[:20]) if isinstance(inner, dict) else "nothing"
            raise errors.StateMismatchError(
                f"the checkpoint has no {prefix!r}; beside {part!r} it has: {there}", step=step
            )
        node = inner[part]
    return node


def _holds_values(node: Any) -> bool:
    if not isinstance(node, dict):
        return bool(node == VALUE)
    kind, inner = trees.one_item(node, "")
    if kind == "scalar":
        return True
    return any(map(_holds_values, inner if isinstance(inner, list) else inner.values()))
