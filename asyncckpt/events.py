"""What happens, as frozen events through one hook.

A hook is any callable that takes an event. Hooks run in the trainer, on one listener thread (restore: on the calling
thread; `StoreAway` and `StoreBack` of what is read there: on a thread that watches), and must be quick; an exception in one is logged and does not reach the training loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.telling import LOG

_TOLD_STEPS = 10  # of a warning about thousands


@dataclass(frozen=True, slots=True)
class SaveReport:
    """Where the time of one save went, in seconds, and its bytes.

    `call_s`: `save()` held the caller. `hook_wait_s`: an optimizer step waited for the copy. `staged_s`: from the call until the
    snapshot was complete. `encode_s`, `upload_s`: busy seconds summed over workers and connections. `commit_s`: state,
    index and record. `total_s`: from the call until the record existed. `raw_bytes`: tensors; `stored_bytes`: objects.
    `skipped`: the step existed already, or the queue was full with `when_full="skip"`; nothing was stored.
    """

    step: int
    call_s: float = 0.0
    hook_wait_s: float = 0.0
    staged_s: float = 0.0
    encode_s: float = 0.0
    upload_s: float = 0.0
    commit_s: float = 0.0
    total_s: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0
    reused_bytes: int = 0
    retries: int = 0
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class SaveStaged(Event):
    """The snapshot is complete; the state may change."""

    step: int
    staged_s: float


@dataclass(frozen=True, slots=True)
class ShardStored(Event):
    """One shard is in the store."""

    step: int
    key: str
    raw_bytes: int
    stored_bytes: int
    shards_done: int
    shards: int


@dataclass(frozen=True, slots=True)
class SaveCommitted(Event):
    """The checkpoint exists."""

    report: SaveReport


@dataclass(frozen=True, slots=True)
class SaveSkipped(Event):
    """Nothing was stored; `reason` says why."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaveFailed(Event):
    """The save will not commit."""

    step: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class StoreRetried(Event):
    """A request failed and will be sent again after `wait_s`."""

    operation: str
    key: str
    tries: int
    wait_s: float
    error: str


@dataclass(frozen=True, slots=True)
class StoreAway(Event):
    """The store has not answered for so long, though something is asked of it; said after ten seconds, and then every minute.

    `error`: the last failure, empty where requests hang. `left_s`: until the first of what waits for it is given up.
    """

    since_s: float
    error: str
    saves_in_flight: int
    left_s: float


@dataclass(frozen=True, slots=True)
class StoreBack(Event):
    """A store that was away answers again."""

    after_s: float


@dataclass(frozen=True, slots=True)
class WorkerReplaced(Event):
    """A worker died or hung, and another took its task; or it got no core, and the next ones yield less."""

    reason: str


@dataclass(frozen=True, slots=True)
class ServiceRestarted(Event):
    """The service died; another was started and the staged saves were submitted again."""

    saves: int


@dataclass(frozen=True, slots=True)
class CheckpointsRemoved(Event):
    """Retention removed these steps."""

    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ForeignCheckpoints(Event):
    """Retention found checkpoints of another run at these steps, and leaves them alone."""

    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DamageFound(Event):
    """A checkpoint did not verify and an older one is tried."""

    step: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class BytesRestored(Event):
    """Progress of a restore."""

    step: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RetentionFailed(Event):
    """Retention leaves these steps in place, whatever the rules say: their removal failed, or their records cannot be read.

    No steps: it could not look what there is. It goes on with the others, and tries again after the next save.
    """

    steps: tuple[int, ...]
    error: BaseException


@dataclass(frozen=True, slots=True)
class LeftoversRemoved(Event):
    """What writers left that died is gone: folders of their attempts, and uploads that nobody ended (by key)."""

    folders: tuple[str, ...]
    uploads: tuple[str, ...]
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class LeftoversRemain(Event):
    """What a failed save or a dead writer stored could not be looked for, or not be removed."""

    error: BaseException


Hook = Callable[[Event], Any]


@dataclass(slots=True)
class Hooks:
    """Calls every hook; a failing hook is logged, never raised."""

    hooks: tuple[Hook, ...] = field(default_factory=tuple)

    def __call__(self, event: Event) -> None:
        """Hand the event to every hook."""
        for hook in self.hooks:
            try:
                hook(event)
            except Exception:  # noqa: BLE001 - a user's hook must not kill the listener
                LOG.exception("a hook failed on %s", type(event).__name__)


def warning_of(event: RetentionFailed | LeftoversRemain) -> str:
    """The line that a person reads."""
    why = f"{type(event.error).__name__}: {event.error}"
    if isinstance(event, LeftoversRemain):
        return f"what failed saves or dead writers left could not be removed; a later run tries again. {why}"
    if not event.steps:
        return (
            f"retention could not look at the checkpoints, removes nothing, and tries again after the next save. {why}"
        )
    told = ", ".join(map(str, event.steps[:_TOLD_STEPS])) + (", ..." if len(event.steps) > _TOLD_STEPS else "")
    return f"retention leaves step(s) {told} in place, and goes on with the others. It says so once. {why}"
