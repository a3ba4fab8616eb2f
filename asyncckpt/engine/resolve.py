"""Which checkpoint is read: the one asked for, or the best that is whole."""

import errno
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from asyncckpt import errors, events
from asyncckpt.engine.catalog import find_checkpoints, read_record
from asyncckpt.format import keys
from asyncckpt.format.record import Record
from asyncckpt.options import Best, StepChoice
from asyncckpt.store.base import Store
from asyncckpt.telling import warn

_RESOLVES = 10  # times that retention may take the chosen checkpoint away under the reader's hands

Result = TypeVar("Result")


def first_good(
    store: Store, choice: StepChoice, hooks: events.Hooks, read: Callable[[Record], Result]
) -> tuple[Result, Mapping[int, errors.CheckpointError]] | None:
    """What `read` returns for the chosen step, and the damaged steps passed over with their errors. None: nothing to choose from.

    Only damage falls back, and it is damage only where other readings gave the same (see `rereading`). A checkpoint of a newer asyncckpt is
    raised, also where it is the latest, and so are a mismatch of the state and a failure of the store. When every checkpoint is damaged, the
    first choice's error is raised.
    """
    damaged: dict[int, errors.CheckpointError] = {}
    gone: errors.CheckpointError | None = None
    for _ in range(_RESOLVES):
        for step in _candidates(store, choice, damaged, hooks):
            try:
                record = read_record(store, step)
                with reading(store, step, record.attempt):
                    return read(record), damaged
            except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
                if isinstance(choice, int):
                    raise
                _pass_over(step, error, damaged, hooks)
            except errors.CheckpointNotFoundError as error:
                if isinstance(choice, int) and store.head(keys.record_key(step)) is None:
                    raise
                gone = error
                break  # removed or replaced since it was listed: look again
        else:
            gone = None
            break
    if failure := next(iter(damaged.values()), gone):
        raise failure
    return None


@contextmanager
def reading(store: Store, step: int, attempt: str | None = None) -> Iterator[None]:
    """Errors inside name the step and its attempt. An object that is missing because the checkpoint was removed, or replaced, is no damage.

    Nor is a machine without memory: that is told as a `CheckpointError`.
    """
    try:
        yield
    except errors.MissingShardError as error:
        if not _stands(store, step, attempt):
            raise errors.CheckpointNotFoundError("the checkpoint was removed while it was read", step=step) from error
        error.at(step=step, attempt=attempt)
        raise
    except errors.CheckpointError as error:
        error.at(step=step, attempt=attempt)
        raise
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        message = "there is no memory for what is read; free some, or read less at once: load(prefix=...), Checkpoint.tensor()"
        raise errors.CheckpointError(message, step=step, attempt=attempt) from error


def _stands(store: Store, step: int, attempt: str | None) -> bool:
    """Whether the record is there, unchanged."""
    try:
        return read_record(store, step).attempt == attempt or attempt is None
    except errors.CheckpointNotFoundError:
        return False


def check_choice(choice: StepChoice) -> None:
    """`ValueError` unless it is a number, "latest" or `Best`."""
    if (
        choice != "latest"
        and not isinstance(choice, Best)
        and (isinstance(choice, bool) or not isinstance(choice, int))
    ):
        raise ValueError(f'step is a whole number, "latest" or asyncckpt.Best(metric), not {choice!r}')


def _candidates(
    store: Store, choice: StepChoice, damaged: dict[int, errors.CheckpointError], hooks: events.Hooks
) -> Iterator[int]:
    """Steps to try, best first, without the damaged ones; marked ones last.

    `Best` takes the best of those that can be read. A damaged record does not compete: nobody could restore it. A newer one is raised: its
    metrics are unknown here, so which is best is too, and to choose among the rest would hand on another checkpoint than a current
    asyncckpt does, in silence.
    """
    check_choice(choice)
    if isinstance(choice, int):
        yield choice
        return
    found = find_checkpoints(store)
    for steps in (found.good, found.marked):  # a run that has only damaged checkpoints must not start anew in silence
        left = [step for step in reversed(steps) if step not in damaged]
        yield from _ranked(store, choice, left, damaged, hooks) if isinstance(choice, Best) else left


def _ranked(
    store: Store, choice: Best, steps: Sequence[int], damaged: dict[int, errors.CheckpointError], hooks: events.Hooks
) -> list[int]:
    ranked = []
    for step in steps:
        try:
            rank = choice.rank(read_record(store, step).metrics)
        except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
            _pass_over(step, error, damaged, hooks, callers=7)
        except errors.FormatVersionError as error:
            error.message += f"; until then, choose a step by its number: {choice} cannot rank this one"
            raise
        except errors.CheckpointNotFoundError:
            continue
        else:
            if rank is not None:
                ranked.append((rank, -step))
    return [-step for _, step in sorted(ranked)]


def _pass_over(
    step: int,
    error: errors.CheckpointError,
    damaged: dict[int, errors.CheckpointError],
    hooks: events.Hooks,
    *,
    callers: int = 5,
) -> None:
    """Note and tell the damage. `callers`: frames from here to the user's own, which the warning names."""
    damaged[step] = error.at(step=step)
    _forget_locals(error)
    hooks(events.DamageFound(step, error))
    text = f"checkpoint {step} cannot be restored and was passed over: {type(error).__name__}: {error}"
    warn(text, stacklevel=callers)


def _forget_locals(error: BaseException | None) -> None:
    """Or the frames of the traceback would keep the failed restore's memory, a whole state, during the next one."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
