"""A checkpoint back into the live objects: everything is compared first, then values are copied in place."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from asyncckpt.errors import CheckpointError, StateMismatchError
from asyncckpt.state.copying import Getter, bits_equal, takes
from asyncckpt.state.differences import without
from asyncckpt.state.homes import Homes, Spec
from asyncckpt.state.matching import LoadError, Matching, Place
from asyncckpt.state.tree import one_item


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """A restore that was found possible.

    `paths`: full paths of the tensors that `apply` will ask for, and no others; `device`: a CUDA device that some will be copied to.
    `missing`, `unexpected`, `reshaped`: what `strict=False` leaves alone, see `plan_restore`.
    """

    paths: tuple[str, ...]
    device: torch.device | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    _state: Mapping[Any, Any]
    _places: tuple[tuple[Any, str, Place], ...]
    _targets: tuple[tuple[torch.Tensor, str], ...]
    _homes: Homes

    def homes(self, paths: Collection[str], real_path: Callable[[str], str]) -> dict[str, dict[str, torch.Tensor]]:
        """Those of `paths` whose bytes may be read into place by `apply`, and where, for each group. `real_path`: of an alias.

        What two groups need has none: the second would find what the first one's own code made of it.
        """
        alone = self._alone(paths, real_path)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in self._homes.choose(alone, real_path, self._targets).items():
            found.setdefault(alone[path], {})[path] = tensor
        return found

    def wanting(self, paths: Collection[str], real_path: Callable[[str], str]) -> set[str]:
        """Those of `paths` for which `apply` keeps a tensor that `make` made."""
        return self._homes.wanting(self._alone(paths, real_path), real_path)

    def make(self, path: str) -> torch.Tensor:
        """Memory for one of `wanting`, to be filled before `apply`."""
        return self._homes.make(path)

    def _alone(self, paths: Collection[str], real_path: Callable[[str], str]) -> dict[str, str]:
        """Those of `paths` that one group alone needs, and which."""
        needed: dict[str, set[str]] = {}
        for path in self.paths:
            needed.setdefault(real_path(path), set()).add(path.partition("/")[0])
        return {path: next(iter(groups)) for path in paths if len(groups := needed.get(path, set())) == 1}

    def apply(self, tensor: Getter, *, fill: Callable[[str], None] = lambda _: None) -> None:
        """Copy everything into the objects. No object keeps a tensor that `tensor` returned, unless `homes` or `make` made it.

        `fill(group)` is called when nothing stands in the way any more, just before a group is restored: it fills the
        group's homes, which `tensor` returns for their paths.

        Raises:
            StateMismatchError: Targets that share memory would get different values; nothing was changed.
            CheckpointError: A `load_state_dict` raised. The error names the object and says which groups are overwritten by now.
        """
        self._check_memory(tensor)
        self._homes.crowd(self._targets, {path: id(tensor(path)) for path in self.paths})
        for at, (key, name, place) in enumerate(self._places):
            fill(name)
            try:
                value = place(tensor)
            except LoadError as refused:
                cause = refused.__cause__ or refused
                what = f"load_state_dict() of {refused.path!r} (a {refused.kind}) raised {_said(cause)}"
                raise self._half_restored(what, refused.path, at) from cause
            except Exception as error:
                raise self._half_restored(f"restoring {key!r} raised {_said(error)}", name, at) from error
            if value is not self._state[key] and isinstance(self._state, MutableMapping):
                self._state[key] = value

    def _half_restored(self, what: str, path: str, at: int) -> CheckpointError:
        """Which groups hold what, now that the one at this place failed, and the way out."""
        names = [repr(key) for key, _, _ in self._places]
        done = f"overwritten by now: {', '.join(names[:at])}; perhaps " if at else "perhaps overwritten "
        left = f"; as before: {', '.join(names[at + 1 :])}" if names[at + 1 :] else ""
        error = CheckpointError(
            f"{what}\n{done}in part: {names[at]}{left}.\nMake {path!r} as it was when it was saved, or {without(path)}, and restore again",
            key=path,
        )
        error.overwritten = True
        return error

    def _check_memory(self, tensor: Getter) -> None:
        """A tied target has one value: what the checkpoint holds for its names must agree. So has an expanded one, along a dimension."""
        first: dict[Any, str] = {}
        for target, path in self._targets:
            if target.layout is not torch.strided:
                continue
            if not target.is_contiguous() and not takes(target, tensor(path)):
                raise StateMismatchError(
                    f"{path!r} is expanded in the state, with one value along a dimension where the checkpoint has several; "
                    "nothing was loaded. Put a tensor with memory of its own there: `tensor.clone()`",
                    key=path,
                )
            if target.numel():
                memory = (target.device, target.data_ptr(), target.dtype, target.shape, target.stride())
                before = first.setdefault(memory, path)
                if before != path and not bits_equal(tensor(before), tensor(path)):
                    raise StateMismatchError(
                        f"{before!r} and {path!r} are tied in the state, but differ in the checkpoint; nothing was loaded. "
                        "Untie them, or restore into the model that was saved",
                        key=path,
                    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def plan_restore(
    state: Mapping[Any, Any],
    tree: Any,
    specs: Mapping[str, Spec],
    values: Mapping[str, Any],
    *,
    strict: bool = True,
    parameters: Mapping[str, Sequence[str | None]] = MappingProxyType({}),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> RestorePlan:
    """Compare the whole state with the whole checkpoint; touch nothing.

    Args:
        state: What the user passes; groups of the checkpoint that it does not name are ignored.
        tree: The checkpoint's containers, from its index.
        specs: Full path of every tensor, aliases too, to its dtype and shape.
        values: What the state file holds.
        strict: False skips names that only one side has, and tensors that have another shape: a head with more classes keeps its own. What
            cannot be skipped without breaking an object later raises all the same: another dtype, another kind of optimizer.
        parameters: Path of each stored optimizer to the path of the parameter at each of its positions, where it is known.
        aliases: Paths of the checkpoint's tied tensors to the path that is stored for them.

    Raises:
        StateMismatchError: Every difference of all objects in one message; or not one name in common.
    """
    match = Matching(specs, values, strict=strict, parameters=parameters, aliases=aliases)
    _, groups = one_item(tree, "")
    places = []
    for key, target in state.items():
        name = match.name(key, "")
        if name is not None and name in groups:
            place = match.place(target, groups[name], name)
            places.append((key, name, place))
        elif name is not None:
            match.missing(name, "the checkpoint has no such group")
    match.check_writable(state, [key for key, _, _ in places], "")
    match.finish()
    return RestorePlan(
        tuple(match.paths),
        match.device,
        tuple(match.absent),
        tuple(match.surplus),
        tuple(match.reshaped),
        state,
        tuple(places),
        tuple(match.targets),
        match.homes,
    )
