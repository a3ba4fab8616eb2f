"""The tree of an index: which nodes there are. What they mean to Python is known further up."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from asyncckpt.errors import RecordError, ResourceLimitError
from asyncckpt.format import keys, limits
from asyncckpt.format.record import newer
from asyncckpt.format.stored import IndexedTensor

LEAVES = frozenset({"tensor", "ndarray", "bytes", "value"})
MAPPINGS = frozenset({"dict", "OrderedDict", "Counter"})
SEQUENCES = frozenset({"list", "tuple"})
SCALARS = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)
"""NumPy's names."""

_ANY = LEAVES - {"ndarray", "bytes"}
_UNUSUAL = re.compile("[^\\x00-\\x7f]|[%/@#]|^__metadata__$")


def check(tree: Any, tensors: Mapping[str, IndexedTensor], aliases: Mapping[str, str]) -> Any:
    """Return the tree; `FormatVersionError` for a node that is not known here, `RecordError` for what no version means."""
    todo: list[tuple[Any, int, tuple[Any, Any] | None]] = [(tree, 0, None)]
    while todo:
        node, depth, place = todo.pop()
        if type(node) is str:
            if node not in LEAVES:
                raise newer(f"its tree has a leaf {node[:40]!r}")
            path = _path(place)
            if tensor := tensors.get(aliases.get(path, path)):  # one that is missing is told by whoever asks for it
                _check_leaf(node, path, tensor)
            continue
        if depth + 2 > limits.TREE_DEPTH:
            raise ResourceLimitError(f"the tree is nested more than {limits.TREE_DEPTH} levels deep")
        todo += [
            (child, depth + 2, (place, name))
            for name, child in _children(node)
            if type(child) is not str or child not in _ANY
        ]
    return tree


def _path(place: tuple[Any, Any] | None) -> str:
    """Where a leaf stands: every place names the one above it."""
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(name if type(name) is str else keys.escape(name))
    return "/".join(reversed(names))


def _check_leaf(leaf: str, path: str, tensor: IndexedTensor) -> None:
    """Not every tensor can be a NumPy array, or `bytes`."""
    if leaf == "ndarray" and tensor.dtype not in SCALARS:
        raise RecordError(f"the tree has an array of {tensor.dtype}, a type that NumPy lacks", key=path)
    if leaf == "bytes" and (tensor.dtype != "uint8" or len(tensor.shape) != 1):
        raise RecordError("the tree describes as bytes what is another tensor", key=path)


def _children(node: Any) -> Collection[tuple[Any, Any]]:
    if type(node) is not dict or len(node) != 1:
        raise RecordError("a node of the tree is neither a leaf nor one container")
    kind, inner = next(iter(node.items()))
    if kind not in MAPPINGS | SEQUENCES | {"scalar"}:
        raise newer(f"its tree has a node {kind[:40]!r}")
    if kind in MAPPINGS and isinstance(inner, dict):
        for name in filter(_UNUSUAL.search, inner):
            _check_key(name)
        return inner.items()
    if kind in SEQUENCES and isinstance(inner, list):
        return list(enumerate(inner))
    if kind == "scalar" and isinstance(inner, str):
        if inner not in SCALARS:
            raise newer(f"its tree has a scalar {inner[:40]!r}")
        return ()
    raise RecordError(f"a {kind} of the tree holds a {type(inner).__name__}")


def _check_key(name: str) -> None:
    try:
        keys.unescape(name)
    except ValueError as error:
        raise RecordError(f"the tree has an entry {name[:100]!r} that no key escapes to") from error
