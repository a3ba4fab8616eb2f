"""Which checkpoints stay.

A run counts and removes only checkpoints of its own lineage. Of these one stays if any rule keeps it, if it is pinned, or if it is the newest.
Newer formats and damaged checkpoints are neither counted nor removed, nor is what stands above the step that was just committed: that is
another branch, and to count it would cost this one its own. Whatever folder a record names that stays, stays.

What goes wrong at one step does not keep the others. A record that cannot be read may need whatever stands below it, so that stays too.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt import errors
from asyncckpt.checkpoints.removal import remove_checkpoint
from asyncckpt.checkpoints.standing import Listing, Standing, is_set_aside, judge, lacks_index, survey
from asyncckpt.engine.crew import Crew
from asyncckpt.format import keys
from asyncckpt.options import KeepLast, KeepRule
from asyncckpt.store.base import Entry, Store

_IN_A_ROW = 3  # refusals, after which the store is taken to refuse everything: the rest waits for the next run
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
class Lapse:
    """Steps that stay whatever the rules say, and the reason of the first of them."""

    steps: tuple[int, ...]
    error: errors.CheckpointError

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"steps": list(self.steps), "error": errors.to_json(self.error)}


@dataclass(frozen=True, slots=True)
class Retained:
    """What one run of retention did. `foreign`: steps of other lineages that it sees for the first time. `lapses`: what it could not do.

    A record that is damaged or newer is told when it is first seen, a failure every time.
    """

    removed: tuple[int, ...] = ()
    foreign: tuple[int, ...] = ()
    lapses: tuple[Lapse, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        lapses = [lapse.to_json() for lapse in self.lapses]
        return {"removed": list(self.removed), "foreign": list(self.foreign), "lapses": lapses}


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of a record for as long as its listing is the same. `lineage`: empty if it is damaged, newer or a stump: see `error`."""

    entry: Entry
    attempt: str
    folders: tuple[str, ...]
    lineage: str
    pinned: bool
    keeps_below: bool
    error: errors.CheckpointError | None


class _Troubles:
    """Errors at single steps, on the way of one run. `skipped`: steps that were not tried for their sake."""

    def __init__(self) -> None:
        self.at: dict[int, errors.CheckpointError] = {}
        self.skipped: list[int] = []
        self._in_a_row = 0

    def note(self, step: int, error: errors.CheckpointError) -> None:
        """One more went wrong."""
        self.at[step] = error
        self._in_a_row += 1

    def succeeded(self) -> None:
        """One went well: it is not the store that refuses everything."""
        self._in_a_row = 0

    @property
    def enough(self) -> bool:
        """Whether the next one would go wrong too: the store refuses all, or does not answer."""
        silent = any(isinstance(error, errors.DeadlineExceededError) for error in self.at.values())
        return silent or self._in_a_row >= _IN_A_ROW

    def lapses(self) -> list[Lapse]:
        """One for each kind of error."""
        found: dict[type[errors.CheckpointError], list[int]] = {}
        for step, error in self.at.items():
            found.setdefault(type(error), []).append(step)
        if self.at:
            found[type(list(self.at.values())[-1])] += self.skipped
        return [Lapse(tuple(sorted(steps)), self.at[steps[0]]) for steps in found.values()]


class Retention:
    """Applies rules after commits. Each record is read once, and once more before it is removed."""

    def __init__(self, store: Store, rules: Sequence[KeepRule]) -> None:
        self._store = store
        self._rules = rules
        self._known: dict[int, _Known] = {}
        self._told: set[int] = set()
        self._failed: set[int] = set()

    def retain(self, *, committed: int, lineage: str) -> Retained:
        """Remove what no rule keeps.

        A checkpoint set aside as damaged takes nobody's place among the newest. `committed`, the step whose commit this
        follows, stays, and so does everything above it, where a run went on from an older step.
        """
        listed = survey(self._store)
        unread = _Troubles()
        known = self._read(listed, unread)
        own = {step for step, row in known.items() if row.lineage == lineage and step <= committed}
        marked = self._marked(own & listed.marks, known, unread)
        own -= unread.at.keys()
        good = own - marked
        outdated = {*doomed(good, self._rules), *set(doomed(own, self._rules)).intersection(marked)}
        floor = max((step for step, row in known.items() if row.keeps_below), default=-1)
        floor = max(floor, *unread.at, *unread.skipped, -1)
        candidates = [step for step in outdated if step > floor and step != committed and not known[step].pinned]
        removed, lapses = self._remove_all(candidates, known, lineage, floor)
        foreign = self._news(step for step, row in known.items() if row.lineage not in ("", lineage))
        left = [Lapse((step,), error) for step, row in known.items() if (error := row.error) and self._news([step])]
        return Retained(tuple(removed), foreign, (*lapses, *unread.lapses(), *left))

    def _marked(self, steps: set[int], known: Mapping[int, _Known], unread: _Troubles) -> set[int]:
        """Those that are set aside as damaged. Where nobody can tell, the step is trouble: counted it could cost a good one its place."""
        marked = set()
        for step in sorted(steps):
            try:
                if self._is_marked(step, known[step]):
                    marked.add(step)
            except errors.CheckpointError as error:
                unread.note(step, error)
        return marked

    def _remove_all(
        self, candidates: Iterable[int], known: dict[int, _Known], lineage: str, floor: int
    ) -> tuple[list[int], list[Lapse]]:
        """The steps that went, oldest first. What could not be removed before is tried last: a few that are locked must not keep the others."""
        removed: list[int] = []
        troubles = _Troubles()
        todo = deque(sorted(candidates, key=lambda step: (step in self._failed, step)))
        while todo and not troubles.enough:
            step = todo.popleft()
            kept = {folder for other, row in known.items() if other != step for folder in row.folders}
            try:
                if self._remove(step, lineage, kept, floor):
                    removed.append(step)
                    del known[step]
                troubles.succeeded()
            except errors.CheckpointError as error:
                troubles.note(step, error)
        troubles.skipped += todo
        self._failed = {*self._failed.intersection(todo), *troubles.at}
        return sorted(removed), troubles.lapses()

    def _news(self, steps: Iterable[int]) -> tuple[int, ...]:
        """Those that were not told before, and are now."""
        news = tuple(sorted(step for step in steps if step not in self._told))
        self._told.update(news)
        return news

    def _remove(self, step: int, lineage: str, kept: set[str], floor: int) -> bool:
        standing = judge(self._store, step)
        if standing is None:
            return False
        record = standing.record
        if record is None:
            assert standing.error is not None
            raise standing.error
        if record.lineage != lineage or record.pinned:
            return False
        below = {folder for folder in record.folders if (keys.parse_folder(folder) or 0) <= floor}
        return remove_checkpoint(self._store, standing, kept=kept | below)

    def _read(self, listed: Listing, unread: _Troubles) -> dict[int, _Known]:
        """What every record says; the newest are read first, since what stands below one that cannot be read stays anyway."""
        known = {step: row for step, row in self._known.copy().items() if listed.records.get(step) == row.entry}
        todo = sorted((step for step in listed.records if step not in known), reverse=True)

        def read(step: int) -> None:
            if unread.enough:
                unread.skipped.append(step)
                return
            try:
                standing = judge(self._store, step)
                if standing is not None:
                    known[step] = self._facts(listed.records[step], standing)
            except errors.CheckpointError as error:
                unread.note(step, error)

        if todo:
            Crew(todo, lambda: read).run(min(len(todo), _READERS))
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
            error=standing.error,
        )

    def _is_marked(self, step: int, row: _Known) -> bool:
        return is_set_aside(self._store, Standing(step, None, row.attempt))
