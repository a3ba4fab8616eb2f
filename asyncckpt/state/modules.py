"""Loading a module through its own `load_state_dict`."""

from collections import OrderedDict
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asyncckpt.format import keys
from asyncckpt.state.capture import clean_names, state_dict
from asyncckpt.state.copying import Getter, copy_exact, overlaps, private
from asyncckpt.state.differences import without
from asyncckpt.state.tree import entries_of, unflatten

if TYPE_CHECKING:
    from asyncckpt.state.matching import Matching


class ModuleLoad:
    """Compared when made; loads when called. Hooks and extra state work as in `load_state_dict`."""

    def __init__(self, module: nn.Module, node: Any, path: str, match: "Matching") -> None:
        self._module = module
        self._values = match.values
        self._strict = match.strict
        self._own: list[tuple[torch.Tensor, str]] = []  # expanded tensors, which copy_ refuses
        self._tensors: list[tuple[str, str]] = []  # key of the module's own state dict, path
        self._others: list[tuple[str, Any, str]] = []  # extra state
        self._lacking: list[tuple[str, Any]] = []  # what the checkpoint lacks, or has in another shape, and what stays
        self._metadata: Any = None
        try:
            state = state_dict(module)
        except Exception as error:  # noqa: BLE001 - of the module's own code
            match.problems.append(f"{path}: state_dict() of a {type(module).__name__} raised {error!r}")
            return
        self._metadata = getattr(state, "_metadata", None)
        entries = entries_of(node, path)
        if entries is None:
            match.problems.append(f"{path}: a module in the state, something else in the checkpoint")
            return
        names = {keys.escape(clean): raw for raw, clean in clean_names(module, state).items()}
        own_code, problems = _may_keep(module), len(match.problems)
        live = {} if own_code or torch.__future__.get_swap_module_params_on_conversion() else _live(module)
        for name, raw in names.items():
            in_place = self._compare(raw, state[raw], entries.get(name), f"{path}/{name}", match)
            if in_place and raw in live:
                match.homes.offer(f"{path}/{name}", live[raw])
        for name in entries:
            if name not in names:
                match.unexpected(f"{path}/{name}")
        if own_code and len(match.problems) > problems:
            match.ways_out.append(
                f"Loading code of its own in {path!r} may know these names and shapes. It runs with "
                f"module.load_state_dict(asyncckpt.load(url, prefix={path!r})); then {without(path)}"
            )

    def _compare(self, raw: str, value: Any, node: Any, path: str, match: "Matching") -> bool:
        """One name of the module's state dict, None where the checkpoint lacks it. Will a tensor be loaded?"""
        is_tensor = isinstance(value, torch.Tensor) and not raw.endswith(_EXTRA_STATE)
        if is_tensor:
            match.live(path, value)
        if node is None:
            match.missing(path)
            self._lacking.append((raw, value))
        elif not is_tensor:
            match.need(node, path)
            match.found += 1
            self._others.append((raw, node, path))
        elif not match.tensor(value, node, path):
            self._lacking.append((raw, value))
        else:
            if overlaps(value):
                self._own.append((value, path))
            else:
                self._tensors.append((raw, path))
            return True
        return False

    def __call__(self, get: Getter) -> None:
        """Load."""
        frozen = any(tensor.is_inference() for tensor in chain(self._module.parameters(), self._module.buffers()))
        with torch.inference_mode() if frozen else nullcontext():  # what was made in that mode is written in no other
            self._load(get)

    def _load(self, get: Getter) -> None:
        given = private(get) if _may_keep(self._module) else get
        state: OrderedDict[str, Any] = OrderedDict((raw, given(path)) for raw, path in self._tensors)
        for raw, node, path in self._others:
            state[raw] = unflatten(node, private(get), self._values, path)
        if self._metadata is not None:
            state._metadata = self._metadata  # type: ignore[attr-defined]
        if type(self._module).load_state_dict is nn.Module.load_state_dict:
            self._module.load_state_dict(state, strict=self._strict and not self._own)
        else:  # code of its own may count on every name
            self._module.load_state_dict(OrderedDict([*self._lacking, *state.items()]))
        for target, path in self._own:
            copy_exact(target, get(path))


_EXTRA_STATE = "_extra_state"


def _live(module: nn.Module) -> dict[str, torch.Tensor]:
    """The very tensors that `load_state_dict` copies into: what is one of them already is not copied again."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


def _may_keep(module: nn.Module) -> bool:
    """Could code that is not torch's keep a tensor that it is given? torch's own copies."""
    return "load_state_dict" in module.__dict__ or any(
        inner._load_state_dict_pre_hooks
        or inner._load_state_dict_post_hooks
        or "_load_from_state_dict" in inner.__dict__
        or not _torchs(type(inner)._load_from_state_dict)
        or not _torchs(type(inner).load_state_dict)
        or "set_extra_state" in inner.__dict__
        or not _torchs(type(inner).set_extra_state)
        for inner in module.modules()
    )


def _torchs(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.nn.")
