"""One pass over a training state: its structure as a list of tokens, its tensors and its plain values.

The same tokens as last time mean the same structure. Nothing here builds a path: the walk runs at every save.
"""

import ctypes
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from asyncckpt.errors import SnapshotError, UnsupportedObjectError, UnsupportedTensorError
from asyncckpt.state.capture import (
    Replicated,
    capture_module,
    is_gathered_on_one_rank,
    is_stateful,
    loader_way_out,
    unwrap,
)
from asyncckpt.state.dtypes import PLAIN_KINDS, kind_complaint
from asyncckpt.state.packing import TENSOR_KINDS, Packed, Seen, pack

MAX_DEPTH = 64
VALUE = "value"
"""Token and tree leaf of a plain value."""
BYTES = "bytes"
"""Tree leaf of long `bytes`, which travel as a tensor."""
TENSORS = ("tensor", "ndarray")
"""Tree leaves that are tensors to users, too."""
LEAVES = (*TENSORS, BYTES)
"""Tree leaves whose content is a tensor."""
LONG_BYTES = 2**20
"""From this length on. Pickled, 1 MiB takes 5 ms to write, 10 to read and 1.5 times its size; as a tensor it costs a copy.

But a tensor of another length is another structure, which must be planned anew, so short ones stay values.
"""
OPTIMIZER = "optimizer"
"""Token in front of an optimizer: the next of `Walk.optimizers` stands here."""

SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})
CONSTANTS = frozenset({torch.Size, torch.dtype, torch.device})
MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
NUMPY_SCALARS: dict[str, type[np.generic]] = {
    name: np.dtype(name).type
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
NUMPY_KINDS = {kind: name for name, kind in NUMPY_SCALARS.items()}
KIND_NAMES = {kind: name for name, kind in (MAPPINGS | SEQUENCES).items()}
_HINTS = {
    "defaultdict": "store dict(value)",
    "deque": "store list(value)",
    "frozenset": "store set(value)",
    "range": "store list(value)",
    "bytearray": "store bytes(value)",
    "mappingproxy": "store dict(value)",
    "memmap": "store numpy.array(value)",
    "Generator": "store generator.get_state(), or bit_generator.state for NumPy",
    "DataLoader": "it does not know its place in the epoch: leave it out of the state, or use torchdata's StatefulDataLoader",
    "function": "store what it is made from; code is never stored",
}

_INT_LIMIT = 1 << 2039  # one bit of a signed integer of 255 bytes, the longest that weights_only reads, is its sign
_UNREADABLE = (
    "empty bytes and integers beyond 2040 bits are not stored: torch.load(weights_only=True) refuses them; "
    "store None, or hex(value)"
)


_WAY_OUT = "leave it out of the state, or save it when its state_dict() works"


class Refusal:
    """Token of something that cannot be stored. Equal to nothing, so the slow path finds it and raises with its path."""

    __hash__ = object.__hash__

    def __init__(self, kind: type[SnapshotError], reason: str, cause: BaseException | None = None) -> None:
        self.kind = kind
        self.reason = reason
        self.cause = cause

    def __eq__(self, other: object) -> bool:
        return False


class Walk:
    """One pass over a state: `tokens` (its structure), `leaves` (tensors), `values`, `optimizers`, in depth-first order.

    `text_bytes`: of what stands in sequences, at most.
    `before`: what the last walk has `seen` of its optimizers. It saves time, and changes nothing. `elsewhere`: another rank stores the state.
    """

    def __init__(
        self, state: Mapping[Any, Any], before: Sequence[Seen | None] = (), *, elsewhere: bool = False
    ) -> None:
        self._elsewhere = elsewhere
        self.tokens: list[Any] = [dict, len(state), *state]
        self.leaves: list[torch.Tensor] = []
        self.values: list[Any] = []
        self.text_bytes = 0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.seen: list[Seen | None] = []
        self._before = before
        self._open: set[int] = {id(state)}  # containers being walked: one met again inside itself is a cycle
        self._captured = False  # inside what a state_dict() returned
        self._visit(state.values())

    def parameters(self) -> Iterator[torch.Tensor]:
        """What the optimizers update."""
        return chain.from_iterable(group["params"] for optimizer in self.optimizers for group in optimizer.param_groups)

    def owned(self) -> list[int]:
        """Their ids."""
        return list(map(id, self.parameters()))

    def owned_memory(self) -> set[tuple[int, int]]:
        """Address and elements of the tensors that only an optimizer's step changes: its parameters and its state."""
        todo: list[Any] = [*self.parameters(), *(optimizer.state for optimizer in self.optimizers)]
        found: set[tuple[int, int]] = set()
        while todo:
            thing = todo.pop()
            if isinstance(thing, torch.Tensor):
                if thing.layout is torch.strided and type(thing) in PLAIN_KINDS and thing.numel():
                    found.add((thing.data_ptr(), thing.numel()))
            elif isinstance(thing, Mapping):
                todo += thing.values()
            elif isinstance(thing, list | tuple):
                todo += thing
        return found

    def _visit(self, children: Iterable[Any]) -> None:
        """Plain kinds first and inline: this loop runs once per leaf of every save."""
        tokens, leaves, values = self.tokens, self.leaves, self.values
        for child in children:
            kind = type(child)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                tokens.append(torch.Tensor)
                leaves.append(child)
            elif kind in SCALARS or kind in CONSTANTS:
                if kind is bytes and len(child) >= LONG_BYTES:
                    tokens.append(bytes)
                    leaves.append(_shown(child))
                    continue
                if (kind is int or kind is bytes) and _unreadable((child,), {kind}):
                    tokens.append(Refusal(UnsupportedObjectError, _UNREADABLE))
                tokens.append(VALUE)
                values.append(child)
            elif kind is dict or kind is OrderedDict or kind is Counter:
                tokens += (kind, len(child))
                tokens += child
                self._inside(child, child.values())
            elif kind is list or kind is tuple or kind is set:
                self._sequence(child, kind)
            else:
                self._other(child, kind)

    def _enter(self, container: Any, children: Iterable[Any]) -> None:
        mark = id(container)
        if mark in self._open or len(self._open) > MAX_DEPTH:
            reason = f"a container holds itself, or more than {MAX_DEPTH} levels are nested"
            self.tokens.append(Refusal(UnsupportedObjectError, reason))
            return
        self._open.add(mark)
        self._visit(children)
        self._open.discard(mark)

    def _sequence(self, child: Any, kind: type) -> None:
        """A sequence of plain scalars is one value; it is copied, so that the user may go on appending."""
        kinds = set(map(type, child))
        if Replicated in kinds:
            child = kind(one.value if type(one) is Replicated else one for one in child)
            kinds = set(map(type, child))
        long = (
            bytes in kinds and kind is not set and any(type(one) is bytes and len(one) >= LONG_BYTES for one in child)
        )
        if kinds <= SCALARS and not long:
            if bytes in kinds or str in kinds:
                self.text_bytes += 4 * sum(len(one) for one in child if type(one) is str or type(one) is bytes)
            if _unreadable(child, kinds):
                self.tokens.append(Refusal(UnsupportedObjectError, _UNREADABLE))
            self.tokens.append(VALUE)
            self.values.append(kind(child))
        elif kind is set:
            self.tokens.append(Refusal(UnsupportedObjectError, "a set may hold plain scalars only; store a list"))
        else:
            self.tokens += (kind, len(child))
            self._enter(child, child)

    def _other(self, child: Any, kind: type) -> None:
        if kind is np.ndarray:
            self._array(child)
        elif kind is Replicated:
            self._enter(child, (child.value,))
        elif isinstance(child, np.generic) and child.dtype.name in NUMPY_SCALARS:
            self.tokens.append(NUMPY_SCALARS[child.dtype.name])
            self.values.append(child.item())
        elif isinstance(child, torch.Tensor):
            self.tokens.append(Refusal(UnsupportedTensorError, kind_complaint(kind)))
        elif is_stateful(child) and not self._captured:
            self._stateful(unwrap(child))
        else:
            self.tokens.append(Refusal(UnsupportedObjectError, _object_complaint(child, kind, inside=self._captured)))

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        try:
            if array.dtype.name not in NUMPY_SCALARS or not array.dtype.isnative:
                raise TypeError(array.dtype)
            tensor = torch.from_numpy(np.array(array, order="C"))
        except TypeError:
            reason = f"NumPy dtype {array.dtype!r} is not stored; use a native bool, integer, float or complex type"
            self.tokens.append(Refusal(UnsupportedTensorError, reason))
        else:
            self.tokens.append(np.ndarray)
            self.leaves.append(tensor)

    def _stateful(self, thing: Any) -> None:
        names: list[str] | None = None
        children: list[Any] = []
        packed: Packed | None = None
        optimizer = thing if isinstance(thing, torch.optim.Optimizer) else None
        try:
            if isinstance(thing, torch.nn.Module):
                names, children = capture_module(thing)
            elif optimizer is not None:
                packed = pack(optimizer, self._before[len(self.seen)] if len(self.seen) < len(self._before) else None)
            if self._elsewhere and is_gathered_on_one_rank(thing):
                names = []
            elif names is None and packed is None:
                children = [thing.state_dict()]
        except Exception as error:  # noqa: BLE001 - of the object's own code; raised with its path
            reason = f"state_dict() of a {type(thing).__name__} raised {error!r}; {loader_way_out(thing) or _WAY_OUT}"
            self.tokens.append(Refusal(SnapshotError, reason, error))
            return
        if optimizer is not None:
            self.tokens.append(OPTIMIZER)
            self.optimizers.append(optimizer)
            self.seen.append(packed.seen if packed else None)
        self._captured = True
        if packed is not None:
            self._packed(packed)
        elif names is not None:
            self.tokens += (OrderedDict, len(names))
            self.tokens += names
            self._inside(thing, children)
        else:
            self._enter(thing, children)
        self._captured = False

    def _packed(self, packed: Packed) -> None:
        """As `state_dict()` would be walked."""
        tokens = self.tokens
        tokens += (dict, 2, "state", "param_groups", packed.seen.tokens)
        self.leaves += packed.leaves
        tokens += (list, len(packed.groups))
        for group, numbers in zip(packed.groups, packed.seen.numbers, strict=True):
            tokens += (dict, len(group) + 1, *group, "params")
            self._enter(group, group.values())
            tokens.append(VALUE)
            self.values.append(numbers)

    def _inside(self, container: Any, children: Collection[Any]) -> None:
        """The children of a container: all at once if they are tensors alone, as of most modules and optimizers."""
        if TENSOR_KINDS.issuperset(map(type, children)):
            self.tokens += repeat(torch.Tensor, len(children))
            self.leaves += children
        else:
            self._enter(container, children)


def _shown(value: bytes) -> torch.Tensor:
    """The memory of `value`, which is only read; not a copy."""
    content: Any = (ctypes.c_char * len(value)).from_address(
        ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value or 0
    )
    content.owner = value  # lives as long as the tensor
    return torch.frombuffer(content, dtype=torch.uint8)


def _unreadable(values: Collection[Any], kinds: set[type]) -> bool:
    """Is there one that `torch.save` writes and `torch.load(weights_only=True)` refuses?"""
    if kinds == {int}:
        return bool(max(values) >= _INT_LIMIT or min(values) < -_INT_LIMIT)
    return (bytes in kinds and b"" in values) or (
        int in kinds and any(type(one) is int and not -_INT_LIMIT <= one < _INT_LIMIT for one in values)
    )


def _object_complaint(child: Any, kind: type, *, inside: bool) -> str:
    """Why an object is refused, and the way out."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    hint = _HINTS.get(kind.__name__)
    if inside and is_stateful(child):
        hint = "an object inside another's state_dict() cannot be restored; give it a key of its own in the state"
    elif isinstance(child, type):
        name, hint = f"class {child.__qualname__}", "store its name"
    elif hint is None and isinstance(child, tuple):
        hint = "store tuple(value) or value._asdict()"
    elif hint is None and isinstance(child, Mapping):
        hint = "store dict(value)"
    elif hint is None and isinstance(child, np.ndarray):
        hint = "store numpy.array(value, subok=False)"
    elif hint is None and hasattr(child, "__dataclass_fields__"):
        hint = "store dataclasses.asdict(value)"
    elif hint is None and isinstance(child, DataLoader):
        hint = _HINTS["DataLoader"]
    elif hint is None and hasattr(child, "state_dict"):
        hint = "give it load_state_dict() beside its state_dict()"
    elif hint is None:
        hint = "store plain data (dict, list, str, numbers, tensors), or give it state_dict() and load_state_dict()"
    return f"{name} is not stored: torch.load(weights_only=True) refuses such objects; {hint}"
