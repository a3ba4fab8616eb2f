"""Marks of damage: `step-N.damaged`, which sets a checkpoint aside so that readers of "latest" pass over it and its step can be saved anew.

The first line names what was found damaged: the attempt, or, of a record that cannot be read, the BLAKE3 of its bytes. A mark counts while
that is what stands there. So neither a later save of the step nor a record that was misread hides behind an old mark. The other lines are
for people: when, and what was wrong. They name no host, user or path outside the root: whoever may read a checkpoint need not know them.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from asyncckpt import errors
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.record import ENDING_BYTES, Outline
from asyncckpt.store.base import Store

MARK_BYTES = 64 * 2**10
_TEXT_CHARACTERS = 2000


def read_mark(store: Store, step: int) -> str:
    """What the mark of this step names; empty without one, and an empty one names nothing."""
    try:
        text = store.get(keys.damaged_key(step), max_bytes=MARK_BYTES)
    except (errors.ObjectNotFoundError, errors.ResourceLimitError):  # so large a thing is no mark of ours
        return ""
    return text.partition(b"\n")[0].decode("ascii", "replace").strip()


def is_marked(store: Store, step: int) -> bool:
    """Whether the checkpoint that stands there is set aside. Two small reads."""
    mark = read_mark(store, step)
    return bool(mark) and mark == name_of(store, step)


def name_of(store: Store, step: int) -> str | None:
    """What a mark of the record that stands there must name; None if there is no record."""
    name, _ = _standing(store, step)
    return name


def _standing(store: Store, step: int) -> tuple[str | None, bool]:
    """The name of the record that stands there, and whether that is its attempt."""
    key = keys.record_key(step)
    try:
        data = store.get(key, max_bytes=limits.RECORD_BYTES)
    except errors.ObjectNotFoundError:
        return None, False
    except errors.ResourceLimitError:
        entry = store.head(key)
        if entry is None:
            return None, False
        ending = bytearray(min(ENDING_BYTES, entry.stored_bytes))
        store.get_into(key, entry.stored_bytes - len(ending), memoryview(ending))
        return hexdigest(ending), False  # as good as that of all, and it need not read gigabytes
    try:
        return Outline.parse(data, key).attempt, True
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError, errors.FormatVersionError):
        return hexdigest(data), False


def mark_damaged(
    store: Store,
    step: int,
    error: errors.CheckpointError | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Set a checkpoint aside; False if what `error` was about does not stand there any more, or reads well by now.

    Only a Saver calls this, on rank 0, after it restored another checkpoint whole by the same road: where all fail it is the road, the
    library or the machine that is broken, and a mark would give up what is good.
    """
    name, is_attempt = _standing(store, step)
    if name is None or (error is not None and error.attempt != (name if is_attempt else None)):
        return False
    when = datetime.fromtimestamp(clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [name, f"found damaged at {when}"]
    if error is not None:
        lines.append(f"{type(error).__name__}: {error}"[:_TEXT_CHARACTERS])
    store.put(keys.damaged_key(step), ["\n".join([*lines, ""]).encode("utf-8", "backslashreplace")])
    return True


def unmark(store: Store, step: int) -> None:
    """Take the mark of a step away, if there is one."""
    store.delete([keys.damaged_key(step)])
