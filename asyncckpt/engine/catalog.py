"""What a store holds: which checkpoints, and their records, indexes and state files, verified.

Each of these objects is read whole, and again where it cannot be right (see `rereading`).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.checkpoints import rereading
from asyncckpt.checkpoints.marks import is_marked
from asyncckpt.checkpoints.rereading import Wrong
from asyncckpt.checkpoints.standing import read_seal, survey
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import digest
from asyncckpt.format.index import Index
from asyncckpt.format.record import ENDING_BYTES, FileRef, Outline, Record, newer
from asyncckpt.store.base import Store


@dataclass(frozen=True, slots=True)
class Found:
    """Steps that have a record, sorted: `good`, and `marked` as damaged."""

    good: tuple[int, ...]
    marked: tuple[int, ...]


def find_checkpoints(store: Store) -> Found:
    """One delimited LIST, and two small reads for every damage mark."""
    listed = survey(store)
    marked = {step for step in listed.records if step in listed.marks and is_marked(store, step)}
    return Found(tuple(sorted(listed.records.keys() - marked)), tuple(sorted(marked)))


def read_record(store: Store, step: int) -> Record:
    """The record of a step; `CheckpointNotFoundError` if there is none.

    A damaged one raises a `CorruptCheckpointError` or an `UnsafeCheckpointError`, one of a newer asyncckpt a `FormatVersionError`.
    """
    key = keys.record_key(step)

    def look(place: Store) -> Record | Wrong:
        return _look_at_record(place, key)

    try:
        found = look(store)
        if not isinstance(found, Wrong):
            return found
        steps = _steps(store) if rereading.is_missing(found) else []
        if rereading.is_missing(found) and step not in steps:
            instead = (
                f"; the last that are there: {', '.join(map(str, steps[-5:]))}" if steps else "; there is none at all"
            )
            raise errors.CheckpointNotFoundError(f"there is no checkpoint of this step{instead}")
        return rereading.settled(store, key, look, found)
    except errors.MissingShardError as error:
        raise errors.CheckpointNotFoundError("the checkpoint was removed", step=step, key=key) from error
    except errors.CheckpointError as error:
        error.at(step=step, key=key)
        raise


def _steps(store: Store) -> list[int]:
    """All that LIST shows, sorted; none where it cannot be asked."""
    with contextlib.suppress(errors.CheckpointError):  # the first error is the one to tell
        return sorted(survey(store).records)
    return []


def _look_at_record(store: Store, key: str) -> Record | Wrong:
    try:
        data = store.get(key, max_bytes=limits.RECORD_BYTES)
    except errors.ObjectNotFoundError as error:
        return rereading.missing(key, error)
    except errors.ResourceLimitError:
        return _look_at_large_record(store, key)
    try:
        return Record.parse(data, key)
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
        with contextlib.suppress(errors.CheckpointError):
            error.at(attempt=Outline.parse(data, key).attempt)  # readable, and yet it breaks a rule
        if not isinstance(error, errors.DigestMismatchError):
            return rereading.wrong_file(error, data)
        return rereading.wrong_file(_record_mismatch(digest(memoryview(data)[:-ENDING_BYTES]), data), data)


def _record_mismatch(found: bytes, ending: bytes | bytearray) -> errors.DigestMismatchError:
    return rereading.mismatch("the record's bytes", found, ending[-68:-4].decode("latin-1"))


def _look_at_large_record(store: Store, key: str) -> Wrong:
    try:
        return _judge_large_record(store, key)
    except errors.ObjectNotFoundError as error:
        return rereading.missing(key, error)
    except errors.CorruptCheckpointError as error:
        return rereading.wrong_size(error, lambda _: True)  # it became shorter under our hands: nothing is certain


def _judge_large_record(store: Store, key: str) -> Wrong:
    """Of a record beyond the limit its digest alone is asked: it is from a newer asyncckpt, or damaged. Holds a piece at a time."""
    entry = store.head(key)
    if entry is None:
        return rereading.missing(key)
    seal = read_seal(store, key, entry.stored_bytes)
    if seal.holds:
        raise newer(f"a record of {entry.stored_bytes} bytes is above {limits.RECORD_BYTES}")
    if not seal.body_digest:
        return rereading.wrong_file(
            errors.RecordError("the record does not end with its digest: it is cut short, or no record"), seal.ending
        )
    return rereading.wrong_file(_record_mismatch(seal.body_digest, seal.ending), seal.body_digest + seal.ending)


def read_checkpoint(store: Store, step: int) -> tuple[Record, Index]:
    """Record and index of a step, verified."""
    record = read_record(store, step)
    return record, read_index(store, record)


def read_index(store: Store, record: Record) -> Index:
    """The index of a checkpoint, verified against its record."""
    data = _read_file(store, record.index, record, limits.INDEX_BYTES)
    try:
        index = Index.unpack(data)
        _check_folders(index, record)
    except errors.CheckpointError as error:
        error.at(step=record.step, key=record.index.key, attempt=record.attempt)
        raise
    return index


def _check_folders(index: Index, record: Record) -> None:
    """What no record names is removed after a day, whatever an index says."""
    for shard in index.shards:
        if shard.key[: shard.key.rindex("/") + 1] not in record.folders:
            raise errors.RecordError(f"the index names {shard.key}, outside of the folders of its record")


def read_values(store: Store, record: Record) -> list[bytes]:
    """The bytes of every state file, verified against the record."""
    left_bytes = limits.STATE_BYTES
    files = []
    for ref in record.states:
        files.append(_read_file(store, ref, record, left_bytes))
        left_bytes -= ref.bytes
    return files


def _read_file(store: Store, ref: FileRef, record: Record, limit_bytes: int) -> bytes:
    try:
        if ref.bytes > limit_bytes:
            raise newer(f"the record states a file of {ref.bytes} bytes, and {limit_bytes} are read")
        return rereading.certain(store, ref.key, _file_look(ref))
    except errors.CheckpointError as error:
        error.at(step=record.step, key=ref.key, attempt=record.attempt)
        raise


def _file_look(ref: FileRef) -> Callable[[Store], bytes | Wrong]:
    def look(store: Store) -> bytes | Wrong:
        try:
            data = store.get(ref.key, max_bytes=ref.bytes)
        except errors.ObjectNotFoundError as error:
            return rereading.missing(ref.key, error)
        except errors.ResourceLimitError:
            longer = errors.CorruptCheckpointError(f"the file is longer than the {ref.bytes} bytes in its record")
            return rereading.wrong_size(longer, ref.bytes.__eq__)
        if len(data) != ref.bytes:
            other = errors.CorruptCheckpointError(f"the file has {len(data)} bytes, its record states {ref.bytes}")
            return rereading.wrong_file(other, data, ref.bytes)
        found = digest(data)
        if found.hex() != ref.digest:
            return rereading.wrong_file(rereading.mismatch("the file's bytes", found, ref.digest), data)
        return data

    return look
