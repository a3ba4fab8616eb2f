"""The record: the object whose existence makes a checkpoint exist. Small, JSON, read before anything else.

Its last line is the digest of all before it, so every reader of any version can tell damage from a newer format.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asyncckpt.errors import (
    CheckpointError,
    DigestMismatchError,
    FormatVersionError,
    RecordError,
    ResourceLimitError,
)
from asyncckpt.format import keys, limits, strict_json
from asyncckpt.format.digest import Buffer, from_hex, hexdigest

Parsed = TypeVar("Parsed")

KNOWN: frozenset[str] = frozenset()
"""What a record may require of its reader (`requires`) and this one knows."""

_ENDING = ',\n "digest": "%s"\n}\n'
ENDING_BYTES = len(_ENDING % ("0" * 64))
"""82: of the last line and the brace behind it."""
_LINEAGE = re.compile("[0-9a-f]{8}")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these


@dataclass(frozen=True, slots=True)
class FileRef:
    """An object that is read whole. `digest`: BLAKE3 of its stored bytes, 64 hex digits. `rank`: whose state it is, if one rank's."""

    key: str
    bytes: int
    digest: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Outline:
    """What a record of any version tells, so that retention of any version knows what it must leave alone."""

    format: int
    step: int
    attempt: str
    folders: tuple[str, ...]
    pinned: bool
    requires: tuple[str, ...]

    @property
    def newer(self) -> str:
        """Why this asyncckpt cannot read the checkpoint; empty if it can."""
        if self.format != strict_json.FORMAT:
            return f"it has format {self.format}, and this asyncckpt reads {strict_json.FORMAT}"
        unknown = sorted(set(self.requires) - KNOWN)
        return f"it requires {', '.join(map(repr, unknown))}, which this asyncckpt does not know" if unknown else ""

    @classmethod
    def parse(cls, data: bytes, key: str) -> "Outline":
        """Of the record found at `key`, whatever its version; damage raises as in `Record.parse`."""
        return _located(key, lambda: _outline(_fields(data), keys.parse_record_key(key)))


@dataclass(frozen=True, slots=True)
class Record:
    """One checkpoint. `time`: seconds since 1970; `folders`: every folder that is needed to restore it.

    `lineage`: 8 hex digits that a run inherits from the checkpoint it restored. `requires`: what a reader must know.
    """

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
    lineage: str = ""
    requires: tuple[str, ...] = ()
    format: int = strict_json.FORMAT

    def to_json(self) -> bytes:
        """The stored bytes. `ValueError` or `TypeError` if `config` is no JSON (see `check_config`)."""
        data = {
            "format": self.format,
            "requires": list(self.requires),
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "lineage": self.lineage,
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
        return sealed(json.dumps(data, indent=1, allow_nan=False).encode("ascii"))

    @classmethod
    def parse(cls, data: bytes, key: str) -> "Record":
        """Mirror of `to_json`, for the record found at `key`. Unknown fields are ignored.

        The digest decides: where it fails, or the text breaks a rule of the format, the record is damaged (a `CorruptCheckpointError` or
        an `UnsafeCheckpointError`); where it agrees and something is unknown or beyond a limit, the record is newer (`FormatVersionError`).
        """
        return _located(key, lambda: _parse(data, keys.parse_record_key(key)))


def sealed(text: bytes) -> bytes:
    """A record's JSON, which ends with a brace on a line of its own, with its digest as the last line."""
    body = text[: text.rindex(b"\n}")]
    return body + (_ENDING % hexdigest(body)).encode("ascii")


def is_sealed(body_digest: str, ending: Buffer) -> bool:
    """Whether the last `ENDING_BYTES` of a record are the digest of all before them."""
    return bytes(ending) == (_ENDING % body_digest).encode("latin-1")


def digest_in(ending: Buffer) -> str | None:
    """The digest that the last `ENDING_BYTES` of a record state; None if they have not the shape of an ending."""
    stated = bytes(ending)[-68:-4].decode("latin-1")
    return stated if is_sealed(stated, ending) else None


def check_config(config: Any) -> None:
    """`ValueError` unless `config` comes back from a record exactly: JSON types, finite, at most 32 levels deep."""
    try:
        text = json.dumps(config, allow_nan=False).encode("ascii")
        back = strict_json.parse(text, "config", max_values=limits.RECORD_VALUES)
        strict_json.check(back, "config", max_depth=limits.RECORD_DEPTH - 1, max_int=limits.CONFIG_INT)
    except (TypeError, ValueError, RecursionError, RecordError, ResourceLimitError) as error:
        raise ValueError(f"config must be plain JSON data: {error}") from error
    if back != config or len(text) > limits.RECORD_BYTES // 2:
        raise ValueError("config must be plain JSON data: string keys, lists for tuples, at most 32 MiB")


def _located(key: str, parse: Callable[[], Parsed]) -> Parsed:
    try:
        return parse()
    except ResourceLimitError as error:
        raise newer(error.message).at(key=error.key or key) from error
    except CheckpointError as error:
        raise error.at(key=key) from error.__cause__


def _fields(data: bytes) -> strict_json.Fields:
    """The fields of a record whose digest agrees."""
    body, ending = memoryview(data)[:-ENDING_BYTES], data[-ENDING_BYTES:]
    if not is_sealed(hexdigest(body), ending):
        if digest_in(ending) is None:
            raise RecordError("the record does not end with its digest: it is cut short, or no record")
        raise DigestMismatchError("the record's bytes differ from their digest")
    if len(data) > limits.RECORD_BYTES:
        raise ResourceLimitError(f"a record of {len(data)} bytes is above {limits.RECORD_BYTES}")
    value = strict_json.parse(data, "the record", max_values=limits.RECORD_VALUES)
    strict_json.check(value, "the record", max_depth=limits.RECORD_DEPTH, max_int=limits.CONFIG_INT)
    return strict_json.Fields(value, "the record")


def newer(reason: str) -> FormatVersionError:
    """The error for a checkpoint that is sound and beyond this asyncckpt."""
    return FormatVersionError(f"the checkpoint was written by a newer asyncckpt: {reason}. Upgrade asyncckpt")


def _outline(fields: strict_json.Fields, step_of_key: int | None) -> Outline:
    outline = Outline(
        format=fields.size("format"),
        step=fields.size("step"),
        attempt=fields.get("attempt", str),
        folders=fields.rows("folders", keys.check_folder),
        pinned=fields.get("pinned", bool),
        requires=fields.rows("requires", _text),
    )
    if step_of_key is not None and outline.step != step_of_key:
        raise RecordError(f"the record says step {outline.step} and its key step {step_of_key}")
    return outline


def _parse(data: bytes, step_of_key: int | None) -> Record:
    fields = _fields(data)
    outline = _outline(fields, step_of_key)
    if outline.newer:
        raise newer(outline.newer)
    time = fields.get("time", (int, float))
    record = Record(
        step=outline.step,
        attempt=outline.attempt,
        index=_ref(fields.get("index", dict)),
        states=fields.rows("states", _ref),
        folders=outline.folders,
        time=float(time),
        raw_bytes=fields.size("raw_bytes"),
        stored_bytes=fields.size("stored_bytes"),
        epoch=fields.size("epoch", default=None),
        metrics={name: _finite_or_not(name, number) for name, number in fields.get("metrics", dict).items()},
        config=fields.value("config"),
        tags=fields.rows("tags", _text),
        pinned=outline.pinned,
        versions={name: _text(version) for name, version in fields.get("versions", dict).items()},
        world_size=fields.size("world_size"),
        lineage=_lineage(fields.get("lineage", str)),
        requires=outline.requires,
    )
    for ref in (record.index, *record.states):
        if ref.key[: ref.key.rindex("/") + 1] not in record.folders:
            raise RecordError("the record names an object outside of its folders")
    return record


def _ref_to_json(ref: FileRef) -> dict[str, Any]:
    data: dict[str, Any] = {"key": ref.key, "bytes": ref.bytes, "digest": ref.digest}
    return data if ref.rank is None else data | {"rank": ref.rank}


def _ref(row: Any) -> FileRef:
    fields = strict_json.Fields(row, "an object's entry in the record")
    ref = FileRef(
        key=keys.check_object_key(fields.get("key", str)),
        bytes=fields.size("bytes"),
        digest=fields.get("digest", str),
        rank=fields.size("rank", default=None),
    )
    try:
        from_hex(ref.digest)
    except ValueError as error:
        raise RecordError("an object's digest is not 64 hex digits") from error
    return ref


def _lineage(value: str) -> str:
    if not _LINEAGE.fullmatch(value):
        raise RecordError("the record's lineage is not 8 hex digits")
    return value


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
