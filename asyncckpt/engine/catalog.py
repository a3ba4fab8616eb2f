"""What a store holds: which checkpoints, and their records, indexes and state files, verified."""

import contextlib
from dataclasses import dataclass

from asyncckpt import errors
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import digest
from asyncckpt.format.index import Index
from asyncckpt.format.record import FileRef, Record
from asyncckpt.store.base import Store

MAX_STATE_BYTES = 2**31
_MARK_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """Steps that have a record, sorted: `good`, and `marked` as damaged."""

    good: tuple[int, ...]
    marked: tuple[int, ...]


def find_checkpoints(store: Store) -> Found:
    """One delimited LIST, and two small reads for every damage mark."""
    steps, marks = set(), set()
    for entry in store.list(delimiter=True):
        if (step := keys.parse_record_key(entry.key)) is not None:
            steps.add(step)
        elif (step := keys.parse_damaged_key(entry.key)) is not None:
            marks.add(step)
    marked = {step for step in steps & marks if _is_damaged(store, step)}
    return Found(tuple(sorted(steps - marked)), tuple(sorted(marked)))


def _is_damaged(store: Store, step: int) -> bool:
    """A mark counts for the attempt that it names: the step may have been saved again since."""
    try:
        mark = store.get(keys.damaged_key(step), max_bytes=_MARK_BYTES)
        attempt = read_record(store, step).attempt
    except (errors.ObjectNotFoundError, errors.CheckpointNotFoundError, errors.FormatVersionError):
        return False
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError):
        return True
    return mark == attempt.encode()


def _instead(store: Store) -> str:
    """The steps that could be asked for."""
    with contextlib.suppress(errors.CheckpointError):  # the first error is the one to tell
        found = (keys.parse_record_key(entry.key) for entry in store.list(delimiter=True))
        steps = sorted(step for step in found if step is not None)
        return f"; the last that are there: {', '.join(map(str, steps[-5:]))}" if steps else "; there is none at all"
    return ""


def read_record(store: Store, step: int) -> Record:
    """The record of a step; `CheckpointNotFoundError` if there is none."""
    key = keys.record_key(step)
    try:
        record = Record.parse(store.get(key, max_bytes=limits.RECORD_BYTES), key)
    except errors.ObjectNotFoundError as error:
        raise errors.CheckpointNotFoundError(
            f"there is no checkpoint of this step{_instead(store)}", step=step, key=key
        ) from error
    except errors.CheckpointError as error:
        error.at(step=step, key=key)
        raise
    if record.step != step:
        raise errors.RecordError(f"the record names step {record.step}", step=step, key=key)
    return record


def read_checkpoint(store: Store, step: int) -> tuple[Record, Index]:
    """Record and index of a step, verified."""
    record = read_record(store, step)
    return record, read_index(store, record)


def read_index(store: Store, record: Record) -> Index:
    """The index of a checkpoint, verified against its record."""
    data = _read_file(store, record.index, record, limits.INDEX_BYTES)
    try:
        return Index.unpack(data)
    except errors.CheckpointError as error:
        error.at(step=record.step, key=record.index.key, attempt=record.attempt)
        raise


def read_values(store: Store, record: Record) -> list[bytes]:
    """The bytes of every state file, verified against the record."""
    return [_read_file(store, ref, record, MAX_STATE_BYTES) for ref in record.states]


def _read_file(store: Store, ref: FileRef, record: Record, limit_bytes: int) -> bytes:
    try:
        if ref.bytes > limit_bytes:
            raise errors.ResourceLimitError(f"the file has {ref.bytes} bytes; at most {limit_bytes} are read")
        try:
            data = store.get(ref.key, max_bytes=ref.bytes)
        except errors.ObjectNotFoundError as error:
            raise errors.MissingShardError("a file that the record names is gone") from error
        except errors.ResourceLimitError as error:
            raise errors.CorruptCheckpointError(
                f"the file is longer than the {ref.bytes} bytes in its record"
            ) from error
        if len(data) != ref.bytes:
            raise errors.CorruptCheckpointError(f"the file has {len(data)} bytes, its record states {ref.bytes}")
        if digest(data).hex() != ref.digest:
            raise errors.DigestMismatchError("the file's bytes differ from their digest")
    except errors.CheckpointError as error:
        error.at(step=record.step, key=ref.key, attempt=record.attempt)
        raise
    return data
