"""One save as the trainer's side of the engine knows it, from its announcement to its answer; and who hears that."""

from dataclasses import dataclass
from typing import Protocol

from asyncckpt import events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import CommitOutcome, SaveJob
from asyncckpt.format.plan import Structure
from asyncckpt.options import RetryPolicy

_PARTING_S, _HURRY_S = 60.0, 1.0


@dataclass(slots=True)
class Submitted:
    """`state`: the packed values, None while the snapshot is being taken; `told`: the service of today knows the save.

    `withdrawn`: why its snapshot failed. `answer`: one that came while the arena was still being written, and has to wait.
    """

    job: SaveJob
    shards: int
    structure: Structure
    arena: Arena
    state: bytes | None = None
    told: bool = False
    withdrawn: BaseException | None = None
    answer: tuple[CommitOutcome | None, BaseException | None] | None = None

    @property
    def copying(self) -> bool:
        """Whether the trainer still writes into the arena."""
        return self.state is None and self.withdrawn is None


def parting_s(retry: RetryPolicy, *, store_fails: bool) -> float:
    """How long `close()` waits for what follows the answers of all saves, which the engine can also do alone."""
    return _HURRY_S if store_fails else min(_PARTING_S, retry.deadline_s + _HURRY_S)


class Listener(Protocol):
    """Hears what became of the saves, on the engine's thread."""

    def ended(self, number: int, outcome: CommitOutcome | None, error: BaseException | None) -> None:
        """A save has its answer."""

    def event(self, event: events.Event) -> None:
        """Something worth knowing happened."""
