"""From which position of a stored optimizer each parameter of a live one is restored.

By name where both sides know the names: then the order of the parameters and their groups may be another. Else by position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import keys
from asyncckpt.state.tree import entries_of, leaves, stored, unflatten

if TYPE_CHECKING:
    from asyncckpt.state.matching import Matching

Ids = list[list[Any]]
"""For each group the keys of its parameters in the state dict."""
NO_OPTIONS = frozenset({"params", "param_names"})
"""Keys of a group that belong to its parameters."""


@dataclass(slots=True)
class Arrangement:
    """`ids`: for each parameter of each live group the stored key; one that is not stored has a negative number of its own.

    `sources`: whose options each live group takes, None: it keeps its own. `lost`: stored keys that no live parameter takes.
    """

    ids: Ids
    sources: list[int | None]
    lost: set[Any]
    by_name: bool
    as_stored: bool

    def drop(self, stored_id: Any) -> None:
        """The parameter at this stored position keeps the state that it has."""
        self.lost.add(stored_id)
        self.as_stored = False
        number = 0
        for ids in self.ids:
            for at, found in enumerate(ids):
                number += 1
                if found == stored_id:
                    ids[at] = -number


def arrange(optimizer: Optimizer, node: Any, path: str, match: "Matching") -> Arrangement | None:
    """None if it cannot be restored; `match` is told why."""
    return _Arranging(optimizer, node["dict"], path, match).made()


class _Arranging:
    """One optimizer beside what is stored of one. `_ids` and `_nodes`: of the stored groups."""

    def __init__(self, optimizer: Optimizer, inner: dict[str, Any], path: str, match: "Matching") -> None:
        self._groups = optimizer.param_groups
        self._live = [parameter for group in self._groups for parameter in group["params"]]
        self._state = optimizer.state
        self._path, self._match = path, match
        self._nodes = inner["param_groups"].get("list", []) if isinstance(inner["param_groups"], dict) else []
        below = f"{path}/param_groups"
        self._ids = [_ids(match.values, f"{below}/{keys.escape(at)}/params") for at in range(len(self._nodes))]
        self._with_state = {keys.unescape(name) for name in inner["state"]["dict"]}

    def made(self) -> Arrangement | None:
        names = self._stored_names()
        own = None if names is None else self._own_names(names.count(None))
        if names is not None and own is not None:
            return self._by_name(names, own)
        found = self._by_position()
        shapes = [parameter.shape for parameter in self._live if not nn.parameter.is_lazy(parameter)]
        if found is not None and self._with_state and len(set(shapes)) < len(shapes):
            unnamed = "the checkpoint does not name them" if names is None else "the state does not hold them"
            self._match.by_position[self._path] = unnamed
        return found

    def _stored_names(self) -> list[str | None] | None:
        """Names by position, as the checkpoint stores them; None unless all positions that have state have one, each its own."""
        found = self._match.parameters.get(self._path)
        flat = list(chain.from_iterable(self._ids))
        if found is None or len(found) != len(flat) or len(set(flat)) != len(flat):
            return None
        if any(name is None and number in self._with_state for name, number in zip(found, flat, strict=True)):
            return None
        names = [name for name in found if name is not None]
        return list(found) if len(set(names)) == len(names) else None

    def _own_names(self, nameless: int) -> list[list[str]] | None:
        """All names of each live parameter; None unless as many as in the checkpoint lack one, and none of these has state."""
        own = [self._match.names_of(parameter) for parameter in self._live]
        lacking = [parameter for parameter, names in zip(self._live, own, strict=True) if not names]
        return None if len(lacking) != nameless or any(self._state.get(parameter) for parameter in lacking) else own

    def _count(self, path: str, own: int, saved: int) -> None:
        self._match.problems.append(f"{path}: {own} in the state, {saved} in the checkpoint")

    def _by_position(self) -> Arrangement | None:
        below = f"{self._path}/param_groups"
        if len(self._ids) != len(self._groups):
            self._count(below, len(self._groups), len(self._ids))
            return None
        pairs = [(len(group["params"]), len(ids)) for group, ids in zip(self._groups, self._ids, strict=True)]
        for at, (own, saved) in enumerate(pairs):
            if own != saved:
                self._count(f"{below}/{keys.escape(at)}/params", own, saved)
        if any(own != saved for own, saved in pairs):
            return None
        return Arrangement(self._ids, list(range(len(self._ids))), set(), by_name=False, as_stored=True)

    def _by_name(self, names: Sequence[str | None], own: list[list[str]]) -> Arrangement | None:
        flat = list(chain.from_iterable(self._ids))
        free = {name: number for name, number in zip(names, flat, strict=True) if name is not None}
        nameless = iter([number for name, number in zip(names, flat, strict=True) if name is None])
        by_memory = {self._match.real_path(name): name for name in free}
        found: list[Any] = []
        absent: list[tuple[int, str]] = []
        for at, called in enumerate(own):
            candidates = [*called, *(by_memory[name] for name in called if name in by_memory)]
            name = next((name for name in candidates if name in free), None)
            if called and name is None:
                absent.append((at, called[0]))
            found.append(free.pop(name) if name else -1 - at if called else next(nameless))
        if not self._may_differ(absent, free):
            return None
        numbers = iter(found)
        ids = [[next(numbers) for _ in group["params"]] for group in self._groups]
        return Arrangement(ids, self._sources(ids), set(free.values()), by_name=True, as_stored=ids == self._ids)

    def _may_differ(self, absent: list[tuple[int, str]], lost: dict[str, Any]) -> bool:
        """Whether what only one side has may be skipped. Not if the groups differ in number too: a scheduler counts them."""
        if not absent and not lost:
            return True
        match, below = self._match, f"{self._path}/state"
        for at, name in absent:
            match.missing(f"{below}/{keys.escape(at)}", f"the checkpoint's optimizer has no parameter {name!r}")
        for name, number in lost.items():
            match.unexpected(f"{below}/{keys.escape(number)}", f"the state's optimizer has no parameter {name!r}")
        if len(self._ids) != len(self._groups):
            self._count(f"{self._path}/param_groups", len(self._groups), len(self._ids))
        return len(self._ids) == len(self._groups) and not match.strict

    def _sources(self, ids: Ids) -> list[int | None]:
        group_of = {number: at for at, numbers in enumerate(self._ids) for number in numbers}
        sources = []
        for at, numbers in enumerate(ids):
            held = sorted({group_of[number] for number in numbers if number in group_of})
            empty = not numbers and at < len(self._ids) and not self._ids[at]  # such a group has options all the same
            sources.append(self._source(at, [at] if empty else held))
        return sources

    def _source(self, at: int, sources: list[int]) -> int | None:
        """The stored group whose options the live group `at` takes: the one that its parameters were saved in."""
        options = [self._options(source) for source in (sources if len(sources) > 1 else ())]
        differing = sorted({key for one in options for key in one if one[key] != options[0].get(key, one)})
        if differing:
            groups, which = ", ".join(map(str, sources)), ", ".join(differing)
            self._match.missing(
                f"{self._path}/param_groups/{keys.escape(at)}",
                f"its parameters were saved in the groups {groups}, whose options differ ({which})",
            )
        return None if differing or not sources else sources[0]

    def _options(self, source: int) -> dict[str, Any]:
        """Of a stored group; a tensor equals nothing."""
        path = f"{self._path}/param_groups/{keys.escape(source)}"
        entries = entries_of(self._nodes[source], path) or {}
        values = self._match.values
        return {
            name: object() if leaves(child, path) else unflatten(child, _no_tensor, values, f"{path}/{name}")
            for name, child in entries.items()
            if name not in NO_OPTIONS
        }


def _ids(values: Mapping[str, Any], path: str) -> list[Any]:
    """The keys of a stored group's parameters."""
    ids = stored(values, path)
    if type(ids) is not list:
        raise CorruptCheckpointError(f"the parameters of a group are no list at {path!r}", key=path)
    return ids.copy()


def _no_tensor(path: str) -> torch.Tensor:
    raise KeyError(path)


def placed(optimizer: Optimizer, arrangement: Arrangement) -> dict[Any, torch.Tensor]:
    """The live parameter of each stored key that one takes."""
    pairs = zip(
        chain.from_iterable(arrangement.ids),
        chain.from_iterable(group["params"] for group in optimizer.param_groups),
        strict=True,
    )
    if not arrangement.by_name:
        return dict(pairs)
    return {number: parameter for number, parameter in pairs if type(number) is not int or number >= 0}
