"""A checkpoint in a pocket: a flattened state, copied as bytes, without plan, arena or store."""

from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt.state.dtypes import BY_NAME
from asyncckpt.state.statefile import read_state, write_state
from asyncckpt.state.stateful import plan_restore
from asyncckpt.state.tree import Flattener, unflatten


@dataclass
class Pocket:
    tree: Any
    specs: dict[str, Any]
    values: dict[str, Any]
    data: dict[str, torch.Tensor]
    aliases: dict[str, str]
    parameters: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state, flattener=None):
        flat = (flattener or Flattener()).flatten(state)
        structure = flat.structure
        paths = [structure.path(at) for at in range(len(structure.tensors))]
        specs = {path: (spec.dtype, spec.shape) for path, spec in zip(paths, structure.tensors, strict=True)}
        data = {}
        for path, spec, tensor in zip(paths, structure.tensors, flat.tensors, strict=True):
            assert tuple(tensor.shape) == spec.shape
            assert tensor.dtype == BY_NAME[spec.dtype]
            data[path] = torch.empty(tensor.shape, dtype=tensor.dtype)
            with torch.no_grad():
                data[path].copy_(tensor)
        aliases = {structure.groups[group].path(name): paths[at] for group, name, at in structure.aliases}
        specs |= {alias: specs[path] for alias, path in aliases.items()}
        values = read_state(write_state(flat.values))
        return cls(structure.tree, specs, values, data, aliases, dict(structure.parameters))

    def tensor(self, path):
        self.asked.append(path)
        return self.data[self.aliases.get(path, path)]

    def restore(self, state, *, strict=True):
        before = {path: raw(tensor) for path, tensor in self.data.items()}
        names = {"parameters": self.parameters, "aliases": self.aliases}
        plan = plan_restore(state, self.tree, self.specs, self.values, strict=strict, **names)
        plan.apply(self.tensor)
        assert set(self.asked) <= set(plan.paths)
        assert {path: raw(tensor) for path, tensor in self.data.items()} == before, "a buffer was written to"
        for tensor in self.data.values():  # whoever kept a buffer shows it when it is spoilt
            tensor.view(torch.uint8).fill_(77) if tensor.dim() else tensor.reshape(1).view(torch.uint8).fill_(77)
        return plan

    def load(self):
        return unflatten(self.tree, lambda path: self.tensor(path).clone(), self.values)


def raw(tensor):
    """The bytes of a tensor's values."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        plain.copy_(tensor)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def snapshot(value):
    """Nested state with every tensor as dtype, shape and bytes, and every value with its type: equal means identical."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), raw(value))
    if isinstance(value, dict):
        return (type(value).__name__, [(key, snapshot(inner)) for key, inner in value.items()])
    if isinstance(value, list | tuple) and type(value) is not torch.Size:
        return (type(value).__name__, [snapshot(inner) for inner in value])
    if isinstance(value, set):  # the order of equal sets may differ
        return (set, sorted((type(inner).__name__, repr(inner)) for inner in value))
    return (type(value), repr(value))
