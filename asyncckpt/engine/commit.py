"""The commit point. Nothing else in the package writes a record's key.

Order: all shards, then state and index, then the record, if absent. A checkpoint exists if and only if its record does.
"""

import functools
import time
from collections.abc import Sequence

from asyncckpt import errors
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.job import CommitOutcome, SaveJob, ShardReceipt
from asyncckpt.engine.marks import is_marked
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import digest
from asyncckpt.format.frames import compress
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.record import FileRef, Record
from asyncckpt.store.base import Store


def exists(store: Store, job: SaveJob) -> bool:
    """Whether the step is taken by a record that stands, and was not written by this very save."""
    attempt = _attempt_of(store, job.step)  # a get, not a head: what is refused without a body cannot say why
    return (
        attempt is not None and attempt not in (job.attempt, *job.earlier_attempts) and not is_marked(store, job.step)
    )


def commit(
    store: Store, job: SaveJob, builder: IndexBuilder, *, receipts: Sequence[ShardReceipt], digests: bytes, state: bytes
) -> CommitOutcome:
    """Write state, index and record.

    Returns `exists` if another writer's record stands at the step. Raises `UnsafeStoreError` before the record is written if the
    store turns out to ignore conditional puts.
    """
    started = time.perf_counter()
    folder = keys.folder(job.step, job.attempt)
    index = compress(builder.build(receipts, digests, folder))
    files = {folder + "index.json.zst": index, folder + "state.pt": state}
    refs = {key: FileRef(key=key, bytes=len(data), digest=digest(data).hex()) for key, data in files.items()}
    puts = [functools.partial(store.put, key, [data]) for key, data in files.items()]
    Crew(puts, lambda: lambda put: put()).run(len(puts))  # side by side: one round trip instead of two
    if job.probe and store.conditional_puts == "unproven":
        _probe(store, folder + "index.json.zst", index)
    stored = sum(receipt.stored_bytes for receipt in receipts) + sum(len(data) for data in files.values())
    record = Record(
        step=job.step,
        epoch=job.epoch,
        attempt=job.attempt,
        time=job.time_s,
        metrics=dict(job.metrics),
        config=job.config,
        tags=job.tags,
        pinned=job.pinned,
        versions=dict(job.versions),
        world_size=job.world_size,
        lineage=job.lineage,
        raw_bytes=builder.plan.data_bytes,
        stored_bytes=stored,
        index=refs[folder + "index.json.zst"],
        states=(refs[folder + "state.pt"],),
        folders=(folder,),
    )
    result = _put_record(store, job, record.to_json())
    return CommitOutcome(
        result="committed" if result else "exists",
        stored_bytes=stored,
        raw_bytes=builder.plan.data_bytes,
        encode_s=sum(receipt.encode_s for receipt in receipts),
        upload_s=sum(receipt.upload_s for receipt in receipts),
        commit_s=time.perf_counter() - started,
    )


def _put_record(store: Store, job: SaveJob, record: bytes) -> bool:
    # The only commit point: one conditional put. A 412 after a retry may be our own put whose answer was lost, so the
    # record is read back and the attempt decides.
    key = keys.record_key(job.step)
    for last in (False, True):
        try:
            store.put(key, [record], if_absent=True)
        except errors.ObjectExistsError:
            attempt = _attempt_of(store, job.step)
            if attempt in (job.attempt, *job.earlier_attempts):
                return True
            if attempt is not None and (last or not is_marked(store, job.step)):
                return False
            # set aside as damaged (or gone meanwhile): the step may be saved again
            store.delete([key])
            continue
        if store.conditional_puts == "single_writer" and _attempt_of(store, job.step) != job.attempt:
            raise errors.CheckpointConflictError(
                "another process wrote this step although single_writer was promised", step=job.step, key=key
            )
        return True
    raise errors.CheckpointConflictError("the record was taken again while it was replaced", step=job.step, key=key)


def _probe(store: Store, key: str, data: bytes) -> None:
    # the index has this attempt's own key and stands already: a store that honours the condition must refuse it
    try:
        store.put(key, [data], if_absent=True)
    except errors.ObjectExistsError:
        return
    raise errors.UnsafeStoreError(
        "this store ignores `If-None-Match`, so two writers could both believe they committed a step. If only one process "
        "ever writes below this prefix, say store=asyncckpt.S3Options(single_writer=True)",
        key=key,
    )


def _attempt_of(store: Store, step: int) -> str | None:
    key = keys.record_key(step)
    try:
        return str(Record.parse(store.get(key, max_bytes=limits.RECORD_BYTES), key).attempt)
    except errors.ObjectNotFoundError:
        return None
    except errors.CorruptCheckpointError:
        return ""  # unreadable: stands in the way, and belongs to no attempt


def abandon(store: Store, job: SaveJob) -> None:
    """Remove what a failed attempt stored, unless its record stands after all."""
    if _attempt_of(store, job.step) == job.attempt:
        return
    remove_folders(store, [keys.folder(job.step, job.attempt)])


def remove_folders(store: Store, folders: Sequence[str]) -> None:
    """Delete every object below the folders."""
    for folder in folders:
        store.delete([entry.key for entry in store.list(folder)])
