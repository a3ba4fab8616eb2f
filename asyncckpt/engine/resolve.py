"""Which checkpoint is read: the one asked for, or the best that is whole."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from asyncckpt import errors, events
from asyncckpt.engine.catalog import find_checkpoints, read_record
from asyncckpt.format import keys
from asyncckpt.options import Best, StepChoice
from asyncckpt.store.base import Store

_RESOLVES = 10  # times that retention may take the chosen checkpoint away under the reader's hands

Result = TypeVar("Result")


def first_good(
    store: Store, choice: StepChoice, hooks: events.Hooks, read: Callable[[int], Result]
) -> tuple[Result, tuple[int, ...]] | None:
    """What `read` returns for the chosen step, and the damaged steps passed over. None: nothing to choose from.

    Only damage falls back, and only if it is there twice: a bit may also flip on its way. A mismatch of the state or a failure of the store is raised at once. When every checkpoint is
    damaged, the first choice's error is raised.
    """
    damaged: dict[int, errors.CheckpointError] = {}
    gone: errors.CheckpointError | None = None
    for _ in range(_RESOLVES):
        for step in _candidates(store, choice, damaged, hooks):
            try:
                return _read_again(store, step, read), _to_mark(damaged)
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


def _read_again(store: Store, step: int, read: Callable[[int], Result]) -> Result:
    """What does not fit its digest is read once more: the step is not given up, or set aside for good, for a fault on the way."""
    try:
        with reading(store, step):
            return read(step)
    except errors.MissingShardError:
        raise
    except errors.CorruptCheckpointError as error:
        first = error
        _forget_locals(error)
    try:
        with reading(store, step):
            return read(step)
    except errors.CorruptCheckpointError as error:
        if error.overwritten or not first.overwritten:
            raise
        _forget_locals(error)
        raise first from None  # or nobody is told that the state is partly overwritten
    finally:
        del first  # its traceback leads here


@contextmanager
def reading(store: Store, step: int) -> Iterator[None]:
    """Errors inside name the step. An object that is missing because retention took the checkpoint is no damage."""
    try:
        yield
    except errors.MissingShardError as error:
        if store.head(keys.record_key(step)) is None:
            raise errors.CheckpointNotFoundError("the checkpoint was removed while it was read", step=step) from error
        error.at(step=step)
        raise
    except errors.CheckpointError as error:
        error.at(step=step)
        raise


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
) -> list[int]:
    """Steps to try, best first, without the damaged ones."""
    check_choice(choice)
    if isinstance(choice, int):
        return [choice]
    found = find_checkpoints(store)
    # marked ones are tried where nothing else is left: a run that has only damaged checkpoints must not start anew in silence
    steps = [step for step in reversed(found.good or found.marked) if step not in damaged]
    if not isinstance(choice, Best):
        return steps
    ranked = []
    for step in steps:
        try:
            rank = choice.rank(read_record(store, step).metrics)
        except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
            _pass_over(step, error, damaged, hooks)
        except errors.CheckpointNotFoundError:
            continue
        else:
            if rank is not None:
                ranked.append((rank, -step))
    return [-step for _, step in sorted(ranked)]


def _to_mark(damaged: Mapping[int, errors.CheckpointError]) -> tuple[int, ...]:
    """A newer format is passed over, but is no damage: a Saver must never set it aside."""
    return tuple(step for step, error in damaged.items() if not isinstance(error, errors.FormatVersionError))


def _pass_over(
    step: int, error: errors.CheckpointError, damaged: dict[int, errors.CheckpointError], hooks: events.Hooks
) -> None:
    damaged[step] = error.at(step=step)
    _forget_locals(error)
    hooks(events.DamageFound(step, error))
    warnings.warn(
        f"checkpoint {step} cannot be restored and was passed over: {type(error).__name__}: {error}", stacklevel=5
    )


def _forget_locals(error: BaseException | None) -> None:
    """Or the frames of the traceback would keep the failed restore's memory, a whole state, during the next one."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
