"""JSON from a store: bounded before it is parsed, strict while it is, checked field by field afterwards."""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from asyncckpt.errors import CorruptCheckpointError, RecordError, ResourceLimitError
from asyncckpt.format import limits

FORMAT = 1
"""The version of the format, in every record and index."""


class _RefusedError(ValueError):
    pass


def parse(data: bytes, what: str, *, max_values: int, error: type[CorruptCheckpointError] = RecordError) -> Any:
    """The value of UTF-8 JSON without duplicate keys, NaN and infinities.

    Raises `error`, or `ResourceLimitError` for more than about `max_values` values: `[],[],[]` needs 20 times its length.
    """
    check_count(data, what, max_values)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError as cause:
        raise ResourceLimitError(f"{what} is nested too deep") from cause
    except ValueError as cause:
        if type(cause) is ValueError:  # of an integer with more digits than Python takes
            raise ResourceLimitError(f"{what} holds a number too long: {cause}") from cause
        reason = str(cause)[:200] if isinstance(cause, _RefusedError | json.JSONDecodeError) else type(cause).__name__
        raise error(f"{what} is not valid: {reason}") from cause


def check_count(data: bytes, what: str, max_values: int) -> None:
    """`ResourceLimitError` for a text of more than about `max_values` values: commas and opening brackets are counted."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_values:
        raise ResourceLimitError(f"{what} holds more than {max_values} values")


def check(value: Any, what: str, *, max_depth: int, max_int: int = limits.SIZE) -> Any:
    """Return `value`; refuse more levels than `max_depth` and integers beyond `max_int`."""
    todo = [(value, 1)]
    while todo:
        value_here, depth = todo.pop()
        if depth > max_depth + 1:
            raise ResourceLimitError(f"{what} is nested more than {max_depth} levels deep")
        if type(value_here) is dict:
            todo += [(child, depth + 1) for child in value_here.values()]
        elif type(value_here) is list:
            todo += [(child, depth + 1) for child in value_here]
        elif type(value_here) is int and abs(value_here) > max_int:
            raise ResourceLimitError(f"{what} holds an integer beyond {max_int}")
    return value


class Fields:
    """The fields of one JSON object, each asked for by type. `RecordError` names what is missing or wrong."""

    def __init__(self, data: Any, what: str) -> None:
        if type(data) is not dict:
            raise RecordError(f"{what} is no JSON object")
        self._data = data
        self._what = what

    def get(self, name: str, kind: type | tuple[type, ...], *, default: Any = ...) -> Any:
        """The field, of exactly this type; True is no integer."""
        value = self._data.get(name, default)
        if value is ...:
            raise RecordError(f"{self._what} lacks {name!r}")
        if value is default:
            return value
        if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise RecordError(f"{self._what}: {name!r} has the wrong type {type(value).__name__}")
        return value

    def value(self, name: str) -> Any:
        """The field, whatever it is; None where there is none."""
        return self._data.get(name)

    def size(self, name: str, *, default: Any = ...) -> Any:
        """A whole number from 0 on; `ResourceLimitError` above 2^53."""
        value = self.get(name, int, default=default)
        if value is not default and value < 0:
            raise RecordError(f"{self._what}: {name!r} is {value}")
        if value is not default and value > limits.SIZE:
            raise ResourceLimitError(f"{self._what}: {name!r} is above 2^53")
        return value

    def rows(self, name: str, read: Callable[[Any], Any]) -> tuple[Any, ...]:
        """A list, every element read by `read`."""
        return tuple(map(read, self.get(name, list)))


def is_size(value: Any) -> bool:
    """Whether this is a whole number from 0 to 2^53."""
    return type(value) is int and 0 <= value <= limits.SIZE


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RefusedError("a key stands twice")
    return found


def _constant(text: str) -> NoReturn:
    raise _RefusedError(f"{text} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError("a number too large")
    return value
