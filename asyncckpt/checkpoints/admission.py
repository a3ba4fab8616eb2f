"""Whether a run may begin in a folder: not beneath another run's checkpoints, whose steps would win over its own."""

from asyncckpt import errors
from asyncckpt.checkpoints.standing import newest_first
from asyncckpt.store.base import Store


def admit(store: Store, step: int) -> None:
    """`CheckpointConflictError` if a checkpoint that can be read stands above `step`. One LIST, and a read of the newest record."""
    above = next(newest_first(store, above=step), None)
    if above is None:
        return
    raise errors.CheckpointConflictError(
        f"this folder holds checkpoints of another run, up to step {above.step}, and this process restored none of them: `latest` would "
        "go on being the other run's. Restore first (saver.restore(state)); or take what is above away with "
        f"Run(url).rewind({_below(store, step)}); or save to another folder. Saver(adopt=True) goes on with the other run's checkpoints "
        "as if they were its own",
        step=step,
    )


def _below(store: Store, step: int) -> str:
    """The step to rewind to."""
    found = next((standing.step for standing in newest_first(store) if standing.step <= step), None)
    return "step" if found is None else str(found)


def newest_lineage(store: Store) -> str | None:
    """The lineage of the newest checkpoint that can be read; None if there is none."""
    return next((found.record.lineage for found in newest_first(store) if found.record is not None), None)
