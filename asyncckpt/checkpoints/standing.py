"""What stands at a step's record key, and what may be done to it.

The record's own digest decides. Where it fails, or the text breaks a rule of the format, the record is damaged: writers may replace it.
Where it agrees and something is unknown here, the record is newer: nobody but a user replaces or removes it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.checkpoints.marks import read_mark
from asyncckpt.checkpoints.rereading import Wrong, certain, wrong_size
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import Hasher, digest
from asyncckpt.format.record import ENDING_BYTES, Outline, Record, digest_in, is_sealed, newer
from asyncckpt.format.strict_json import FORMAT
from asyncckpt.store.base import Entry, Store, Version

STUMP_S = 5.0
"""An index must be missing at two readings so far apart before its record may be replaced: one wrong 404 must never cost a checkpoint."""
_PIECE_BYTES = 2**20  # of a record that is too large to be held
_HELD_BYTES = 8 * limits.RECORD_BYTES  # of a record that is too large to be one, so that it can be replaced
_FOLDER = re.compile(rb"step-[0-9]{10,18}/[a-z0-9][a-z0-9._-]{0,127}/")


@dataclass(frozen=True, slots=True)
class Standing:
    """A record as it was read.

    `version`: to replace or remove exactly these bytes; None where they are too many to hold (see `held`). `record`: None if it is damaged
    or newer, and `error` says why. `attempt`: empty where nobody can tell. `folders`: everything that must stay for it; of a damaged one
    whatever its text names. `keeps_below`: it is newer and may need whatever stands at lower steps.
    """

    step: int
    version: Version | None
    attempt: str = ""
    folders: tuple[str, ...] = ()
    pinned: bool = False
    record: Record | None = None
    error: errors.CheckpointError | None = None
    keeps_below: bool = False

    @property
    def newer(self) -> bool:
        """Whether it was written by a newer asyncckpt: sound, and beyond this one."""
        return isinstance(self.error, errors.FormatVersionError)

    @property
    def damaged(self) -> bool:
        """Whether it cannot be what was written."""
        return self.error is not None and not self.newer


@dataclass(frozen=True, slots=True)
class Listing:
    """One delimited LIST: records by step, steps with a damage mark, steps with folders."""

    records: dict[int, Entry]
    marks: frozenset[int]
    folders: frozenset[int]


def survey(store: Store) -> Listing:
    """What the root holds, by its names alone."""
    records: dict[int, Entry] = {}
    marks, folders = set(), set()
    for entry in store.list(delimiter=True):
        if (step := keys.parse_record_key(entry.key)) is not None:
            records[step] = entry
        elif (step := keys.parse_damaged_key(entry.key)) is not None:
            marks.add(step)
        elif (step := keys.parse_folder(entry.key)) is not None:
            folders.add(step)
    return Listing(records, frozenset(marks), frozenset(folders))


def judge(store: Store, step: int) -> Standing | None:
    """What stands at the step; None if there is no record.

    It is damaged only where enough readings, on connections of their own, say the same (see `rereading`). Where they differ, `StoreError`.
    """
    key = keys.record_key(step)
    damaged: Standing | None = None

    def look(place: Store) -> Standing | Wrong | None:
        nonlocal damaged
        try:
            found = _read(place, step, key)
        except errors.CorruptCheckpointError as error:  # it became shorter under our hands: nothing is certain
            return wrong_size(error, lambda _: True)
        if found is None or not found.damaged:
            return found
        damaged = found
        assert found.error is not None
        evidence = digest(found.version.data) if found.version is not None else found.error.message
        return Wrong(found.error, evidence)

    try:
        return certain(store, key, look)
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError):
        return damaged


def _read(store: Store, step: int, key: str) -> Standing | None:
    try:
        try:
            return _judged(step, key, store.get_version(key, max_bytes=limits.RECORD_BYTES))
        except errors.ResourceLimitError:
            return _judge_large(store, step, key)
    except errors.ObjectNotFoundError:
        return None


def _judged(step: int, key: str, version: Version) -> Standing:
    try:
        record = Record.parse(version.data, key)
    except errors.FormatVersionError as error:
        with contextlib.suppress(errors.CheckpointError):
            outline = Outline.parse(version.data, key)
            other = outline.format != FORMAT
            return Standing(
                step,
                version,
                outline.attempt,
                outline.folders,
                outline.pinned,
                error=error.at(step=step),
                keeps_below=other,
            )
        return Standing(step, version, error=error.at(step=step), keeps_below=True)
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
        named = tuple(sorted({name.decode() for name in _FOLDER.findall(version.data)}))
        return Standing(step, version, folders=named, error=error.at(step=step))
    return Standing(step, version, record.attempt, record.folders, record.pinned, record)


def _judge_large(store: Store, step: int, key: str) -> Standing | None:
    """Of a record above the limit only the digest is read, in pieces: memory stays bounded whatever stands there."""
    found = store.head(key)
    if found is None:
        return None
    text = f"a record of {found.stored_bytes} bytes is above {limits.RECORD_BYTES}"
    if read_seal(store, key, found.stored_bytes).holds:
        return Standing(step, None, error=newer(text).at(step=step, key=key), keeps_below=True)
    return Standing(
        step, None, error=errors.RecordError(f"{text}, and does not end with its digest", step=step, key=key)
    )


@dataclass(frozen=True, slots=True)
class Seal:
    """The ending of a record, and the BLAKE3 of all bytes before it; empty where the ending is none that a record has."""

    ending: bytes
    body_digest: bytes

    @property
    def holds(self) -> bool:
        """Whether the record is what was written."""
        return is_sealed(self.body_digest.hex(), self.ending)


def read_seal(store: Store, key: str, size_bytes: int) -> Seal:
    """Of a record of so many bytes, whatever they are: a piece at a time is held in memory."""
    body_bytes = max(size_bytes - ENDING_BYTES, 0)
    ending = bytearray(ENDING_BYTES)
    store.get_into(key, body_bytes, memoryview(ending))
    if digest_in(ending) is None:
        return Seal(bytes(ending), b"")
    hasher, piece = Hasher(), memoryview(bytearray(_PIECE_BYTES))
    for done in range(0, body_bytes, _PIECE_BYTES):
        part = piece[: min(_PIECE_BYTES, body_bytes - done)]
        store.get_into(key, done, part)
        hasher.update(part)
    return Seal(bytes(ending), hasher.digest())


def held(store: Store, standing: Standing) -> Version:
    """The bytes of a record that was judged, to replace or remove exactly them.

    `ResourceLimitError` above 512 MiB, `ObjectNotFoundError` and `ObjectChangedError` if it is gone or has changed.
    """
    if standing.version is not None:
        return standing.version
    key = keys.record_key(standing.step)
    try:
        version = store.get_version(key, max_bytes=_HELD_BYTES)
    except errors.ResourceLimitError as error:
        raise errors.ResourceLimitError(
            f"this record has more than {_HELD_BYTES} bytes and is left alone; delete it by hand",
            step=standing.step,
            key=key,
        ) from error
    if len(version.data) <= limits.RECORD_BYTES or _sealed(version.data) is not standing.newer:
        raise errors.ObjectChangedError("another record stands there by now", step=standing.step, key=key)
    return version


def _sealed(data: bytes) -> bool:
    hasher = Hasher()
    hasher.update(memoryview(data)[:-ENDING_BYTES])
    return is_sealed(hasher.digest().hex(), data[-ENDING_BYTES:])


def is_set_aside(store: Store, standing: Standing) -> bool:
    """Whether a mark says that this very attempt is damaged."""
    return bool(standing.attempt) and not standing.newer and read_mark(store, standing.step) == standing.attempt


def lacks_index(store: Store, record: Record) -> bool:
    """Whether one reading finds no index: a record without one is a stump, which restores nothing."""
    try:
        store.get_into(record.index.key, 0, memoryview(bytearray(1)))
    except errors.ObjectNotFoundError:
        return True
    except errors.CorruptCheckpointError:
        return False
    return False


def is_stump(store: Store, standing: Standing, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether a sound record's index is provably gone. Takes five seconds if it seems so.

    Missing at two readings on different connections, absent from a listing, and the record unchanged meanwhile.
    """
    record = standing.record
    if record is None or not lacks_index(store, record):
        return False
    sleep(STUMP_S)
    with store.afresh() as fresh:
        if not lacks_index(fresh, record):
            return False
        folder = record.index.key[: record.index.key.rindex("/") + 1]
        if any(entry.key == record.index.key for entry in fresh.list(folder)):
            return False
        now = judge(fresh, standing.step)
    return now is not None and now.version == standing.version


def is_replaceable(store: Store, standing: Standing, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether a writer may put its own record in the place of this one."""
    if standing.newer:
        return False
    return standing.damaged or is_set_aside(store, standing) or is_stump(store, standing, sleep=sleep)


def newest_first(store: Store, *, above: int = -1) -> Iterator[Standing]:
    """Every checkpoint above a step that is neither damaged nor set aside, the highest step first; each is read when it is asked for."""
    listed = survey(store)
    for step in sorted(listed.records, reverse=True):
        if step <= above:
            return
        standing = judge(store, step)
        if standing is None or standing.damaged:
            continue
        if step not in listed.marks or not is_set_aside(store, standing):
            yield standing
