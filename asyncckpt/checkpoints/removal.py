"""The one place that deletes: what failed attempts or dead writers left, what no rule keeps, what a rewind takes away.

A checkpoint goes in this order: its record, and only that very one; then a look that the record is gone; then the mark and the folders. A
removal that is cut short leaves objects without a record, never the reverse. Records are never deleted by their name alone.
"""

from collections.abc import Collection, Iterable

from asyncckpt import errors
from asyncckpt.checkpoints.marks import MARK_BYTES
from asyncckpt.checkpoints.standing import Standing, held, judge, survey
from asyncckpt.format import keys
from asyncckpt.store.base import Store

_ROUNDS = 5  # that a record may change under a rewind's hands


def abandon(store: Store, step: int, attempt: str) -> None:
    """Remove what a failed attempt stored, unless its record stands after all, or one that nobody can read.

    Only for an attempt whose record can not appear any more: a put without an answer may still arrive, and needs the folder.
    """
    standing = judge(store, step)
    if standing is None or not (standing.damaged or standing.attempt == attempt):
        remove_folders(store, [keys.folder(step, attempt)])


def end_uploads(store: Store, folders: Iterable[str]) -> None:
    """Abort every upload that is open below the folders: of attempts that have ended, whose worker died in the middle of one."""
    for folder in folders:
        for upload in store.open_uploads(folder):
            store.abort_upload(upload)


def remove_leftover(store: Store, folder: str, before_s: float) -> bool:
    """Delete a folder that no record named a moment ago, unless its own step's record does now, or something in it is not older."""
    step = keys.parse_folder(folder)
    standing = judge(store, step) if step is not None else None
    if standing is not None and (standing.damaged or standing.keeps_below or folder in standing.folders):
        return False
    found = list(store.list(folder))
    if not all(entry.modified_s < before_s and keys.is_object_key(entry.key) for entry in found):
        return False
    store.delete([entry.key for entry in found])
    return True


def remove_folders(store: Store, folders: Iterable[str]) -> None:
    """Delete every object below the folders."""
    for folder in folders:
        store.delete([entry.key for entry in store.list(folder)])


def remove_checkpoint(store: Store, standing: Standing, *, kept: Collection[str] = ()) -> bool:
    """Delete one checkpoint as it was judged; False if another record stands there by now, which stays.

    Folders in `kept`, which other records name, stay. If the record may still be there the error is raised and its folders stay.
    """
    step, failure = standing.step, None
    try:
        store.remove(keys.record_key(step), held(store, standing))
    except errors.ObjectChangedError:
        return False
    except errors.ObjectNotFoundError:
        pass
    except errors.StoreError as error:
        failure = error
    now = judge(store, step)
    if now is not None and (now.version == standing.version or now.attempt == standing.attempt):
        if failure is not None:
            raise failure
        return False
    _remove_mark(store, step, standing.attempt if now is not None else None)
    spared = {*kept, *(now.folders if now is not None else ())}
    remove_folders(store, sorted(set(standing.folders) - spared))
    return True


def _remove_mark(store: Store, step: int, attempt: str | None) -> None:
    """Delete the step's damage mark; with `attempt` only one that names it."""
    key = keys.damaged_key(step)
    try:
        mark = store.get_version(key, max_bytes=MARK_BYTES)
        if attempt is None or mark.data.partition(b"\n")[0] == attempt.encode():
            store.remove(key, mark)
    except (errors.ObjectNotFoundError, errors.ObjectChangedError, errors.ResourceLimitError):
        return


def rewind(store: Store, step: int) -> list[int]:
    """Delete every checkpoint above `step`, newer formats too, newest first; the steps that were removed.

    Folders without a record go with them, or a late record of the branch that is given up could stand again. What a record at or below
    `step` names stays. `CheckpointConflictError` if another process keeps writing there.
    """
    listed = survey(store)
    older = [judge(store, number) for number in sorted(listed.records) if number <= step]
    kept = {folder for standing in older if standing is not None for folder in standing.folders}
    removed = []
    for number in sorted((number for number in listed.records if number > step), reverse=True):
        _take_away(store, number, kept, above=step)
        removed.append(number)
    for number in sorted({*listed.folders, *listed.marks}, reverse=True):
        if number > step and judge(store, number) is None:
            _remove_mark(store, number, None)
            below = keys.record_key(number).removesuffix(".json") + "/"
            folders = {entry.key for entry in store.list(below, delimiter=True) if entry.is_prefix}
            remove_folders(store, sorted(folders - kept))
    return removed


def _take_away(store: Store, number: int, kept: Collection[str], *, above: int) -> None:
    for _ in range(_ROUNDS):
        standing = judge(store, number)
        if standing is None:
            return
        shared = {folder for folder in standing.folders if (keys.parse_folder(folder) or 0) <= above}
        if remove_checkpoint(store, standing, kept={*kept, *shared}):
            return
    raise errors.CheckpointConflictError(
        "another process writes this step while it is taken away; end it, and rewind again", step=number
    )
