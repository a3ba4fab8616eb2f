"""What is told of the tasks behind a save's answer, by a worker as plain data, then to hooks as events.

These are `retain`, `collect` (leftovers) and `abandon` (what a failed save stored). None of them can fail a save any more.
"""

from collections.abc import Mapping
from typing import Any

from asyncckpt import errors, events
from asyncckpt.checkpoints.leftovers import Collected

KINDS = frozenset({"retain", "collect", "abandon"})


def told_of(collected: Collected) -> dict[str, Any]:
    """A collection as plain data."""
    found = collected.leftovers
    return {
        "folders": list(found.folders),
        "uploads": list(found.uploads),
        "stored_bytes": found.stored_bytes,
        "lapses": [{"steps": [], "error": errors.to_json(error)} for error in collected.failures],
    }


def told_of_failure(error: Mapping[str, Any]) -> dict[str, Any]:
    """A task that failed as a whole, as plain data."""
    return {"lapses": [{"steps": [], "error": dict(error)}]}


def events_of(kind: str, data: Mapping[str, Any]) -> list[events.Event]:
    """What hooks hear of a task of this kind; nothing of one that had nothing to do."""
    found: list[events.Event] = []
    if data.get("removed"):
        found.append(events.CheckpointsRemoved(tuple(data["removed"])))
    if data.get("foreign"):
        found.append(events.ForeignCheckpoints(tuple(data["foreign"])))
    if data.get("folders") or data.get("uploads"):
        found.append(events.LeftoversRemoved(tuple(data["folders"]), tuple(data["uploads"]), data["stored_bytes"]))
    for lapse in data.get("lapses", ()):
        error = errors.from_json(lapse["error"])
        found.append(
            events.RetentionFailed(tuple(lapse["steps"]), error) if kind == "retain" else events.LeftoversRemain(error)
        )
    return found
