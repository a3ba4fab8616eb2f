"""A state beside a checkpoint's tree: what differs, which tensors are needed, and what to do with them."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from asyncckpt.errors import CorruptCheckpointError, UnsupportedObjectError
from asyncckpt.format import keys
from asyncckpt.state.binding import has_address, view_of
from asyncckpt.state.capture import Replicated, is_stateful, unwrap
from asyncckpt.state.copying import Getter, copy_exact, private
from asyncckpt.state.differences import Differences
from asyncckpt.state.dtypes import dtype_name
from asyncckpt.state.homes import Homes, Spec
from asyncckpt.state.kinds import complaints, group_complaint
from asyncckpt.state.modules import ModuleLoad
from asyncckpt.state.optimizers import OptimizerLoad, is_optimizer_node
from asyncckpt.state.tree import below, entries_of, leaves, one_item, unescaped, unflatten
from asyncckpt.state.walk import CONSTANTS, SCALARS, SEQUENCES, TENSORS

Place = Callable[[Getter], Any]
"""Restores one position of the state and returns what belongs there: the same object, or a new value for its parent."""


class LoadError(Exception):
    """The `load_state_dict` of an object raised; the cause says what. `path`: where the object stands; `kind`: its class."""

    def __init__(self, path: str, kind: str) -> None:
        super().__init__(path, kind)
        self.path, self.kind = path, kind


class Named:
    """Live tensors by their paths in the state: by identity, else by the memory that they show (`model.state_dict()` makes new objects)."""

    def __init__(self) -> None:
        self._by_id: dict[int, list[str]] = {}
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._by_view: dict[Any, list[str]] | None = None

    def add(self, path: str, tensor: torch.Tensor) -> None:
        """One more path of a tensor."""
        self._by_id.setdefault(id(tensor), []).append(path)
        self._tensors.append((path, tensor))  # alive, or its id could be another's

    def paths(self, tensor: torch.Tensor) -> list[str]:
        """Where it stands; empty if nowhere."""
        if found := self._by_id.get(id(tensor)):
            return found
        if not has_address(tensor):
            return []
        if self._by_view is None:
            self._by_view = {}
            for path, one in self._tensors:
                if has_address(one):
                    self._by_view.setdefault(view_of(one), []).append(path)
        return self._by_view.get(view_of(tensor), [])


class Matching(Differences):
    """Walks the state beside the checkpoint's tree; collects problems, the tensors needed and what to do."""

    def __init__(
        self,
        specs: Mapping[str, Spec],
        values: Mapping[str, Any],
        *,
        strict: bool,
        parameters: Mapping[str, Sequence[str | None]],
        aliases: Mapping[str, str],
    ) -> None:
        super().__init__(strict=strict)
        self.specs, self.values = specs, values
        self.parameters = parameters
        """Path of an optimizer in the checkpoint to the path of the parameter at each of its positions."""
        self._aliases = aliases
        self._named = Named()
        self._optimizers: list[Callable[[], None]] = []
        self._schedulers: list[tuple[LRScheduler, Any, str]] = []
        self.regrouped: set[int] = set()
        """Ids of optimizers whose parameter groups are not those of the checkpoint, in its order."""
        self.paths: dict[str, None] = {}
        self.targets: list[tuple[torch.Tensor, str]] = []
        self.homes = Homes(specs)
        self.device: torch.device | None = None
        """A CUDA device that values will be copied to."""

    def finish(self) -> None:
        """Optimizers are compared last, when the names of their parameters are known. Raises if anything differs."""
        for compare in self._optimizers:
            compare()
        for thing, node, path in self._schedulers:
            if id(thing.optimizer) in self.regrouped and (problem := group_complaint(thing, node, path, self.values)):
                self.problems.append(f"{path}: {problem}")
        self.report(self.paths)

    def name(self, key: Any, path: str) -> str | None:
        """The escaped key, or a problem."""
        try:
            return keys.escape(key)
        except UnsupportedObjectError as error:
            self.problems.append(f"{path}: {error}")
            return None

    def live(self, path: str, tensor: torch.Tensor) -> None:
        """This tensor stands at this path of the state."""
        self._named.add(path, tensor)

    def names_of(self, parameter: torch.Tensor) -> list[str]:
        """Where a parameter stands in the state; tied ones stand at several paths. Then the same by what the checkpoint stores for aliases."""
        paths = self._named.paths(parameter)
        return list(dict.fromkeys([*paths, *map(self.real_path, paths)]))

    def real_path(self, path: str) -> str:
        """Of an alias in the checkpoint; any other path is its own."""
        return self._aliases.get(path, path)

    def need(self, node: Any, path: str) -> None:
        """All tensors below will be asked for."""
        for leaf in leaves(node, path):
            self.spec(leaf)
            self.paths[leaf] = None

    def spec(self, path: str) -> Spec:
        """Dtype and shape of a stored tensor."""
        if path not in self.specs:
            raise CorruptCheckpointError(f"the index names no tensor {path!r}", key=path)
        return self.specs[path]

    def goes_to(self, device: torch.device) -> None:
        """Values will be copied there."""
        if device.type == "cuda":
            self.device = device

    def compare(self, node: Any, path: str, dtype: str, shape: tuple[int, ...]) -> bool:
        """Is there a tensor of this dtype and shape? If so it will be asked for."""
        if node not in ("tensor", "ndarray"):  # long bytes are no tensor to users
            self.problems.append(f"{path}: a tensor in the state, {_kind(node)} in the checkpoint")
            return False
        stored_dtype, stored_shape = self.spec(path)
        if stored_dtype == dtype and tuple(stored_shape) != tuple(shape) and not self.strict:
            self.reshaped.append(path)
        elif tuple(stored_shape) != tuple(shape):
            self.problems.append(f"{path}: shape {tuple(shape)} in the state, {tuple(stored_shape)} in the checkpoint")
        elif stored_dtype != dtype:
            self.problems.append(f"{path}: dtype {dtype} in the state, {stored_dtype} in the checkpoint")
        else:
            self.paths[path] = None
            self.found += 1
            return True
        return False

    def place(self, target: Any, node: Any, path: str) -> Place:
        """What restores `target` from `node`."""
        if type(target) is Replicated:
            return _inside(target, self.place(target.value, node, path))
        return self._place(target, node, path)

    def _place(self, target: Any, node: Any, path: str) -> Place:
        if isinstance(target, torch.Tensor):
            return self._tensor(target, node, path)
        if isinstance(target, np.ndarray):
            return self._array(target, node, path)
        if is_stateful(target):
            return self._object(target, unwrap(target), node, path)
        if isinstance(target, Mapping):
            if is_optimizer_node(node) and len(node["dict"]["state"]["dict"]) > 1:
                self.by_position[path] = "the state holds its state_dict()"
            return self._mapping(target, node, path)
        if isinstance(target, list | tuple) and type(target) not in CONSTANTS and _holds(target):
            return self._sequence(target, node, path)
        known = (
            type(target) in SCALARS or type(target) in CONSTANTS or isinstance(target, list | tuple | set | np.generic)
        )
        if not known:
            self.problems.append(f"{path}: nothing can be loaded into a {type(target).__qualname__}")
        return self._value(target, node, path)

    def _tensor(self, target: torch.Tensor, node: Any, path: str) -> Place:
        self.live(path, target)
        if not self.tensor(target, node, path):
            return lambda _: target
        self.homes.offer(path, target)

        def restore(get: Getter) -> Any:
            copy_exact(target, get(path))
            return target

        return restore

    def tensor(self, target: torch.Tensor, node: Any, path: str) -> bool:
        """Can this tensor be restored in place? Then its value will be asked for."""
        if nn.parameter.is_lazy(target):
            self.problems.append(f"{path}: a lazy parameter without a shape; run one forward pass before restoring")
        elif target.is_meta:
            self.problems.append(
                f"{path}: a meta tensor cannot be restored in place; materialise it first (`to_empty`)"
            )
        elif self.compare(node, path, dtype_name(target.dtype), target.shape):
            self.targets.append((target, path))
            self.goes_to(target.device)
            return True
        return False

    def _array(self, target: np.ndarray[Any, Any], node: Any, path: str) -> Place:
        if not self.compare(node, path, target.dtype.name, target.shape):
            return lambda _: target
        if not target.flags.writeable:
            self.problems.append(f"{path}: the array is read-only; pass a writable one")

        def restore(get: Getter) -> Any:
            np.copyto(target, get(path).detach().numpy())
            return target

        return restore

    def _object(self, target: Any, thing: Any, node: Any, path: str) -> Place:
        load: Callable[[Getter], None]
        if isinstance(thing, nn.Module):
            load = ModuleLoad(thing, node, path, self)
        elif isinstance(thing, torch.optim.Optimizer) and is_optimizer_node(node):
            made: list[OptimizerLoad] = []
            self._optimizers.append(lambda: made.append(OptimizerLoad(thing, node, path, self)))

            def load(get: Getter) -> None:
                made[0](get)
        else:
            self.need(node, path)
            self.found += 1
            self.problems += (f"{path}: {problem}" for problem in complaints(thing, node, path, self.values))
            unflatten(node, lambda _: _NOTHING, self.values, path)  # a value that is not there is found here, not later
            if isinstance(thing, LRScheduler):
                self._schedulers.append((thing, node, path))
            values = self.values

            def load(get: Getter) -> None:
                thing.load_state_dict(unflatten(node, private(get), values, path))

        def restore(get: Getter) -> Any:
            try:
                load(get)
            except Exception as error:
                raise LoadError(path, type(thing).__name__) from error
            return target

        return restore

    def _mapping(self, target: Mapping[Any, Any], node: Any, path: str) -> Place:
        entries = entries_of(node, path)
        if entries is None:
            self.problems.append(f"{path}: a dict in the state, {_kind(node)} in the checkpoint")
            return lambda _: target
        places: dict[Any, Place] = {}
        left = dict(entries)
        for key, child in target.items():
            name = self.name(key, path)
            if name in entries:
                places[key] = self.place(child, left.pop(name), f"{path}/{name}")
            elif name is not None:
                self.missing(f"{path}/{name}")
        for name, child in left.items():
            if leaves(child, f"{path}/{name}", TENSORS):
                self.unexpected(f"{path}/{name}", "the state has no such name; None there takes what is stored")
            else:
                places[unescaped(name, path)] = self._value(None, child, f"{path}/{name}")
        self.check_writable(target, places, path)

        def restore(get: Getter) -> Any:
            for key, place in places.items():
                value = place(get)
                if key not in target or value is not target[key]:
                    target[key] = value  # type: ignore[index]
            return target

        return restore

    def check_writable(self, target: Mapping[Any, Any], restored: Collection[Any], path: str) -> None:
        """A read-only dict cannot take new values for these of its keys."""
        for key in restored if not isinstance(target, MutableMapping) else ():
            if not restored_in_place(target.get(key)):
                here = below(path or None, keys.escape(key))
                self.problems.append(f"{here}: the dict is read-only, so this value cannot be put back; pass a dict")

    def _sequence(self, target: list[Any] | tuple[Any, ...], node: Any, path: str) -> Place:
        """A list or tuple that holds something to load into: element by element."""
        kind, nodes = one_item(node, path) if isinstance(node, dict) else (_kind(node), [])
        if kind not in SEQUENCES or len(nodes) != len(target):
            found = f"{kind} of {len(nodes)}" if kind in SEQUENCES else _kind(node)
            self.problems.append(
                f"{path}: {type(target).__name__} of {len(target)} in the state, {found} in the checkpoint"
            )
            return lambda _: target
        pairs = enumerate(zip(target, nodes, strict=True))
        places = [self.place(child, inner, f"{path}/{keys.escape(at)}") for at, (child, inner) in pairs]

        def restore(get: Getter) -> Any:
            values = [place(get) for place in places]
            if all(new is old for new, old in zip(values, target, strict=True)):
                return target
            if isinstance(target, list):
                target[:] = values
                return target
            return tuple(values)

        return restore

    def _value(self, target: Any, node: Any, path: str) -> Place:
        """Nothing to load into: the value takes the target's place; a list or set stays the same object."""
        self.need(node, path)
        self.found += 1
        value = None if leaves(node, path) else unflatten(node, _no_tensor, self.values, path)
        values = self.values

        def restore(get: Getter) -> Any:
            new = unflatten(node, private(get), values, path) if value is None else value
            if type(target) is list and type(new) is list:
                target[:] = new
                return target
            if type(target) is set and type(new) is set:
                target.clear()
                target.update(new)
                return target
            return new

        return restore


def _inside(target: Replicated, place: Place) -> Place:
    def restore(get: Getter) -> Any:
        value = place(get)
        return target if value is target.value else Replicated(value)

    return restore


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _no_tensor(path: str) -> torch.Tensor:
    raise CorruptCheckpointError(f"the index names no tensor {path!r}", key=path)


def _kind(node: Any) -> str:
    return next(iter(node), "nothing") if isinstance(node, dict) else str(node)


def _holds(target: Any) -> bool:
    """Is there something inside to load into, rather than to replace?"""
    if type(target) is Replicated:
        return _holds(target.value)
    if isinstance(target, torch.Tensor | np.ndarray) or is_stateful(target):
        return True
    if isinstance(target, Mapping):
        return any(map(_holds, target.values()))
    return isinstance(target, list | tuple) and any(map(_holds, target))


def restored_in_place(target: Any) -> bool:
    """Is this restored in place, without its parent?"""
    if type(target) is Replicated:
        return restored_in_place(target.value)
    return isinstance(target, torch.Tensor | np.ndarray | Mapping | list | set) or is_stateful(target)
