"""Whether a run may save a step: not beneath checkpoints that it does not go on from, whose steps would win over its own."""

from asyncckpt import errors
from asyncckpt.checkpoints.standing import newest_first
from asyncckpt.store.base import Store


def admit(store: Store, step: int, *, restored: int = -1, run_id: str = "") -> None:
    """`CheckpointConflictError` if a checkpoint stands above `step`, and above the one that was `restored`. A LIST, and a read of the newest record.

    Those whose attempts have this `run_id` are this Saver's own: a later save may have been committed before this one was looked at.
    """
    above_both = newest_first(store, above=max(step, restored))
    others = (found for found in above_both if not run_id or not found.attempt.startswith(run_id))
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
        f"this folder holds a checkpoint at step {above.step} that this run does not go on from, of another run or of a branch that was left: "
        f"`latest` would go on being that one. Restore it first (saver.restore(state)); or {rewind}; or save to another folder. "
        "Saver(adopt=True) goes on beneath what stands there, as if it were its own",
        step=step,
    )


def newest_lineage(store: Store) -> str | None:
    """The lineage of the newest checkpoint that can be read; None if there is none."""
    return next((found.record.lineage for found in newest_first(store) if found.record is not None), None)
