"""Whether a run may begin in a folder: not beneath another run's checkpoints, whose steps would win over its own."""

from asyncckpt import errors
from asyncckpt.checkpoints.standing import newest_first
from asyncckpt.store.base import Store


def admit(store: Store, step: int, *, run_id: str = "") -> None:
    """`CheckpointConflictError` if a checkpoint that can be read stands above `step`. One LIST, and a read of the newest record.

    Those whose attempts have this `run_id` are this Saver's own: a later save may have been committed before this one was looked at.
    """
    others = (found for found in newest_first(store, above=step) if not run_id or not found.attempt.startswith(run_id))
    above = next(others, None)
    if above is None:
        return
    below = next((found.step for found in newest_first(store) if found.step <= step), None)
    rewind = (
        f"take it away with Run(url).rewind({below})"
        if below is not None
        else "empty the folder (there is no step below to rewind to)"
    )
    raise errors.CheckpointConflictError(
        f"this folder holds a checkpoint of another run at step {above.step}, and this process restored none from it: `latest` would go on "
        f"being the other run's. Restore first (saver.restore(state)); or {rewind}; or save to another folder. "
        "Saver(adopt=True) goes on with the other run's checkpoints as if they were its own",
        step=step,
    )


def newest_lineage(store: Store) -> str | None:
    """The lineage of the newest checkpoint that can be read; None if there is none."""
    return next((found.record.lineage for found in newest_first(store) if found.record is not None), None)
