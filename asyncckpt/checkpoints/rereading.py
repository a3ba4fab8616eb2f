"""Damage is what stays the same: what cannot be right is read again, until it is certain that the store itself holds it.

A bit may flip on the way, a cache may keep wrong bytes, and a replica that is behind may say that an object does not exist. None of
that is damage, and a good checkpoint must not be given up for it. So the range alone is read again, over new connections and past caches
(`Store.afresh`), at the times of `Store.patience`: eight readings within nine seconds from S3, three within one second from a folder. It is
damage when, after all these, most readings gave the same, and there are three of them at least:

- the same wrong bytes;
- or no object, and LIST does not show it either;
- or an object that is too short or too long, and HEAD and LIST agree on its size.

Whatever changes from reading to reading says something about the path and nothing about the checkpoint: a `StoreError`, never damage.
A reading that is right at once costs nothing more.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TypeVar

from asyncckpt import errors
from asyncckpt.format import keys
from asyncckpt.format.digest import Buffer, digest
from asyncckpt.store.base import Patience, PerStore, Store

SAME_READINGS = 3
_SLICE_S = 0.25  # of a wait: who was stopped meanwhile goes at once
_DIGITS = 16  # of a digest in a message
_MISSING = "missing"
_SIZE = "size"
_LOG = logging.getLogger("asyncckpt")

_waited_s = PerStore[float]()  # for what turned out to be damage

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Wrong:
    """A reading that cannot be right. `evidence`: equal for readings that got the same; `fits`: the sizes that the object should have."""

    error: errors.CheckpointError
    evidence: Hashable
    fits: Callable[[int], bool] | None = None


Look = Callable[[Store], Value | Wrong]
"""One reading and its check."""


def missing(key: str, cause: errors.ObjectNotFoundError | None = None) -> Wrong:
    """An object that is named somewhere, and that GET or HEAD does not find."""
    error = errors.MissingShardError("an object that the checkpoint names is gone", key=key)
    error.__cause__ = cause
    return Wrong(error, _MISSING)


def mismatch(what: str, found: bytes, stated_hex: str) -> errors.DigestMismatchError:
    """The error for bytes that are not those that were written."""
    return errors.DigestMismatchError(
        f"{what} differ from their digest: {stated_hex[:_DIGITS]}... is stated, {found.hex()[:_DIGITS]}... was read"
    )


def certain(store: Store, key: str, look: Look[Value], *, stopped: Callable[[], bool] = lambda: False) -> Value:
    """What `look` returns, at once or after other readings; where it stays wrong in the same way, its error.

    `StoreError` if readings differ, or the store contradicts itself, until the deadline of `Store.patience`. `stopped`: asked between
    readings; the last error is raised when nobody waits any more.
    """
    found = look(store)
    return settled(store, key, look, found, stopped=stopped) if isinstance(found, Wrong) else found


def settled(
    store: Store, key: str, look: Look[Value], wrong: Wrong, *, stopped: Callable[[], bool] = lambda: False
) -> Value:
    """`certain`, where the first reading is done and was `wrong`."""
    patience = store.patience
    began_s = patience.clock()
    if wrong.evidence == _MISSING and _removed(store, key):
        raise wrong.error.at(key=key)
    seen = [wrong.evidence]
    hurries = (_waited_s.get(store) or 0.0) >= patience.most_s
    for wait_s in chain(patience.waits_s, repeat(patience.waits_s[-1])):
        if len(seen) > len(patience.waits_s):
            if patience.clock() - began_s + wait_s >= patience.deadline_s:
                break
            if len(seen) == len(patience.waits_s) + 1:
                _LOG.warning(
                    "readings of %s change on the way, or contradict each other; going on: %s", key, wrong.error
                )
        _wait(patience, 0.0 if hurries and len(seen) <= len(patience.waits_s) else wait_s, stopped)
        if stopped():
            raise wrong.error.at(key=key)
        with store.afresh() as fresh:
            found = look(fresh)
            if not isinstance(found, Wrong):
                _LOG.info("a reading of %s was wrong, and reading %d was right: %s", key, len(seen) + 1, wrong.error)
                return found
            wrong = found
            seen.append(wrong.evidence)
            if _stays(seen, patience) and _agrees(fresh, key, wrong):
                _waited_s.set(store, (_waited_s.get(store) or 0.0) + patience.clock() - began_s)
                raise wrong.error.at(key=key)
    took_s = patience.clock() - began_s
    if len(set(seen)) == 1:
        raise errors.StoreError(
            f"the store contradicts itself for {took_s:.0f} s: {wrong.error.message}, but HEAD or LIST shows the object as it should be. "
            "This is no damage of the checkpoint: ask who runs the store, or a proxy or cache before it",
            key=key,
        ) from wrong.error
    raise errors.StoreError(
        f"bytes change on the way: {len(seen)} readings over {took_s:.0f} s were wrong in {len(set(seen))} ways; the last: "
        f"{wrong.error.message}. This is no damage of the checkpoint: check this host's memory and what lies between it and the store",
        key=key,
    ) from wrong.error


def read_range(
    store: Store,
    key: str,
    offset: int,
    target: memoryview,
    check: Callable[[memoryview], Value],
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Value:
    """Fill `target` from the object with bytes that `check` accepts, and return what it returns."""
    return certain(store, key, _range_look(key, offset, target, check), stopped=stopped)


def reread_range(
    store: Store,
    key: str,
    offset: int,
    target: memoryview,
    check: Callable[[memoryview], Value],
    *,
    error: errors.CheckpointError,
    stopped: Callable[[], bool] = lambda: False,
) -> Value:
    """`read_range`, where the first reading is done: its bytes lie in `target`, and were refused with `error`."""
    wrong = refused(error, offset, target.nbytes, digest(target))
    return settled(store, key, _range_look(key, offset, target, check), wrong, stopped=stopped)


def _range_look(
    key: str, offset: int, target: memoryview, check: Callable[[memoryview], Value]
) -> Callable[[Store], Value | Wrong]:
    def look(store: Store) -> Value | Wrong:
        if wrong := read_into(store, key, offset, target):
            return wrong
        try:
            return check(target)
        except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
            return refused(error, offset, target.nbytes, digest(target))

    return look


def read_into(store: Store, key: str, offset: int, target: memoryview) -> Wrong | None:
    """One reading of a range: what is wrong if it cannot be had."""
    try:
        store.get_into(key, offset, target)
    except errors.ObjectNotFoundError as error:
        return missing(key, error)
    except errors.CorruptCheckpointError as error:
        return Wrong(error, _SIZE, lambda size_bytes: size_bytes >= offset + target.nbytes)
    return None


def refused(error: errors.CheckpointError, offset: int, size_bytes: int, found: bytes) -> Wrong:
    """A range that was read, has this digest, and cannot be right."""
    if " (bytes " not in error.message:
        error.message += f" (bytes {offset} to {offset + size_bytes} of the object)"
    return Wrong(error, found)


def wrong_file(error: errors.CheckpointError, data: Buffer, size_bytes: int | None = None) -> Wrong:
    """An object that was read whole, and refused. `size_bytes`: what it should have, if it has not."""
    return Wrong(error, digest(data), None if size_bytes is None else size_bytes.__eq__)


def wrong_size(error: errors.CheckpointError, fits: Callable[[int], bool]) -> Wrong:
    """An object whose size alone is known, and cannot be right."""
    return Wrong(error, _SIZE, fits)


def is_missing(found: object) -> bool:
    """Whether a reading found no object."""
    return isinstance(found, Wrong) and found.evidence == _MISSING


def _stays(seen: list[Hashable], patience: Patience) -> bool:
    """Whether the last thing that was seen is what there is: most of all, or a path that flips bits hits the same ones by chance."""
    same = seen.count(seen[-1])
    return len(seen) > len(patience.waits_s) and same >= SAME_READINGS and 2 * same > len(seen)


def _agrees(store: Store, key: str, wrong: Wrong) -> bool:
    """Whether HEAD and LIST say the same as the reading."""
    if wrong.evidence != _MISSING and wrong.fits is None:
        return True
    listed = next((entry.stored_bytes for entry in store.list(key) if entry.key == key), None)
    if wrong.fits is None:
        return listed is None
    entry = store.head(key)
    return entry is not None and entry.stored_bytes == listed and not wrong.fits(entry.stored_bytes)


def _removed(store: Store, key: str) -> bool:
    """Whether the whole checkpoint is gone, as three answers agree: then nobody need wait for one of its objects."""
    step = keys.parse_folder(key)
    if step is None or store.head(keys.record_key(step)) is not None:
        return False
    return next(store.list(key[: key.rindex("/") + 1]), None) is None


def _wait(patience: Patience, wait_s: float, stopped: Callable[[], bool]) -> None:
    while wait_s > 0 and not stopped():
        patience.sleep(min(wait_s, _SLICE_S))
        wait_s -= _SLICE_S
