"""What a reader will not take is refused before anything starts: the limits are `format.limits`, which both ask.

Structures are checked when they are made. Values are bounded at every save, which costs a microsecond; only a state file that may be near its
limit is written ahead, to know.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from asyncckpt.errors import UnsupportedObjectError, UnsupportedTensorError
from asyncckpt.format import limits
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import compress
from asyncckpt.format.index_rows import hollow_bytes
from asyncckpt.format.structure import Structure

_ROW_BYTES = 400  # of a tensor's row in the index, but for its name: shape, chunk, digest
_FRAME = 64  # bytes of a value's own opcodes in a pickle; a number or a dtype is no more
_INT_BYTES = 300  # the longest integer that is stored


def check_structure(structure: Structure) -> None:
    """`UnsupportedObjectError` or `UnsupportedTensorError`, with a path, if no reader would take its index."""
    count = len(structure.tensors) + len(structure.aliases)
    if count > limits.TENSORS:
        path = structure.path(min(limits.TENSORS, len(structure.tensors) - 1))
        reason = f"the state holds {count} tensors; a checkpoint has at most {limits.TENSORS}. Join small ones with torch.stack or torch.cat"
        raise UnsupportedObjectError(reason, key=path)
    for at, spec in enumerate(structure.tensors):
        if max(spec.shape, default=0) > limits.SIZE or len(spec.shape) > limits.RANK:
            reason = (
                f"{structure.path(at)!r}: shape {spec.shape} has more than {limits.RANK} dimensions, or one above 2^53"
            )
            raise UnsupportedTensorError(reason, key=structure.path(at))
        if 0 in spec.shape and hollow_bytes(spec.shape, DTYPES[spec.dtype].element_bytes) > limits.HOLLOW_BYTES:
            reason = f"{structure.path(at)!r}: shape {spec.shape} has no elements, and strides that no reader can hold"
            raise UnsupportedTensorError(reason, key=structure.path(at))
    _check_index(structure, count)


def _check_index(structure: Structure, count: int) -> None:
    names = list(structure.parameters.values())
    text = json.dumps([structure.tree, [spec.name for spec in structure.tensors], structure.aliases, names]).encode()
    size = len(text) + _ROW_BYTES * count
    if size <= limits.INDEX_BASE_BYTES:
        return
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    stored_bytes = len(compress(text)) if len(text) > 2 * _ROW_BYTES * count else size
    if (
        size > limits.INDEX_BYTES
        or values + 20 * count > 40 * limits.TENSORS
        or len(text) > limits.INDEX_BASE_BYTES + limits.INDEX_RATIO * stored_bytes
    ):
        paths = [structure.path(at) for at in range(len(structure.tensors))]
        longest = max([*paths, *_keys(structure.tree)], key=len, default="")
        raise UnsupportedObjectError(
            f"the names of the state are too long to be read back: {size} bytes of them, the longest has {len(longest)} characters "
            f"({longest[:80]!r}...). Use short keys, and a list or a tensor for many values",
            key=longest[:200],
        )


def _keys(tree: Any) -> list[str]:
    todo: list[Any] = [tree]
    found: list[str] = []
    while todo:
        node = todo.pop()
        for inner in node.values() if isinstance(node, dict) else ():
            if isinstance(inner, dict):
                found += inner
                todo += inner.values()
            elif isinstance(inner, list):
                todo += inner
    return found


def check_values(
    paths: Sequence[str], values: Sequence[Any], bound: int, write: Callable[[Mapping[str, Any]], bytes]
) -> None:
    """`UnsupportedObjectError` if the state file would be above its limit. `bound`: bytes of all paths, and of all text in sequences, at most."""
    bound += _FRAME * len(values) + 2**16
    for value in values:
        kind = type(value)
        if kind is str or kind is bytes:
            bound += 4 * len(value)
        elif kind is list or kind is tuple or kind is set:
            bound += _INT_BYTES * len(value)
    if bound <= limits.STATE_BYTES or sum(map(_size, values)) + sum(map(_size, paths)) + 2**16 <= limits.STATE_BYTES:
        return
    size = len(write(dict(zip(paths, values, strict=True))))
    if size > limits.STATE_BYTES:
        largest = max(range(len(values)), key=lambda at: _size(values[at]))
        raise UnsupportedObjectError(
            f"the values that are no tensors take {size} bytes, above the limit of {limits.STATE_BYTES}; the largest is {paths[largest]!r}: "
            "store numbers as a tensor or a NumPy array, and long bytes as a value of their own",
            key=paths[largest],
        )


def _long(values: Collection[Any]) -> int:
    """Bytes of a long sequence of scalars, at most; 9 for the usual numbers."""
    kinds = set(map(type, values))
    if kinds <= {float, bool, type(None)}:
        return 9 * len(values)
    if kinds == {int}:
        longest: int = max(max(values).bit_length(), min(values).bit_length())
        return len(values) * (9 + longest // 8)
    return sum(map(_size, values))


def _size(value: Any) -> int:
    kind = type(value)
    if kind is str or kind is bytes:
        return _FRAME + 4 * len(value)
    if kind is list or kind is tuple or kind is set:
        return _FRAME + (_long(value) if value else 0)
    return _INT_BYTES if kind is int else _FRAME
