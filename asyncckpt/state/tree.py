"""A training state as a tree: its tensors, its plain values, and a description of the containers; and back."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import CorruptCheckpointError, UnsupportedObjectError, UnsupportedTensorError
from asyncckpt.format import keys, limits
from asyncckpt.format.plan import Group, Structure, TensorSpec
from asyncckpt.state.binding import Binding, Positions, bind
from asyncckpt.state.bounds import check_structure, check_values
from asyncckpt.state.dtypes import NAMES, complaint
from asyncckpt.state.packing import Seen, Segment
from asyncckpt.state.sight import Makeup, Sight
from asyncckpt.state.statefile import write_state
from asyncckpt.state.walk import (
    BYTES,
    KIND_NAMES,
    LEAVES,
    MAPPINGS,
    NUMPY_KINDS,
    NUMPY_SCALARS,
    OPTIMIZER,
    SEQUENCES,
    VALUE,
    Refusal,
    Walk,
)


class Description:
    """What a list of tokens means: the JSON `tree`, the paths of all tensor leaves, values and optimizers, in walking order."""

    def __init__(self, tokens: list[Any]) -> None:
        self.tensors: list[tuple[str | int, str]] = []
        """Top-level key and full path."""
        self.values: list[str] = []
        self.optimizers: list[str] = []
        self._tokens = iter(_spread(tokens))
        self._top: str | int = ""
        self.tree = self._node("", depth=0)
        self.path_bytes = 4 * sum(map(len, self.values))

    def _node(self, path: str, *, depth: int) -> Any:
        token = next(self._tokens)
        if token is OPTIMIZER:
            self.optimizers.append(path)
            token = next(self._tokens)
        if token is torch.Tensor or token is np.ndarray or token is bytes:
            self.tensors.append((self._top, path))
            return "tensor" if token is torch.Tensor else "ndarray" if token is np.ndarray else BYTES
        if token is VALUE:
            self.values.append(path)
            return VALUE
        if token in NUMPY_KINDS:
            self.values.append(path)
            return {"scalar": NUMPY_KINDS[token]}
        if isinstance(token, Refusal):
            raise token.kind(f"{path!r}: {token.reason}", key=path) from token.cause
        count = next(self._tokens)
        if token in (list, tuple):
            inner = [self._node(f"{path}/{keys.escape(at)}", depth=depth + 1) for at in range(count)]
            return {KIND_NAMES[token]: inner}
        names = [_escaped(next(self._tokens), path) for _ in range(count)]
        if len(set(names)) != count:
            raise UnsupportedObjectError(f"{path!r} holds the same name twice", key=path)
        return {KIND_NAMES[token]: self._entries(names, path, depth)}

    def _entries(self, names: list[tuple[str | int, str]], path: str, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, name in names:
            if depth == 0:
                self._top = key
            entries[name] = self._node(f"{path}/{name}" if depth else name, depth=depth + 1)
        return entries


def _spread(tokens: list[Any]) -> Iterator[Any]:
    """Segments token by token."""
    for token in tokens:
        if type(token) is Segment:
            yield from token
        else:
            yield token


def _escaped(key: Any, path: str) -> tuple[str | int, str]:
    if type(key) is not str and type(key) is not int:
        reason = f"key {key!r} of type {type(key).__name__} at {path!r} is not stored; use str or int keys"
        raise UnsupportedObjectError(reason, key=f"{path}/{key!r}")
    if type(key) is int and not -limits.KEY_INT <= key < limits.KEY_INT:
        reason = f"a key of {path!r} is an integer outside of -2^63 .. 2^63 - 1; use a str"
        raise UnsupportedObjectError(reason, key=f"{path}/#{hex(key)[:40]}")
    try:
        name = keys.escape(key)
        name.encode()
    except UnicodeEncodeError as error:
        reason = f"key {key!r} at {path!r} holds lone surrogates, which UTF-8 cannot hold; use another key"
        raise UnsupportedObjectError(reason, key=repr(f"{path}/{key}")) from error
    return key, name


def unflatten(
    tree: Any, tensor: Callable[[str], torch.Tensor], values: Mapping[str, Any], path: str | None = None
) -> Any:
    """Build the containers of `tree` anew. `path`: where it stands, None at the root; `tensor` gives a leaf by its full path.

    Lists and sets of values are copied, tensors are not.
    """
    here = path or ""
    if tree in LEAVES:
        return tensor(here) if tree == "tensor" else _from_tensor(tree, tensor(here), here)
    if tree == VALUE:
        value = stored(values, here)
        return value.copy() if type(value) in (list, set) else value
    kind, inner = one_item(tree, here)
    if kind == "scalar" and inner in NUMPY_SCALARS:
        return _scalar(NUMPY_SCALARS[inner], stored(values, here), here)
    if kind in MAPPINGS and isinstance(inner, dict):
        pairs = {
            unescaped(name, here): unflatten(node, tensor, values, below(path, name)) for name, node in inner.items()
        }
        return pairs if kind == "dict" else MAPPINGS[kind](pairs)
    if kind in SEQUENCES and isinstance(inner, list):
        return SEQUENCES[kind](
            [unflatten(node, tensor, values, below(path, keys.escape(at))) for at, node in enumerate(inner)]
        )
    raise CorruptCheckpointError(f"the index describes {here!r} by an unknown node {str(kind)[:100]!r}", key=here)


def check_tree(tree: Any, specs: Mapping[str, tuple[str, tuple[int, ...]]], values: Mapping[str, Any]) -> None:
    """`CorruptCheckpointError` unless `unflatten` can build it. `specs`: dtype and shape of each stored tensor, by path."""
    for path in leaves(tree):
        if path not in specs:
            raise CorruptCheckpointError(f"the index names no tensor {path!r}", key=path)
    for path in leaves(tree, kinds={BYTES}):
        if specs[path][0] != "uint8" or len(specs[path][1]) != 1:
            raise CorruptCheckpointError(f"the index describes {path!r} as bytes, but stores another tensor", key=path)
    nothing = torch.empty(0, dtype=torch.uint8)
    unflatten(tree, lambda _: nothing, values)


def check_stored(tree: Any, values: Mapping[str, Any]) -> None:
    """`CorruptCheckpointError` unless the state file holds every value that the tree names, before an object is changed."""
    todo: list[tuple[str | None, Any]] = [(None, tree)]
    while todo:
        path, node = todo.pop()
        if type(node) is str:
            if node == VALUE:
                stored(values, path or "")
            continue
        ((kind, inner),) = node.items()
        if kind == "scalar":
            _scalar(NUMPY_SCALARS[inner], stored(values, path or ""), path or "")
            continue
        entries = inner.items() if kind in MAPPINGS else [(keys.escape(at), child) for at, child in enumerate(inner)]
        for name, child in entries:
            if type(child) is dict or (child == VALUE and below(path, name) not in values):
                todo.append((below(path, name), child))


def _from_tensor(leaf: str, value: torch.Tensor, path: str) -> Any:
    if leaf == BYTES and (value.dtype is not torch.uint8 or value.dim() != 1):
        raise CorruptCheckpointError(f"the index describes {path!r} as bytes, but stores another tensor", key=path)
    array = value.cpu().numpy()
    return array.tobytes() if leaf == BYTES else array


def _scalar(kind: type[np.generic], value: Any, path: str) -> np.generic:
    """The NumPy scalar that `value` is the exact Python number of."""
    with contextlib.suppress(TypeError, ValueError, OverflowError), np.errstate(over="ignore"):
        made = kind(value)
        back = made.item()
        if type(back) is type(value) and (back == value or np.isnan(value)):
            return made
    raise CorruptCheckpointError(f"the state file holds no {kind.__name__} at {path!r}", key=path)


def below(path: str | None, name: str) -> str:
    """The path of an entry; None is the root."""
    return name if path is None else f"{path}/{name}"


def unescaped(name: str, path: str) -> str | int:
    """The key of an entry."""
    try:
        return keys.unescape(name)
    except ValueError as error:
        raise CorruptCheckpointError(f"the index names an impossible key at {path!r}: {error}", key=path) from error


def one_item(tree: Any, path: str) -> tuple[str, Any]:
    """The kind of a container node and what it holds."""
    if not isinstance(tree, dict) or len(tree) != 1 or path.count("/") > limits.TREE_DEPTH:
        raise CorruptCheckpointError(f"the index describes {path!r} by a malformed node", key=path)
    kind, inner = next(iter(tree.items()))
    return kind, inner


def entries_of(tree: Any, path: str) -> dict[str, Any] | None:
    """Nodes by escaped key if this is a dict of any kind."""
    kind, inner = one_item(tree, path) if isinstance(tree, dict) else ("", None)
    return inner if kind in MAPPINGS and isinstance(inner, dict) else None


def stored(values: Mapping[str, Any], path: str) -> Any:
    """A value of the state file."""
    try:
        return values[path]
    except KeyError as error:
        raise CorruptCheckpointError(f"the state file lacks the value {path!r}", key=path) from error


def leaves(tree: Any, path: str | None = None, kinds: Collection[str] = LEAVES) -> list[str]:
    """Full paths of the tensors of a tree. `kinds`: which of them, as users know them."""
    if tree in LEAVES:
        return [path or ""] if tree in kinds else []
    if tree == VALUE:
        return []
    kind, inner = one_item(tree, path or "")
    if kind in MAPPINGS and isinstance(inner, dict):
        nodes = inner.items()
    elif kind in SEQUENCES and isinstance(inner, list):
        nodes = {keys.escape(at): node for at, node in enumerate(inner)}.items()
    else:
        return []
    return list(chain.from_iterable(leaves(node, below(path, name), kinds) for name, node in nodes))


@dataclass(frozen=True, slots=True)
class Flat:
    """A state, flattened.

    `tensors` stand in the order of `structure.tensors`, tied ones once, conj and neg bits resolved into fresh tensors; they are
    the live objects, not copies. `values` are private. `overlappable`, per tensor: only an optimizer's step changes it.
    While nothing structural changes, `structure` is the same object.
    """

    structure: Structure
    tensors: tuple[torch.Tensor, ...]
    values: dict[str, Any]
    overlappable: tuple[bool, ...]
    has_optimizer: bool
    sight: Sight


class Flattener:
    """Flattens one state again and again; what did not change since the last time is not made again."""

    def __init__(self) -> None:
        self._tokens: list[Any] = []
        self._seen: list[Seen | None] = []
        self._makeup = Makeup()
        self._description: Description | None = None
        self._structure: Structure | None = None
        self._binding: Binding | None = None
        self._ties: tuple[tuple[int, int], ...] = ()
        self._positions: Positions = ()

    def flatten(self, state: Mapping[Any, Any], *, elsewhere: bool = False) -> Flat:
        """Walk the state and check all of it. `elsewhere`: another rank stores it.

        Raises:
            UnsupportedTensorError: A tensor that cannot be stored exactly; nothing was started.
            UnsupportedObjectError: A value that no reader could load safely, or containers that hold themselves.
        """
        if not isinstance(state, Mapping):
            raise UnsupportedObjectError(f"the state is a dict of what to save, not {type(state).__name__}")
        walk = Walk(state, self._seen, elsewhere=elsewhere)
        self._seen = walk.seen
        leaves = walk.leaves
        if self._description is None or walk.tokens != self._tokens:
            self._description = Description(walk.tokens)
            self._tokens, self._structure, self._binding = walk.tokens, None, None
        try:
            same, moved, sight = self._makeup.look(leaves)
        except (RuntimeError, NotImplementedError):  # nested tensors have no shape, sparse ones no address
            self._check(leaves)
            raise
        if not same:
            self._structure = self._binding = None
        binding = self._bind(walk, moved, sight)
        if self._structure is None:
            structure = _structure(self._description, leaves, binding)
            check_structure(structure)
            self._structure = structure
        check_values(self._description.values, walk.values, self._description.path_bytes + walk.text_bytes, write_state)
        if binding.resolved:
            for at in binding.resolved:
                leaves[at] = leaves[at].detach().resolve_conj().resolve_neg()
            sight = Sight.of(leaves)
        return Flat(
            structure=self._structure,
            tensors=tuple(compress(leaves, binding.stored) if binding.ties else leaves),
            values=dict(zip(self._description.values, walk.values, strict=True)),
            overlappable=binding.overlappable,
            has_optimizer=bool(walk.optimizers),
            sight=sight.chosen(binding.stored) if binding.ties else sight,
        )

    def _bind(self, walk: Walk, moved: list[slice], sight: Sight) -> Binding:
        """Check the live tensors, or only those that took another's place since the last time."""
        old = self._binding
        owned = walk.owned()
        if old is not None and old.holds(walk.leaves, owned, moved, sight.addresses):
            return old
        self._binding = None  # if a tensor is refused now, the next save must look at all of them again
        self._check(walk.leaves)
        self._binding = bind(walk, owned, sight.addresses)
        if (self._binding.ties, self._binding.positions) != (self._ties, self._positions):
            self._ties, self._positions, self._structure = self._binding.ties, self._binding.positions, None
        return self._binding

    def _check(self, leaves: list[torch.Tensor]) -> None:
        paths = self._description.tensors if self._description else []
        for (_, path), leaf in zip(paths, leaves, strict=True):
            if reason := complaint(leaf):
                raise UnsupportedTensorError(f"{path!r}: {reason}", key=path)


def _structure(description: Description, leaves: list[torch.Tensor], binding: Binding) -> Structure:
    tied = dict(binding.ties)
    groups: dict[str | int | None, int] = {}
    tensors: list[TensorSpec] = []
    positions: dict[int, int] = {}
    aliases: list[tuple[int, str, int]] = []
    for at, ((top, path), leaf) in enumerate(zip(description.tensors, leaves, strict=True)):
        above = keys.escape(top)
        bare = path == above
        group = groups.setdefault(None if bare else top, len(groups))
        name = path if bare else path[len(above) + 1 :]
        if at in tied:
            aliases.append((group, name, positions[tied[at]]))
        else:
            positions[at] = len(tensors)
            tensors.append(TensorSpec(group=group, name=name, dtype=NAMES[leaf.dtype], shape=tuple(leaf.shape)))
    return Structure(
        groups=tuple(Group(key, slug) for key, slug in zip(groups, keys.slugs(list(groups)), strict=True)),
        tensors=tuple(tensors),
        aliases=tuple(aliases),
        tree=description.tree,
        parameters={
            path: tuple(None if at is None else description.tensors[at][1] for at in positions)
            for path, positions in zip(description.optimizers, binding.positions, strict=True)
            if any(at is not None for at in positions)
        },
    )
