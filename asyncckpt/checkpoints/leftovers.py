"""What writers that died left in a store: no record names it, nobody touched it for a day.

All times are the store's own. A folder of a save in flight is younger, and so is one whose record may still arrive: S3 refuses requests that
were signed a quarter of an hour ago. What a record names stays; where a record cannot tell what it needs, everything at and below its step does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from asyncckpt import errors
from asyncckpt.checkpoints.removal import remove_leftover
from asyncckpt.checkpoints.standing import judge, survey
from asyncckpt.format import keys
from asyncckpt.store.base import Entry, OpenUpload, Store

IDLE_S = 24 * 3600.0
"""How long a folder is left alone: whoever wrote there last may still be about to name it."""
_READERS = 8  # of records: one is 30 ms on S3


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What writers left that died. `folders`: of their attempts; `stored_bytes`: of the objects in these; `uploads`: keys of uploads that nobody ended.

    A local upload has no key, and its temporary file is named. `undecided`: steps whose record cannot tell what it needs, so that folders at and
    below them were left alone.
    """

    folders: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    stored_bytes: int = 0
    undecided: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed, and why the rest was not, in the order of the tries."""

    leftovers: Leftovers
    failures: tuple[errors.CheckpointError, ...] = ()


@dataclass(slots=True)
class _Folder:
    key: str
    step: int
    stored_bytes: int = 0
    newest_s: float = -math.inf

    def add(self, entry: Entry) -> None:
        self.stored_bytes += entry.stored_bytes
        is_ours = keys.is_object_key(entry.key)  # somebody may keep notes beside a checkpoint
        self.newest_s = max(self.newest_s, entry.modified_s if is_ours else math.inf)


def collect(
    store: Store,
    *,
    older_than_s: float = IDLE_S,
    dry_run: bool = False,
    ended: Sequence[str] = (),
    go_on: Callable[[], bool] = lambda: True,
) -> Collected:
    """Remove what no checkpoint needs and nobody touched for so long. With `dry_run` it is only found.

    One LIST of all, a page at a time, and of open uploads; records are read only where something seems left over. One that cannot be removed does
    not keep the others, but a store that does not answer ends it. `ended`: folders of attempts that nobody continues; their open uploads go
    whatever their age. `go_on` is asked for every object; False ends it at once.
    """
    before_s = store.clock_s() - older_than_s
    failures: list[errors.CheckpointError] = []
    uploads = _idle_uploads(store, before_s, ended, failures)
    old = _old_folders(store, before_s, go_on)
    folders, undecided = _unnamed(store, old, go_on) if old else ([], ())
    if not dry_run:
        folders = _try_each(folders, lambda one: remove_leftover(store, one.key, before_s), go_on, failures)
        uploads = _try_each(uploads, lambda one: _abort(store, one), go_on, failures)
    found = Leftovers(
        folders=tuple(one.key for one in folders),
        uploads=tuple(one.key or one.token for one in uploads),
        stored_bytes=sum(one.stored_bytes for one in folders),
        undecided=undecided,
    )
    return Collected(found, tuple(failures))


def _idle_uploads(
    store: Store, before_s: float, ended: Sequence[str], failures: list[errors.CheckpointError]
) -> list[OpenUpload]:
    """Where they may not be listed, folders are collected all the same."""
    found: dict[OpenUpload, None] = {}
    try:
        for folder in ended:
            found |= dict.fromkeys(store.open_uploads(folder))
        idle = store.open_uploads(idle_since_s=before_s)
        found |= dict.fromkeys(one for one in idle if not one.key or keys.attempt_folder(one.key))
    except errors.StoreError as error:
        failures.append(error)
    return list(found)


def _old_folders(store: Store, before_s: float, go_on: Callable[[], bool]) -> list[_Folder]:
    """Folders of attempts in which all is old, but for one that stands alone beside its step's record: it is the one that this names."""
    old: list[_Folder] = []
    for step, lines in groupby(_lines(store, go_on), lambda line: line[0]):
        found: dict[str, _Folder] = {}
        recorded = False
        for _, folder, entry in lines:
            if folder is None:
                recorded = True
            else:
                found.setdefault(folder, _Folder(folder, step)).add(entry)
        if not (recorded and len(found) == 1):
            old += [one for one in found.values() if one.newest_s < before_s]
    return old


def _lines(store: Store, go_on: Callable[[], bool]) -> Iterator[tuple[int, str | None, Entry]]:
    """The step of every record and of every object in an attempt's folder, with that folder. A step's lines follow each other."""
    for entry in store.list("step-"):
        if not go_on():
            return
        folder = keys.attempt_folder(entry.key)
        step = keys.parse_record_key(entry.key) if folder is None else keys.parse_folder(folder)
        if step is not None:
            yield step, folder, entry


def _unnamed(store: Store, old: list[_Folder], go_on: Callable[[], bool]) -> tuple[list[_Folder], tuple[int, ...]]:
    """Those that no record needs, and the steps whose record cannot tell. Every record may name any folder, so all are read."""
    named: set[str] = set()
    undecided: list[int] = []

    def read(step: int) -> None:
        if not go_on():
            return
        try:
            standing = judge(store, step)
        except errors.DeadlineExceededError:
            raise
        except errors.CheckpointError:
            undecided.append(step)
            return
        if standing is not None:
            named.update(standing.folders)
            if standing.damaged or standing.keeps_below:
                undecided.append(step)

    _read_all(sorted(survey(store).records), read)
    if not go_on():
        return [], ()
    floor = max(undecided, default=-1)
    unnamed = [one for one in old if one.key not in named]
    found = [one for one in unnamed if one.step > floor]
    return found, tuple(sorted(undecided)) if len(found) < len(unnamed) else ()


def _read_all(steps: Sequence[int], read: Callable[[int], None]) -> None:
    pool = ThreadPoolExecutor(_READERS, "asyncckpt-leftovers")
    try:
        for _ in pool.map(read, steps):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _abort(store: Store, upload: OpenUpload) -> bool:
    store.abort_upload(upload)
    return True


def _try_each(
    items: Sequence[Item],
    remove: Callable[[Item], bool],
    go_on: Callable[[], bool],
    failures: list[errors.CheckpointError],
) -> list[Item]:
    """Those that were removed."""
    removed = []
    for item in items:
        if not go_on() or any(isinstance(error, errors.DeadlineExceededError) for error in failures):
            break
        try:
            if remove(item):
                removed.append(item)
        except errors.CheckpointError as error:
            failures.append(error)
    return removed
