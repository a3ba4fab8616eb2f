"""Which checkpoints stay. A checkpoint stays if any rule keeps it, if it is pinned, or if it is the newest."""

from collections.abc import Iterable, Sequence

from asyncckpt import errors
from asyncckpt.engine.catalog import find_checkpoints
from asyncckpt.engine.commit import remove_folders
from asyncckpt.format import keys, limits
from asyncckpt.format.record import Record
from asyncckpt.options import KeepLast, KeepRule
from asyncckpt.store.base import Store


def doomed(steps: Iterable[int], rules: Sequence[KeepRule]) -> list[int]:
    """The steps that no rule keeps, oldest first. No rules keep everything."""
    ordered = sorted(steps)
    if not rules or not ordered:
        return []
    kept = {ordered[-1]}
    for rule in rules:
        if isinstance(rule, KeepLast):
            kept.update(ordered[-rule.count :])
        else:
            kept.update(step for step in ordered if step % rule.steps == 0)
    return [step for step in ordered if step not in kept]


def retain(store: Store, rules: Sequence[KeepRule], *, known_pinned: set[int], committed: int) -> list[int]:
    """Remove what no rule keeps; the steps removed. `known_pinned` remembers pinned steps between calls.

    A checkpoint set aside as damaged takes nobody's place among the newest. `committed`, the step whose commit this
    follows, stays: below newer ones, too, where a run went on from an older step.
    """
    found = find_checkpoints(store)
    outdated = {
        *doomed(found.good, rules),
        *set(doomed((*found.good, *found.marked), rules)).intersection(found.marked),
    }
    candidates = sorted(outdated - known_pinned - {committed})
    removed = []
    for step in candidates:
        record = _read(store, step)
        if record is None:
            continue
        if record.pinned:
            known_pinned.add(step)
            continue
        remove_checkpoint(store, record)
        removed.append(step)
    return removed


def remove_checkpoint(store: Store, record: Record) -> None:
    """Delete one checkpoint, the record first: half a deletion leaves objects without a record, never the reverse."""
    own = [folder for folder in record.folders if keys.parse_folder(folder) == record.step]
    store.delete([keys.record_key(record.step)])
    store.delete([keys.damaged_key(record.step)])
    remove_folders(store, own)


def _read(store: Store, step: int) -> Record | None:
    key = keys.record_key(step)
    try:
        return Record.parse(store.get(key, max_bytes=limits.RECORD_BYTES), key)
    except (errors.ObjectNotFoundError, errors.CorruptCheckpointError, errors.FormatVersionError):
        return None
