"""The record: the object whose existence makes a checkpoint exist. Small, JSON, read before anything else."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.errors import RecordError, ResourceLimitError, UnsafeCheckpointError
from asyncckpt.format import keys, strict_json
from asyncckpt.format.digest import from_hex

MAX_RECORD_BYTES = 64 * 2**20
MAX_DEPTH = 32
_MAX_VALUES = 2_000_000
_MAX_FREE_INT = 2**64  # in a user's config, e.g. a seed
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these


@dataclass(frozen=True, slots=True)
class FileRef:
    """An object that is read whole. `digest`: BLAKE3 of its stored bytes, 64 hex digits."""

    key: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Record:
    """One checkpoint. `time`: seconds since 1970; `folders`: every folder that its index refers to."""

    step: int
    attempt: str
    index: FileRef
    states: tuple[FileRef, ...]
    folders: tuple[str, ...]
    time: float
    raw_bytes: int
    stored_bytes: int
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Any = None
    tags: tuple[str, ...] = ()
    pinned: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1
    format: int = strict_json.FORMAT

    def to_json(self) -> bytes:
        """The stored bytes. `ValueError` or `TypeError` if `config` is no JSON (see `check_config`)."""
        data = {
            "format": self.format,
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "time": self.time,
            "metrics": {name: _number(value) for name, value in self.metrics.items()},
            "config": self.config,
            "tags": list(self.tags),
            "pinned": self.pinned,
            "versions": dict(self.versions),
            "world_size": self.world_size,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "index": _ref_to_json(self.index),
            "states": [_ref_to_json(ref) for ref in self.states],
            "folders": list(self.folders),
        }
        return json.dumps(data, indent=1, allow_nan=False).encode("ascii")

    @classmethod
    def parse(cls, data: bytes, key: str) -> "Record":
        """Mirror of `to_json`, for the record found at `key`. Unknown fields are ignored, an unknown version is not.

        `RecordError`, `ResourceLimitError` or `UnsafeCheckpointError`; never another error.
        """
        try:
            return _parse(data, keys.parse_record_key(key))
        except (RecordError, UnsafeCheckpointError) as error:
            raise error.at(key=key) from error.__cause__


def check_config(config: Any) -> None:
    """`ValueError` unless `config` comes back from a record exactly: JSON types, finite, at most 32 levels deep."""
    try:
        text = json.dumps(config, allow_nan=False).encode("ascii")
        back = strict_json.parse(text, "config", max_values=_MAX_VALUES)
        strict_json.check(back, "config", max_depth=MAX_DEPTH - 1, max_int=_MAX_FREE_INT)
    except (TypeError, ValueError, RecursionError, RecordError, ResourceLimitError) as error:
        raise ValueError(f"config must be plain JSON data: {error}") from error
    if back != config or len(text) > MAX_RECORD_BYTES // 2:
        raise ValueError("config must be plain JSON data: string keys, lists for tuples, at most 32 MiB")


def _parse(data: bytes, step_of_key: int | None) -> Record:
    if len(data) > MAX_RECORD_BYTES:
        raise ResourceLimitError(f"a record of {len(data)} bytes is above {MAX_RECORD_BYTES}")
    value = strict_json.parse(data, "the record", max_values=_MAX_VALUES)
    fields = strict_json.Fields(value, "the record")
    fields.check_version()
    strict_json.check(value, "the record", max_depth=MAX_DEPTH, max_int=_MAX_FREE_INT)
    time = fields.get("time", (int, float))
    record = Record(
        step=fields.size("step"),
        attempt=fields.get("attempt", str),
        index=_ref(fields.get("index", dict)),
        states=fields.rows("states", _ref),
        folders=fields.rows("folders", keys.check_folder),
        time=float(time),
        raw_bytes=fields.size("raw_bytes"),
        stored_bytes=fields.size("stored_bytes"),
        epoch=fields.size("epoch", default=None),
        metrics={name: _finite_or_not(name, number) for name, number in fields.get("metrics", dict).items()},
        config=value.get("config"),
        tags=fields.rows("tags", _text),
        pinned=fields.get("pinned", bool),
        versions={name: _text(version) for name, version in fields.get("versions", dict).items()},
        world_size=fields.size("world_size"),
    )
    if step_of_key is not None and record.step != step_of_key:
        raise RecordError(f"the record says step {record.step} and its key step {step_of_key}")
    for ref in (record.index, *record.states):
        if ref.key[: ref.key.rindex("/") + 1] not in record.folders:
            raise RecordError("the record names an object outside of its folders")
    return record


def _ref_to_json(ref: FileRef) -> dict[str, Any]:
    return {"key": ref.key, "bytes": ref.bytes, "digest": ref.digest}


def _ref(row: Any) -> FileRef:
    fields = strict_json.Fields(row, "an object's entry in the record")
    ref = FileRef(keys.check_object_key(fields.get("key", str)), fields.size("bytes"), fields.get("digest", str))
    try:
        from_hex(ref.digest)
    except ValueError as error:
        raise RecordError("an object's digest is not 64 hex digits") from error
    return ref


def _text(value: Any) -> str:
    if type(value) is not str:
        raise RecordError("a text of the record is none")
    return value


def _number(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _finite_or_not(name: str, value: Any) -> float:
    if type(value) is str and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise RecordError(f"metric {name[:100]!r} is no number")
    return float(value)
