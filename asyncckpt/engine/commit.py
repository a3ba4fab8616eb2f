"""The commit point. Nothing else in the package writes a record's key.

Order: all shards, then state and index, then the record, if absent. A checkpoint exists if and only if its record does.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

from asyncckpt import errors
from asyncckpt.checkpoints.removal import remove_folders
from asyncckpt.checkpoints.standing import Standing, held, is_replaceable, is_set_aside, judge, lacks_index
from asyncckpt.engine.crew import Crew
from asyncckpt.engine.job import CommitOutcome, SaveJob, ShardReceipt
from asyncckpt.format import keys
from asyncckpt.format.digest import digest
from asyncckpt.format.frames import compress
from asyncckpt.format.index import check_readable
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.record import FileRef, Record
from asyncckpt.store.base import Store, Version

_ROUNDS = 5  # of judging a record and putting ours in its place, before the step is left to whoever keeps writing it


def exists(store: Store, job: SaveJob) -> bool:
    """Whether the step is taken by a checkpoint that stands, and was not written by this very save.

    One that is damaged, set aside or without its index is not in the way: the commit judges it again, and replaces it.
    """
    standing = judge(store, job.step)  # a get, not a head: what is refused without a body cannot say why
    if standing is None or standing.damaged or standing.attempt in (job.attempt, *job.earlier_attempts):
        return False
    if standing.record is None:
        return True
    return not is_set_aside(store, standing) and not lacks_index(store, standing.record)


def commit(
    store: Store,
    job: SaveJob,
    builder: IndexBuilder,
    *,
    receipts: Sequence[ShardReceipt],
    digests: bytes,
    state: bytes,
    again: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> CommitOutcome:
    """Write state, index and record. `again`: a worker died over this very commit, and may have sent the record.

    Returns `exists` if another writer's record stands at the step. Raises `UnsafeStoreError` before the record is written if the
    store turns out to ignore conditional puts, and `CommitUnknownError` if the record was sent and nobody knows whether it arrives.
    """
    started = time.perf_counter()
    folder = keys.folder(job.step, job.attempt)
    text = builder.build(receipts, digests, folder)
    index = compress(text)
    check_readable(text, len(index))
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
    put = _RecordPut(store, job, record, sleep, unanswered=again)
    result: Literal["committed", "exists"] = "committed" if put.run() else "exists"
    if put.stands_already and not put.unanswered:
        with contextlib.suppress(errors.StoreError):  # what stays is found by its missing record
            remove_folders(store, [folder])
    return CommitOutcome(
        result=result,
        may_appear=result == "exists" and put.unanswered,
        stored_bytes=stored,
        raw_bytes=builder.plan.data_bytes,
        encode_s=sum(receipt.encode_s for receipt in receipts),
        upload_s=sum(receipt.upload_s for receipt in receipts),
        commit_s=time.perf_counter() - started,
    )


class _RecordPut:
    """The only commit point: one conditional put, and what follows where it meets another record.

    Nothing is ever deleted on the way. A record that may be replaced is replaced by a put on the condition that it is still the one that was
    judged. A put that is refused may have met our own record, whose answer was lost: the record is read back, and the attempt decides.

    `unanswered`: a send of the put had no answer that is the store's. It may still arrive, so from then on nobody removes the attempt's
    folder, unless a reading shows the record, and there is no second try once the key was seen free: our record may have stood and
    have been removed in between. `stands_already`: the record is that of an earlier attempt of the same save.
    """

    def __init__(
        self,
        store: Store,
        job: SaveJob,
        record: Record,
        sleep: Callable[[float], None],
        *,
        unanswered: bool,
    ) -> None:
        self.unanswered = unanswered
        self.stands_already = False
        self._store = store
        self._job = job
        self._record = record
        self._sleep = sleep
        self._key = keys.record_key(job.step)
        self._data = record.to_json()

    def run(self) -> bool:
        """Whether the record stands; False if the step is another's."""
        try:
            return self._run()
        except (errors.StoreError, errors.ResourceLimitError) as error:
            if not self.unanswered:
                raise
            raise errors.CommitUnknownError(
                "the record was sent, and whether it arrived is not known: the step may still appear, complete. What was stored for it "
                f"stays. Look with Run(url).checkpoints(), or save a later step. {type(error).__name__}: {error.message}",
                step=self._job.step,
                key=self._key,
            ) from error

    def _run(self) -> bool:
        old: Version | None = None
        seen = False
        for _ in range(_ROUNDS):
            answered = self._send(old)
            standing = judge(self._store, self._job.step) if answered != "stands" else None
            seen = seen or standing is not None
            if answered == "stands":
                return True
            if standing is None:
                if self.unanswered:
                    raise errors.TransientStoreError("the record is not there yet", key=self._key)
                old = None  # another's was removed since
            elif standing.attempt in (self._job.attempt, *self._job.earlier_attempts):
                return self._own(standing)
            elif answered == "overwritten":
                raise errors.CheckpointConflictError(
                    "another process wrote this step although single_writer was promised",
                    step=self._job.step,
                    key=self._key,
                )
            elif not is_replaceable(self._store, standing, sleep=self._sleep):
                return False
            else:
                old = self._judged_bytes(standing)
        if not seen:
            raise errors.TransientStoreError(
                f"the name of the record is taken, and {_ROUNDS} readings found no object there: a folder, a pipe or a link that leads nowhere "
                "stands in its place, or the store contradicts itself",
                step=self._job.step,
                key=self._key,
            )
        raise errors.TransientStoreError(
            f"the record changed {_ROUNDS} times while it was judged", step=self._job.step, key=self._key
        )

    def _send(self, old: Version | None) -> Literal["stands", "refused", "overwritten"]:
        """One conditional put; `stands` if it took effect."""
        try:
            if old is None:
                self._store.put(self._key, [self._data], if_absent=True)
            else:
                self._store.replace(self._key, [self._data], old)
        except (errors.ObjectExistsError, errors.ObjectChangedError, errors.ObjectNotFoundError) as error:
            self.unanswered = self.unanswered or error.unanswered
            return "refused"
        except errors.StoreError as error:
            self.unanswered = self.unanswered or error.unanswered
            # a folder shows a name that could not be made durable, and may lose it with the power
            visible_only = isinstance(error, errors.LocalIOError | errors.DiskFullError)
            if not self.unanswered or visible_only or not self._arrived():
                raise
            return "stands"
        # where the store cannot compare, a reading must show that nobody wrote between its look and the put
        return "overwritten" if self._store.conditional_puts == "single_writer" else "stands"

    def _arrived(self) -> bool:
        """Whether a reading shows our record after all; no answer is a no."""
        try:
            standing = judge(self._store, self._job.step)
        except errors.StoreError:
            return False
        return standing is not None and standing.attempt == self._job.attempt

    def _own(self, standing: Standing) -> bool:
        if standing.attempt == self._job.attempt and self.unanswered and lacks_index(self._store, self._record):
            raise errors.CheckpointConflictError(
                "the checkpoint was removed by somebody else while its commit was under way",
                step=self._job.step,
                key=self._key,
            )
        self.stands_already = standing.attempt != self._job.attempt
        return True

    def _judged_bytes(self, standing: Standing) -> Version | None:
        """What the put replaces; None if it is gone or another by now."""
        try:
            return held(self._store, standing)
        except (errors.ObjectChangedError, errors.ObjectNotFoundError):
            return None


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
