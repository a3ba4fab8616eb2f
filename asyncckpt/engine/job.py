"""What flows through the engine: a job to the workers, receipts and an outcome back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from asyncckpt.options import KeepEvery, KeepLast, KeepRule, OnExists, StoredCodec


@dataclass(frozen=True, slots=True)
class SaveJob:
    """One save, as the workers need it: everything but the arena's bytes and the structure.

    `number`: of the save within its Saver. `attempt`: run id and sequence number; part of every object's name.
    `earlier_attempts`: attempts of the same save that a dead service may have committed without an answer.
    `lineage`: of the run, 8 hex digits.
    `probe`: this Saver has not yet seen that the store honours conditional puts. `newcomer`: nor that no other run's checkpoints stand above,
    nor above the step that it `restored`, if any.
    """

    number: int
    step: int
    attempt: str
    structure: int
    arena: int
    codec: StoredCodec
    time_s: float
    shard_bytes: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Any = None
    tags: tuple[str, ...] = ()
    pinned: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1
    lineage: str = "00000000"
    on_exists: OnExists = "skip"
    earlier_attempts: tuple[str, ...] = ()
    probe: bool = False
    newcomer: bool = False
    restored: int = -1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SaveJob":
        """Mirror of `to_json`."""
        return cls(**{**data, "tags": tuple(data["tags"]), "earlier_attempts": tuple(data["earlier_attempts"])})


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """One shard is in the store. `frames`: raw and stored bytes of each zstd frame, in order."""

    shard: int
    key: str
    raw_bytes: int
    stored_bytes: int
    frames: tuple[tuple[int, int], ...]
    encode_s: float
    upload_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ShardReceipt":
        """Mirror of `to_json`."""
        return cls(**{**data, "frames": tuple(tuple(row) for row in data["frames"])})


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """How a commit ended: the record exists (`committed`), or the step was there before (`exists`).

    `may_appear`: our record was sent without an answer, and may stand one day, when the other is gone: its folder must stay.
    """

    result: Literal["committed", "exists"]
    stored_bytes: int = 0
    encode_s: float = 0.0
    upload_s: float = 0.0
    commit_s: float = 0.0
    raw_bytes: int = 0
    retries: int = 0
    may_appear: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CommitOutcome":
        """Mirror of `to_json`."""
        return cls(**data)


def rules_to_json(rules: tuple[KeepRule, ...]) -> list[dict[str, int]]:
    """Retention rules as plain data."""
    return [{"last": rule.count} if isinstance(rule, KeepLast) else {"every": rule.steps} for rule in rules]


def rules_from_json(data: list[dict[str, int]]) -> tuple[KeepRule, ...]:
    """Mirror of `rules_to_json`."""
    return tuple(KeepLast(row["last"]) if "last" in row else KeepEvery(row["every"]) for row in data)
