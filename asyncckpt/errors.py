"""Every error of asyncckpt, one family.

    CheckpointError
    ├── SnapshotError                 the state could not be captured; nothing was started
    │   ├── UnsupportedTensorError        meta, sparse, quantized, DTensor, unknown subclass
    │   ├── UnsupportedObjectError        a value that `torch.load(weights_only=True)` would refuse
    │   └── TornSnapshotError             somebody wrote to a tensor while it was copied
    ├── QueueFullError                every arena is in flight and `when_full="raise"`
    ├── SaveFailedError               one or more saves did not commit; `.failures` says which and why
    ├── CheckpointConflictError       the step exists already, written by another attempt
    ├── CommitUnknownError            the record's put has no answer: the checkpoint may still appear, complete
    ├── WorkerDiedError               a worker (or the service) died again and again on one task
    ├── ForkedSaverError              a Saver was used in a forked child
    ├── ReentrantCallError            a signal handler called what cannot be done in the middle of the call that it interrupted
    ├── StoreError                    the store refused or failed
    │   ├── TransientStoreError           worth retrying: 5xx, throttling, resets, timeouts, short bodies
    │   ├── DeadlineExceededError         retried until the deadline of the RetryPolicy
    │   ├── StoreAuthError                credentials missing, wrong, expired or not allowed
    │   ├── StoreNotFoundError            the bucket or the root does not exist
    │   ├── ObjectNotFoundError           one key does not exist
    │   ├── ObjectExistsError             a conditional put found the key taken
    │   ├── ObjectChangedError            a conditional put or delete found another object than the one that was read
    │   ├── UploadLostError               the store knows an upload, or a part of it, no more; it is begun again
    │   ├── UnsafeStoreError              the store ignores the condition of a put, or refuses it
    │   ├── ClockSkewError                this host's clock is too far from the store's
    │   ├── DiskFullError                 no space or quota left
    │   └── LocalIOError                  any other failure of the local filesystem (read-only, EIO, permissions)
    ├── CheckpointNotFoundError       no such checkpoint
    ├── StateMismatchError            names, shapes or dtypes of the state and the checkpoint differ
    ├── CorruptCheckpointError        what is stored cannot be what was written
    │   ├── MissingShardError             an object that the index names is gone
    │   ├── DigestMismatchError           bytes differ from their BLAKE3 digest
    │   └── RecordError                   a record or index that is malformed
    ├── FormatVersionError            written by a newer asyncckpt: no damage; upgrade this one
    └── UnsafeCheckpointError         a checkpoint asks for something a reader must not do
        └── ResourceLimitError            it states sizes above the limits

Every error carries `step`, `key` and `attempt` where they are known, and says in its message what to do. None carries
a credential.
"""

from collections.abc import Mapping
from typing import Any, Self


class CheckpointError(Exception):
    """Base of all errors. `step`: optimizer steps completed; `key`: object key or tensor path; `attempt`: writer.

    `overwritten`: a restore had begun to change the state when it failed, and the message says so.
    """

    def __init__(
        self, message: str, *, step: int | None = None, key: str | None = None, attempt: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.step = step
        self.key = key
        self.attempt = attempt
        self.overwritten = False

    def __str__(self) -> str:
        facts = [
            f"{name} {value}" for name, value in (("step", self.step), ("key", self.key)) if value not in (None, "")
        ]
        return f"{self.message} [{', '.join(facts)}]" if facts else self.message

    def at(self, *, step: int | None = None, key: str | None = None, attempt: str | None = None) -> Self:
        """Fill in what is not known yet, and return the error itself."""
        self.step = step if self.step is None else self.step
        self.key = key if self.key is None else self.key
        self.attempt = attempt if self.attempt is None else self.attempt
        return self


class SnapshotError(CheckpointError):
    """The state could not be captured."""


class UnsupportedTensorError(SnapshotError):
    """A tensor that cannot be stored exactly; `key` is its path."""


class UnsupportedObjectError(SnapshotError):
    """A value that `weights_only=True` would refuse; `key` is its path."""


class TornSnapshotError(SnapshotError):
    """A tensor was written while an overlapped snapshot copied it; `key` is its path."""


class QueueFullError(CheckpointError):
    """Every arena is in flight and `when_full="raise"`."""


class SaveFailedError(CheckpointError):
    """Saves that did not commit. `failures`: step to error, in the order of the saves."""

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        lines = "; ".join(f"step {step}: {type(error).__name__}: {error}" for step, error in failures.items())
        super().__init__(f"{len(failures)} save(s) did not commit: {lines}", step=next(iter(failures), None))
        self.failures = dict(failures)

    def __str__(self) -> str:
        return self.message  # each failure in it tells its own step and key


class CheckpointConflictError(CheckpointError):
    """The step was committed by another attempt."""


class CommitUnknownError(CheckpointError):
    """The record's put was sent and its outcome is not known: the checkpoint may still appear, complete."""


class WorkerDiedError(CheckpointError):
    """A worker or the service died on every try of one task."""


class ForkedSaverError(CheckpointError):
    """A Saver belongs to the process that made it."""


class ReentrantCallError(CheckpointError):
    """A call in the middle of another one on the same thread, as in a signal handler, that cannot be done there. Nothing was started."""


class StoreError(CheckpointError):
    """A store refused or failed.

    `unanswered`: a send of this request, this one or an earlier try, had no answer that says what became of it, so it may have
    taken effect or may still. False: whatever was sent was refused, or never left this host.
    `status`: of the HTTP answer, 0 without one. `unreached`: nobody was found there: refused, an unknown host, no route.
    """

    unanswered = False
    status = 0
    unreached = False


class TransientStoreError(StoreError):
    """Worth another try. Unless the store refused it, or it was never sent, nobody knows whether it took effect (`unanswered`)."""

    unanswered = True


class DeadlineExceededError(StoreError):
    """Retries went on until the deadline; the cause is the last failure. Whoever retried says if all tries were refused."""

    unanswered = True


class StoreAuthError(StoreError):
    """Credentials are missing, wrong, expired or lack a permission."""


class StoreNotFoundError(StoreError):
    """The bucket or root folder does not exist."""


class ObjectNotFoundError(StoreError):
    """The key does not exist."""


class ObjectExistsError(StoreError):
    """A put with `if_absent` found the key taken."""


class ObjectChangedError(StoreError):
    """A conditional put or delete found another object than the one that was read."""


class UploadLostError(StoreError):
    """The store knows an upload, or a part of it, no more: it was aborted, or expired. Nothing can be said but to begin it again."""


class UnsafeStoreError(StoreError):
    """The store ignores conditional puts."""


class ClockSkewError(StoreError):
    """The clocks of this host and of the store differ by more than the store accepts."""


class DiskFullError(StoreError):
    """No space or quota is left."""


class LocalIOError(StoreError):
    """The local filesystem failed."""


class CheckpointNotFoundError(CheckpointError):
    """No such checkpoint."""


class StateMismatchError(CheckpointError):
    """State and checkpoint differ in names, shapes or dtypes; nothing was loaded."""


class CorruptCheckpointError(CheckpointError):
    """What is stored cannot be what was written."""


class MissingShardError(CorruptCheckpointError):
    """An object named by the index does not exist."""


class DigestMismatchError(CorruptCheckpointError):
    """Bytes differ from their BLAKE3 digest."""


class RecordError(CorruptCheckpointError):
    """A record or an index is malformed."""


class FormatVersionError(CheckpointError):
    """A checkpoint of a newer asyncckpt: its digests agree, and something in it is unknown here. No damage, and never treated as such."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for something that a reader must not do."""


class ResourceLimitError(UnsafeCheckpointError):
    """A checkpoint states sizes above the limits."""


def told(error: BaseException | None) -> str:
    """What an error says, for the message of another one that carries its step and key: these are told once, at the end."""
    return error.message if isinstance(error, CheckpointError) else str(error)


def family() -> dict[str, type[CheckpointError]]:
    """Every error class by name."""
    found: dict[str, type[CheckpointError]] = {}
    todo: list[type[CheckpointError]] = [CheckpointError]
    while todo:
        kind = todo.pop()
        found[kind.__name__] = kind
        todo += kind.__subclasses__()
    return found


def to_json(error: BaseException) -> dict[str, Any]:
    """Describe an error so that another process can raise it; foreign types become `CheckpointError`."""
    if isinstance(error, CheckpointError):
        data: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
        data |= {"step": error.step, "key": error.key, "attempt": error.attempt}
        if isinstance(error, StoreError):
            data["unanswered"] = error.unanswered
    else:
        data = {"type": "CheckpointError", "message": f"{type(error).__name__}: {error}"}
    if error.__cause__ is not None:
        data["cause"] = to_json(error.__cause__)
    return data


def from_json(data: Mapping[str, Any]) -> CheckpointError:
    """Raise-able mirror of `to_json`."""
    kind = family().get(data["type"], CheckpointError)
    if kind is SaveFailedError:
        kind = CheckpointError
    error = kind(data["message"], step=data.get("step"), key=data.get("key"), attempt=data.get("attempt"))
    if isinstance(error, StoreError) and "unanswered" in data:
        error.unanswered = bool(data["unanswered"])
    if data.get("cause"):
        error.__cause__ = from_json(data["cause"])
    return error
