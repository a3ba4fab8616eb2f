"""A state without its values: what a plan is made from, and what crosses to the service once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.format import keys


@dataclass(frozen=True, slots=True)
class Group:
    """A top-level key of the state; None holds bare tensors. `slug` begins the names of its shards."""

    key: str | int | None
    slug: str

    def path(self, name: str) -> str:
        """The full path of a tensor of this group."""
        return name if self.key is None else f"{keys.escape(self.key)}/{name}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to store. `group`: position of its group; `name`: path within it; `dtype`: torch's name, e.g. "bfloat16"."""

    group: int
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """`tensors`: each stored once. `aliases`: group, name, and position in `tensors` of the tensor it is tied to.

    `tree`: the containers, as JSON (FORMAT.md, section "Tree"). `parameters`: path of an optimizer to the path of the parameter at each
    of its positions, or None where the state does not hold it.
    """

    groups: tuple[Group, ...]
    tensors: tuple[TensorSpec, ...]
    aliases: tuple[tuple[int, str, int], ...]
    tree: Any
    parameters: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def path(self, tensor: int) -> str:
        """The full path of a tensor, as users see it."""
        spec = self.tensors[tensor]
        return self.groups[spec.group].path(spec.name)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the service."""
        return {
            "groups": [[group.key, group.slug] for group in self.groups],
            "tensors": [[spec.group, spec.name, spec.dtype, spec.shape] for spec in self.tensors],
            "aliases": self.aliases,
            "tree": self.tree,
            "parameters": {path: list(names) for path, names in self.parameters.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Structure":
        """Mirror of `to_json`."""
        return cls(
            groups=tuple(Group(key, slug) for key, slug in data["groups"]),
            tensors=tuple(
                TensorSpec(group, name, dtype, tuple(shape)) for group, name, dtype, shape in data["tensors"]
            ),
            aliases=tuple((group, name, tensor) for group, name, tensor in data["aliases"]),
            tree=data["tree"],
            parameters={path: tuple(names) for path, names in data["parameters"].items()},
        )
