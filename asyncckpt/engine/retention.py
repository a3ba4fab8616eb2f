"""Which checkpoints stay.

A run counts and removes only checkpoints of its own lineage. Of these one stays if any rule keeps it, if it is pinned, or if it is the newest.
Newer formats and damaged checkpoints are neither counted nor removed, nor is what stands above the step that was just committed: that is
another branch, and to count it would cost this one its own. Whatever folder a record names that stays, stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.checkpoints.removal import remove_checkpoint
from asyncckpt.checkpoints.standing import Listing, Standing, is_set_aside, judge, lacks_index, survey
from asyncckpt.engine.crew import Crew
from asyncckpt.format import keys
from asyncckpt.options import KeepLast, KeepRule
from asyncckpt.store.base import Entry, Store

_READERS = 8  # of records, where many are new to us: one is 30 ms on S3


def doomed(steps: Iterable[int], rules: Sequence[KeepRule]) -> list[int]:
    """The steps that no rule keeps, oldest first. No rules keep everything."""
    ordered = sorted(steps)
    if not rules or not ordered:
        return []
    kept = {ordered[-1]}
    for rule in rules:
        if isinstance(rule, KeepLast):
            kept.update(ordered[-rule.count :])
        else:
            kept.update(step for step in ordered if step % rule.steps == 0)
    return [step for step in ordered if step not in kept]


@dataclass(frozen=True, slots=True)
class Retained:
    """What one run of retention did. `foreign`: steps of other lineages that it sees for the first time."""

    removed: tuple[int, ...] = ()
    foreign: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"removed": list(self.removed), "foreign": list(self.foreign)}


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of a record for as long as its listing is the same. `lineage`: empty if it is damaged, newer or a stump."""

    entry: Entry
    attempt: str
    folders: tuple[str, ...]
    lineage: str
    pinned: bool
    keeps_below: bool


class Retention:
    """Applies rules after commits. Each record is read once, and once more before it is removed."""

    def __init__(self, store: Store, rules: Sequence[KeepRule]) -> None:
        self._store = store
        self._rules = rules
        self._known: dict[int, _Known] = {}
        self._told: set[int] = set()

    def retain(self, *, committed: int, lineage: str) -> Retained:
        """Remove what no rule keeps.

        A checkpoint set aside as damaged takes nobody's place among the newest. `committed`, the step whose commit this
        follows, stays, and so does everything above it, where a run went on from an older step.
        """
        listed = survey(self._store)
        known = self._read(listed)
        own = {step for step, row in known.items() if row.lineage == lineage and step <= committed}
        marked = {step for step in own & listed.marks if self._is_marked(step, known[step])}
        good = own - marked
        outdated = {*doomed(good, self._rules), *set(doomed(own, self._rules)).intersection(marked)}
        floor = max((step for step, row in known.items() if row.keeps_below), default=-1)
        candidates = [
            step for step in sorted(outdated) if step > floor and step != committed and not known[step].pinned
        ]
        removed = []
        for step in candidates:
            kept = {folder for other, row in known.items() if other != step for folder in row.folders}
            if self._remove(step, lineage, kept, floor):
                removed.append(step)
                del known[step]
        foreign = sorted(
            step for step, row in known.items() if row.lineage not in ("", lineage) and step not in self._told
        )
        self._told.update(foreign)
        return Retained(tuple(removed), tuple(foreign))

    def _remove(self, step: int, lineage: str, kept: set[str], floor: int) -> bool:
        standing = judge(self._store, step)
        record = standing.record if standing is not None else None
        if standing is None or record is None or record.lineage != lineage or record.pinned:
            return False
        below = {folder for folder in record.folders if (keys.parse_folder(folder) or 0) <= floor}
        return remove_checkpoint(self._store, standing, kept=kept | below)

    def _read(self, listed: Listing) -> dict[int, _Known]:
        known = {step: row for step, row in self._known.copy().items() if listed.records.get(step) == row.entry}
        unread = [step for step in listed.records if step not in known]

        def read(step: int) -> None:
            standing = judge(self._store, step)
            if standing is not None:
                known[step] = self._facts(listed.records[step], standing)

        if unread:
            Crew(unread, lambda: read).run(min(len(unread), _READERS))
        self._known = known
        return dict(known)

    def _facts(self, entry: Entry, standing: Standing) -> _Known:
        record = standing.record
        whole = record is not None and not lacks_index(self._store, record)
        return _Known(
            entry=entry,
            attempt=standing.attempt,
            folders=standing.folders,
            lineage=record.lineage if record is not None and whole else "",
            pinned=standing.pinned,
            keeps_below=standing.keeps_below,
        )

    def _is_marked(self, step: int, row: _Known) -> bool:
        return is_set_aside(self._store, Standing(step, None, row.attempt))
