"""What the caller says about one save, beside the state; refused at once if no record could hold it."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.errors import CheckpointError
from asyncckpt.format import keys, limits
from asyncckpt.format.record import FileRef, Record, check_config
from asyncckpt.options import OnExists

_FIXED_BYTES = 16 * 2**10
_FIXED_VALUES = 1000
"""Of the fields that every record has: their text, and its commas and brackets, at most."""


@dataclass(frozen=True, slots=True)
class Config:
    """A run's `config`, found storable once. `text_bytes` and `values`: what it takes of every record."""

    value: Any
    text_bytes: int
    values: int

    @classmethod
    def of(cls, value: Any) -> "Config":
        """`ValueError` if it is no plain JSON, or too much of it for a record."""
        check_config(value)
        text = json.dumps({"config": value}, indent=1).encode("ascii")
        config = cls(value, len(text), text.count(b",") + text.count(b"[") + text.count(b"{"))
        if not config.leaves_room(0, 0):
            _read_back({}, (), config, f"config takes {len(text)} bytes of JSON")
        return config

    def leaves_room(self, text_bytes: int, values: int) -> bool:
        """Beside so much of everything else?"""
        fixed_bytes, fixed_values = self.text_bytes + _FIXED_BYTES, self.values + _FIXED_VALUES
        return text_bytes + fixed_bytes <= limits.RECORD_BYTES and values + fixed_values <= limits.RECORD_VALUES


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """`step`: optimizer steps completed. `metrics`: numbers by name, read now: one-element tensors may change later.

    `ValueError` or `TypeError` for anything else.
    """

    step: int
    metrics: Mapping[str, Any]
    epoch: int | None
    tags: Sequence[str]
    pinned: bool
    on_exists: OnExists
    config: Config

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step <= limits.STEP:
            raise ValueError(
                f"step is the number of optimizer steps completed, an int from 0 to 2**53, not {_short(self.step)}"
            )
        if self.epoch is not None and (type(self.epoch) is not int or not 0 <= self.epoch <= limits.SIZE):
            raise ValueError(f"epoch is an int from 0, not {_short(self.epoch)}; a fraction of an epoch is a metric")
        if not _is_texts(self.tags):
            raise TypeError(f"tags is a sequence of strings, not {_short(self.tags)}")
        if not isinstance(self.pinned, bool):
            raise TypeError(f"pin is True or False, not {_short(self.pinned)}")
        if not isinstance(self.metrics, Mapping) or not all(type(name) is str for name in self.metrics):
            raise TypeError(f"metrics is a dict of names to numbers, not {_short(self.metrics)}")
        object.__setattr__(self, "metrics", {name: _number(name, value) for name, value in self.metrics.items()})
        object.__setattr__(self, "tags", tuple(self.tags))
        self._check_size()

    def _check_size(self) -> None:
        """A bound first, which costs a microsecond: most saves have a few metrics."""
        texts = (*self.tags, *self.metrics)
        characters = sum(map(len, texts))  # each may be a comma, and takes 12 bytes at most
        for text in texts:
            if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
                raise ValueError(f"tags and names of metrics are text; {_short(text)} holds a lone surrogate")
        if not self.config.leaves_room(12 * characters + 64 * len(texts), characters + 2 * len(texts)):
            sizes = f"{len(self.metrics)} metrics, {len(self.tags)} tags of {sum(map(len, self.tags))} characters"
            sizes += f" and a config of {self.config.text_bytes} bytes"
            _read_back(self.metrics, tuple(self.tags), self.config, sizes)


def _is_texts(tags: Any) -> bool:
    """A generator is none: looking at it would use it up."""
    return isinstance(tags, Collection) and not isinstance(tags, str) and all(type(tag) is str for tag in tags)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"the metric {name!r} is too large for a float") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"the metric {name!r} is a number, not {_short(value)}") from error


def _short(value: Any) -> str:
    """A value for a message. Its own `repr` may be long, and raises for an int of more than 4300 digits, also deep inside."""
    try:
        return f"{type(value).__name__} {value!r:.80}"
    except Exception:  # noqa: BLE001 - whatever a foreign `repr` raises, the caller is told what is wrong with the value
        return f"an unprintable {type(value).__name__}"


def _read_back(metrics: Mapping[str, float], tags: tuple[str, ...], config: Config, sizes: str) -> None:
    """Ask the reader itself: `ValueError` if it would refuse a record of these, whose other fields take all that they may."""
    folder = keys.folder(limits.STEP, "0" * 100)
    files = [FileRef(folder + name, limits.SIZE, "0" * 64) for name in ("index.json.zst", "state.pt")]
    record = Record(
        step=limits.STEP,
        attempt="0" * 100,
        index=files[0],
        states=(files[1],),
        folders=(folder,),
        time=0.1,
        raw_bytes=limits.SIZE,
        stored_bytes=limits.SIZE,
        epoch=limits.SIZE,
        metrics=metrics,
        config=config.value,
        tags=tags,
        versions={"": "0" * 4096},
        world_size=limits.SIZE,
        lineage="0" * 8,
    )
    try:
        Record.parse(record.to_json(), keys.record_key(limits.STEP))
    except CheckpointError as error:
        raise ValueError(
            f"the record of this save could not be read back ({error.message}): {sizes}; at most {limits.RECORD_BYTES} bytes of JSON in all"
        ) from error
