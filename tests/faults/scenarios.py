"""What the lives of a run do. Faults meet the acts alone; what stands before them and behind them is undisturbed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from asyncckpt import KeepLast
from asyncckpt.format import keys
from asyncckpt.options import KeepRule
from asyncckpt.store.base import Store
from tests.faults.lives import Life

Act = Callable[[Life], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`before` is a life without faults, `ruin` then damages what it stored; every act is a life with faults.

    `contested`: the steps that the acts save, which a clean life tries to save again afterwards. `keep_last`: retention.
    """

    name: str
    before: Act
    acts: tuple[Act, ...]
    contested: tuple[int, ...]
    ruin: Callable[[Store], int] | None = None
    keep_last: int = 0

    @property
    def keep(self) -> tuple[KeepRule, ...]:
        return (KeepLast(self.keep_last),) if self.keep_last else ()


def saving(*steps: int, keep_last: int = 0) -> Act:
    """A trainer restores what is there and saves these steps."""

    def act(life: Life) -> None:
        with life.saver((KeepLast(keep_last),) if keep_last else ()) as saver:
            life.restore(saver)
            for step in steps:
                life.save(saver, step)

    return act


def resuming(count: int, keep_last: int = 0) -> Act:
    """A trainer restores what is there and saves as many steps behind it."""

    def act(life: Life) -> None:
        with life.saver((KeepLast(keep_last),) if keep_last else ()) as saver:
            restored = life.restore(saver)
            for step in range(restored + 1, restored + 1 + count):
                life.save(saver, step)

    return act


def rewinding(to: int, *steps: int) -> Act:
    """Newer steps are taken away and saved anew."""

    def act(life: Life) -> None:
        life.rewind(to)
        saving(*steps)(life)

    return act


def racing(step: int) -> Act:
    """Two trainers that do not know of each other save the same step."""

    def act(life: Life) -> None:
        with life.saver() as one, life.saver() as other:
            for saver in (one, other):
                life.restore(saver)
            threads = [
                threading.Thread(target=life.save, args=(saver, step), kwargs={"writer": number})
                for number, saver in enumerate((one, other))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return act


def clean(scenario: Scenario, stumps: set[int], *, rewind_to: int | None) -> Act:
    """The life behind all faults: it finishes a rewind, saves every contested step and every record without objects, and two new steps."""

    def act(life: Life) -> None:
        if rewind_to is not None:
            life.rewind(rewind_to)
        with life.saver(scenario.keep) as saver:
            restored = life.restore(saver)
            for step in sorted({*scenario.contested, *stumps}):
                life.save(saver, step)
            top = max(restored, *scenario.contested, 0)
            life.save(saver, top + 1)
            life.save(saver, top + 2)
        with life.saver() as saver:
            life.restore(saver)

    return act


def _flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key, max_bytes=2**30))
    data[len(data) // 2] ^= 1
    store.put(key, [bytes(data)])


def ruined_shard(store: Store) -> int:
    key = next(entry.key for entry in store.list("step-0000000002/") if entry.key.endswith(".safetensors"))
    _flip(store, key)
    return 2


def ruined_record(store: Store) -> int:
    _flip(store, keys.record_key(2))
    return 2


def emptied_folder(store: Store) -> int:
    store.delete([entry.key for entry in store.list("step-0000000002/")])
    return 2


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("save", saving(1), (saving(2, 3),), (2, 3)),
        Scenario("retention", saving(1, 2, keep_last=2), (saving(3, 4, keep_last=2),), (3, 4), keep_last=2),
        Scenario("rewind", saving(1, 2, 3), (rewinding(1, 2, 3),), (2, 3)),
        Scenario("replace", saving(1, 2), (saving(2, 3),), (2, 3), ruin=ruined_shard),
        Scenario("replace-record", saving(1, 2), (saving(2), saving(2, 3)), (2, 3), ruin=ruined_record),
        Scenario("replace-stump", saving(1, 2), (saving(2, 3),), (2, 3), ruin=emptied_folder),
        Scenario("resume", saving(1), (resuming(2), resuming(2)), (2, 3, 4, 5)),
        Scenario("resume-retention", saving(1), (resuming(3, 2), resuming(2, 2)), (), keep_last=2),
        Scenario("race", saving(1), (racing(2),), (2,)),
        Scenario("race-replace", saving(1, 2), (racing(2),), (2,), ruin=ruined_record),
    )
}
