"""What must hold after every run, by what the lives told and what the store holds.

`lost`: a step that was acknowledged does not restore as it was, or `latest` went back. `wrong`: something restores that nobody saved,
a committed record changed, or a sound checkpoint was set aside. `blocked`: a clean life cannot save a step, nor find it
sound; or something hangs. `left`: behind a fault that retries must hide, something was left behind. `untyped`: a failure
reached the caller as an error that is none of ours.
"""

import json
import warnings
from collections import defaultdict
from typing import Any

import asyncckpt
from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, MissingShardError, ObjectNotFoundError
from asyncckpt.format import keys
from asyncckpt.store.base import Store
from tests.faults.lives import content_of

KINDS = ("lost", "wrong", "blocked", "left", "untyped")


class Ledger:
    """Remembers what was told, and judges. `url`, `store`: where to look, past all faults."""

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self.store = store
        self.violations: list[tuple[str, str]] = []
        self.stumps: set[int] = set()
        self.rewinding: int | None = None
        self.clean = False
        self._attempted: dict[int, set[int]] = defaultdict(set)
        self._acknowledged: dict[int, int] = {}
        self._records: dict[str, bytes] = {}
        self._ruined: dict[int, bytes] = {}
        self.failures: list[str] = []

    def violated(self, kind: str, text: str) -> None:
        self.violations.append((kind, text))

    # -- hearing

    def hear(self, fact: dict[str, Any]) -> None:
        """One thing that a life told."""
        name, value = next(iter(fact.items()))
        heard = getattr(self, f"_hear_{name}", None)
        if heard:
            heard(value, fact)

    def _hear_saving(self, step: int, fact: dict[str, Any]) -> None:
        self._attempted[step].add(fact["content"])

    def _hear_committed(self, step: int, fact: dict[str, Any]) -> None:
        known = self._acknowledged.get(step)
        if known not in (None, fact["content"]):
            self.violated("lost", f"step {step} was acknowledged twice: {known} and {fact['content']}")
        self._acknowledged[step] = fact["content"]

    def _hear_failed(self, step: int, fact: dict[str, Any]) -> None:
        self.failures.append(fact["error"])
        if self.clean:
            self.violated("blocked", f"a clean save of step {step}: {fact['error']}")

    def _hear_ended(self, error: str, _: dict[str, Any]) -> None:
        self.failures.append(error)
        if self.clean:
            self.violated("blocked", f"a clean life ended: {error}")

    def _hear_untyped(self, error: str, _: dict[str, Any]) -> None:
        self.violated("untyped", f"an error of no kind of ours: {error}")

    def _hear_hung(self, what: str, _: dict[str, Any]) -> None:
        self.violated("blocked", f"it hangs: {what}")

    def _hear_left(self, what: str, _: dict[str, Any]) -> None:
        self.violated("left", what)

    def _hear_restored(self, step: int, fact: dict[str, Any]) -> None:
        newest = max(self._acknowledged, default=0)
        if step < newest:
            self.violated("lost", f"step {newest} was acknowledged, and {step} was restored as the newest")
        elif step and fact["content"] not in self._attempted[step]:
            self.violated("wrong", f"step {step} was restored as {fact['content']}; saved: {self._attempted[step]}")

    def _hear_rewinding(self, to: int, _: dict[str, Any]) -> None:
        self.rewinding = to
        for step in [step for step in self._acknowledged if step > to]:
            del self._acknowledged[step]

    def _hear_rewound(self, _: int, __: dict[str, Any]) -> None:
        self.rewinding = None

    def ruined(self, step: int) -> None:
        """The harness itself damaged this step: nobody need find it any more."""
        self._acknowledged.pop(step, None)
        self._ruined[step] = self._get(keys.record_key(step)) or b""

    # -- judging

    def judge(self, keep_last: int = 0) -> None:
        """Hold the store against what was acknowledged. `keep_last`: what retention was asked for."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._judge(keep_last)

    def _judge(self, keep_last: int) -> None:
        present = sorted(filter(None, map(keys.parse_record_key, (e.key for e in self.store.list(delimiter=True)))))
        sound: dict[int, int | None] = {}
        self.stumps = set()
        for step in present:
            record = self._get(keys.record_key(step)) or b""
            if record == self._ruined.get(step):
                continue
            self._check_unchanged(step, record)
            self._load(step, sound)
        newer = 0
        for step in sorted(set(self._attempted) | set(sound), reverse=True):
            if step in sound:
                newer += 1
            elif step in self._acknowledged and keep_last and newer >= keep_last:
                del self._acknowledged[step]  # retention took it; whoever saves it again is the first
                newer += 1
            elif step in self._acknowledged:
                self.violated("lost", f"step {step} was acknowledged and is not there, or does not load")
            expected = self._acknowledged.get(step)
            if expected is not None and step in sound and sound[step] != expected:
                self.violated("lost", f"step {step} was acknowledged as {expected} and is {sound[step]}")
        if self.clean and keep_last and len(sound) > keep_last:
            self.violated("blocked", f"retention leaves steps {sorted(sound)} where {keep_last} are to be kept")

    def _load(self, step: int, sound: dict[int, int | None]) -> None:
        try:
            found = content_of(asyncckpt.load(self.url, step=step, store=self.store))
        except MissingShardError as error:
            self.stumps.add(step)
            if self.clean:
                self.violated("blocked", f"step {step} is a record without its objects at the end: {error}")
        except CheckpointNotFoundError:
            pass
        except CheckpointError as error:
            self.violated("wrong", f"step {step} is there and broken: {type(error).__name__}: {error}")
        else:
            sound[step] = found
            if found not in self._attempted[step]:
                self.violated("wrong", f"step {step} is {found}, which nobody saved")
            mark = self._get(keys.damaged_key(step))
            attempt = json.loads(self._get(keys.record_key(step)) or b"{}").get("attempt", "")
            if mark and mark.split(b"\n")[0] == attempt.encode():
                self.violated("wrong", f"step {step} is sound and was set aside")

    def _check_unchanged(self, step: int, record: bytes) -> None:
        try:
            attempt = json.loads(record)["attempt"]
        except ValueError:
            self.violated("wrong", f"the record of step {step} is no JSON")
            return
        if self._records.setdefault(attempt, record) != record:
            self.violated("wrong", f"the record of step {step} changed")

    def objects(self) -> set[str]:
        """Every key below a folder."""
        return {entry.key for entry in self.store.list() if "/" in entry.key}

    def nothing_left(self, before: set[str]) -> None:
        """No object stands outside the folders that records name, but for those that stood there `before`."""
        named = {
            folder
            for entry in self.store.list(delimiter=True)
            if keys.parse_record_key(entry.key) is not None
            for folder in json.loads(self._get(entry.key) or b"{}").get("folders", ())
        }
        left = [key for key in sorted(self.objects() - before) if not any(map(key.startswith, named))]
        if left:
            self.violated("left", f"objects that no record names: {left[:3]} ({len(left)})")

    def _get(self, key: str) -> bytes | None:
        try:
            return self.store.get(key, max_bytes=2**26)
        except ObjectNotFoundError:
            return None
