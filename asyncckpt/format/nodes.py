"""The tree of an index: which nodes there are. What they mean to Python is known further up."""

import re
from collections.abc import Collection
from typing import Any

from asyncckpt.errors import RecordError, ResourceLimitError
from asyncckpt.format import keys, limits
from asyncckpt.format.record import newer

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

_UNUSUAL = re.compile("[^\\x00-\\x7f]|[%/@#]|^__metadata__$")


def check(tree: Any) -> Any:
    """Return the tree; `FormatVersionError` for a node that is not known here, `RecordError` for what no version means."""
    todo = [(tree, 0)]
    while todo:
        node, depth = todo.pop()
        if type(node) is str:
            if node not in LEAVES:
                raise newer(f"its tree has a leaf {node[:40]!r}")
            continue
        if depth + 2 > limits.TREE_DEPTH:
            raise ResourceLimitError(f"the tree is nested more than {limits.TREE_DEPTH} levels deep")
        todo += [(child, depth + 2) for child in _children(node) if type(child) is not str or child not in LEAVES]
    return tree


def _children(node: Any) -> Collection[Any]:
    if type(node) is not dict or len(node) != 1:
        raise RecordError("a node of the tree is neither a leaf nor one container")
    kind, inner = next(iter(node.items()))
    if kind not in MAPPINGS | SEQUENCES | {"scalar"}:
        raise newer(f"its tree has a node {kind[:40]!r}")
    if kind in MAPPINGS and isinstance(inner, dict):
        for name in filter(_UNUSUAL.search, inner):
            _check_key(name)
        return inner.values()
    if kind in SEQUENCES and isinstance(inner, list):
        return inner
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
