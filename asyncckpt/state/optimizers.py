"""Loading an optimizer exactly.

`Optimizer.load_state_dict` casts state to the dtype of its parameter (fp32 moments of a bf16 parameter lose 16 bits) and keeps
the tensors it is given. It still runs, for its checks, hooks and defaults; then the state is put right.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncckpt.format import keys
from asyncckpt.state.copying import Getter, bits_equal, copy_exact, private
from asyncckpt.state.tree import entries_of, stored, unflatten

if TYPE_CHECKING:
    from asyncckpt.state.matching import Matching


def is_optimizer_node(node: Any) -> bool:
    """Was this written by an optimizer with torch's state dict? Others load as any object does."""
    inner = node.get("dict") if isinstance(node, dict) else None
    return isinstance(inner, dict) and set(inner) == {"state", "param_groups"} and "dict" in inner["state"]


# state of torch.optim's own classes that has the shape of its parameter (their sources, torch 2.13)
_SHAPED_AS_PARAMETER = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "ax", "prev", "step_size"),
}


class _Ids(list[Any]):
    """A group's parameter ids: torch's loader asks for every single value whether its parameter is among them.

    In a list of 33,000 that is half of a restore's time (`Optimizer._process_value_according_to_param_policy`, torch 2.13).
    """

    def __init__(self, ids: Iterable[Any] = ()) -> None:
        super().__init__(ids)
        self._known = frozenset(self)

    def __contains__(self, item: object) -> bool:
        return item in self._known

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return list(self)


class OptimizerLoad:
    """Compared when made; loads when called."""

    def __init__(self, optimizer: Optimizer, node: Any, path: str, match: "Matching") -> None:
        self._optimizer, self._node, self._path, self._values = optimizer, node, path, match.values
        self._parameters: dict[Any, torch.Tensor] = {}
        match.need(node, path)
        inner = node["dict"]
        groups = inner["param_groups"].get("list", []) if isinstance(inner["param_groups"], dict) else []
        if len(groups) != len(optimizer.param_groups):
            match.problems.append(
                f"{path}/param_groups: {len(optimizer.param_groups)} in the state, {len(groups)} in the checkpoint"
            )
            return
        for at, group in enumerate(optimizer.param_groups):
            _compare_options(group, groups[at], f"{path}/param_groups/{keys.escape(at)}", match)
            below = f"{path}/param_groups/{keys.escape(at)}/params"
            ids = stored(self._values, below)
            if len(ids) != len(group["params"]):
                match.problems.append(f"{below}: {len(group['params'])} in the state, {len(ids)} in the checkpoint")
            self._parameters.update(zip(ids, group["params"], strict=False))
        self._homes = match.homes
        fillable = self._plain = _is_plain(optimizer)
        self._knows_shapes = fillable and type(optimizer).__module__.startswith("torch.optim.")
        for name, child in inner["state"]["dict"].items():
            self._compare(name, child, f"{path}/state/{name}", match)
            self._offer(name, child, f"{path}/state/{name}", match, fillable=fillable)

    def _compare(self, name: str, node: Any, path: str, match: "Matching") -> None:
        """State that exists already must have the shapes of the checkpoint's, and moments those of their parameters."""
        parameter = self._parameters.get(keys.unescape(name))
        before = self._optimizer.state.get(parameter, {}) if parameter is not None else {}
        if not isinstance(node, dict) or not isinstance(before, dict):
            return
        if parameter is not None and self._knows_shapes:
            for key in _SHAPED_AS_PARAMETER & node.get("dict", {}).keys() - before.keys():
                inner = f"{path}/{key}"
                if node["dict"][key] == "tensor" and tuple(match.spec(inner)[1]) != tuple(parameter.shape):
                    match.problems.append(
                        f"{inner}: shape {tuple(match.spec(inner)[1])} in the checkpoint, but the parameter at this place has "
                        f"{tuple(parameter.shape)}: the optimizer was made from other parameters, or in another order"
                    )
        for key, value in before.items():
            inner = f"{path}/{keys.escape(key)}"
            if isinstance(value, torch.Tensor) and node.get("dict", {}).get(keys.escape(key)) == "tensor":
                shape = tuple(match.spec(inner)[1])
                if shape != tuple(value.shape):
                    match.problems.append(
                        f"{inner}: shape {tuple(value.shape)} in the state, {shape} in the checkpoint"
                    )

    def _offer(self, name: str, node: Any, path: str, match: "Matching", *, fillable: bool) -> None:
        """Values go into state that exists, bytes perhaps straight there, or into new tensors where it does not."""
        parameter = self._parameters.get(keys.unescape(name))
        if parameter is None or not isinstance(node, dict):
            return
        match.goes_to(parameter.device)
        before = self._optimizer.state.get(parameter, {})
        before = {keys.escape(key): value for key, value in before.items()} if isinstance(before, dict) else {}
        for key, kind in node.get("dict", {}).items():
            if kind == "tensor" and key not in before:
                if fillable and parameter.device.type == "cpu" and parameter.is_contiguous():
                    match.homes.offer_new(f"{path}/{key}")
            elif kind == "tensor" and isinstance(before[key], torch.Tensor):
                match.homes.offer(f"{path}/{key}", before[key], fillable=fillable)

    def __call__(self, get: Getter) -> None:
        """Load."""
        with torch.inference_mode(mode=False):  # or new state could not be stepped
            self._load(get)

    def _load(self, get: Getter) -> None:
        optimizer = self._optimizer
        before = {parameter: dict(inner) for parameter, inner in optimizer.state.items() if isinstance(inner, dict)}
        groups = [dict(group) for group in optimizer.param_groups]
        saved = self._saved(get)
        seen = [saved]  # what users' pre-hooks made of it; ours runs last
        hook = optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state))
        try:
            optimizer.load_state_dict(saved)
        finally:
            hook.remove()
        final = seen[-1]
        ids = chain.from_iterable(group["params"] for group in final["param_groups"])
        for group in optimizer.param_groups:
            hosted = bool(group.get("fused") or group.get("capturable"))  # torch keeps `step` beside these parameters
            # the parameters first: at a group's end zip must not take an id that belongs to the next group
            for parameter, number in zip(group["params"], ids, strict=False):
                if number in final["state"] and parameter in optimizer.state:
                    old = self._uncrowded(before.get(parameter, {}), number)
                    self._put_right(optimizer.state[parameter], final["state"][number], old, parameter, hosted=hosted)
        _keep_group_tensors(optimizer, groups)

    def _uncrowded(self, before: dict[Any, Any], number: Any) -> dict[Any, Any]:
        """Without the tensors that share memory with what gets another value: copied into, they would overwrite it."""
        crowded = self._homes.crowded
        if not crowded:
            return before
        path = f"{self._path}/state/{keys.escape(number)}"
        return {key: value for key, value in before.items() if f"{path}/{keys.escape(key)}" not in crowded}

    def _put_right(
        self, current: dict[Any, Any], saved: Any, before: dict[Any, Any], parameter: torch.Tensor, *, hosted: bool
    ) -> None:
        """Give each loaded value of one parameter its stored dtype, in the tensor that held it before where one fits.

        What the optimizer's own code made of a value while it loaded stays.
        """
        for key, value in saved.items() if isinstance(saved, dict) else ():
            if key not in current:
                continue
            if id(value) in self._homes.handed and value.device == parameter.device:
                self._homes.handed.discard(id(value))  # made for this state; another that asks for it gets a copy
                current[key] = value
                continue
            old = before.get(key)
            device = None if key == "step" and not hosted else parameter.device
            if self._plain and _brought(value, current[key]):
                if not isinstance(old, torch.Tensor) and _like(current[key], parameter):
                    continue
                value = current[key]
            if not self._plain and _differ(current[key], _as_torch_loads(value, key, parameter, hosted=hosted)):
                value = current[key]
            current[key] = _exact(value, current[key], old, device, parameter)

    def _saved(self, get: Getter) -> dict[str, Any]:
        """The state dict. torch's own loader alone may see the restore's buffers: what it keeps of them is replaced after it."""
        inner, path = self._node["dict"], self._path
        copies = private(get)
        lent = get if self._plain else copies
        states = {}
        for name, node in inner["state"]["dict"].items():
            key = keys.unescape(name)
            given = lent if key in self._parameters else copies
            states[key] = unflatten(node, given, self._values, f"{path}/state/{name}")
        groups = unflatten(inner["param_groups"], copies, self._values, f"{path}/param_groups")
        for group in groups if self._plain else ():
            group["params"] = _Ids(group["params"])
        return {"state": states, "param_groups": groups}


def _compare_options(group: Mapping[str, Any], node: Any, path: str, match: "Matching") -> None:
    """Options that only one side has come and go with torch's versions; when both sides have some, the kinds of optimizer differ."""
    saved = set(entries_of(node, path) or ())
    ours = {keys.escape(key) for key in group}
    if ours - saved and saved - ours:
        match.unexpected(
            f"{path} ({', '.join(sorted(saved - ours))}; the state's optimizer has {', '.join(sorted(ours - saved))})"
        )


def _is_plain(optimizer: Optimizer) -> bool:
    """Does nobody but torch look at the state while it is loaded?"""
    kind = type(optimizer)
    return (
        (kind.__setstate__ is Optimizer.__setstate__ or kind.__setstate__.__module__.startswith("torch.optim."))
        and type(optimizer).load_state_dict is Optimizer.load_state_dict
        and "load_state_dict" not in optimizer.__dict__
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
    )


def _as_torch_loads(saved: Any, key: Any, parameter: torch.Tensor, *, hosted: bool) -> Any:
    """`Optimizer._process_value_according_to_param_policy`, torch 2.13."""
    if not isinstance(saved, torch.Tensor) or (key == "step" and not hosted):
        return saved
    dtype = torch.float32 if key == "step" else parameter.dtype if parameter.is_floating_point() else saved.dtype
    return saved.to(dtype=dtype, device=parameter.device)


def _brought(saved: Any, current: Any) -> bool:
    """Has torch made a copy of these very bits on another device? Then they need not cross the link a second time."""
    return (
        isinstance(saved, torch.Tensor)
        and isinstance(current, torch.Tensor)
        and saved.device != current.device
        and (saved.dtype, saved.shape) == (current.dtype, current.shape)
    )


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Does it lie as its parameter does? Fused kernels walk both side by side; what has another shape they never walk."""
    return tensor.shape != parameter.shape or tensor.stride() == parameter.stride()


def _differ(left: Any, right: Any) -> bool:
    """Are these two tensors with other bits? What is no tensor is taken as the optimizer has it, anyway."""
    return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and not bits_equal(left, right)


def _exact(
    saved: Any, current: Any, before: Any, device: torch.device | None, parameter: torch.Tensor | None = None
) -> Any:
    """`current` as torch left it, with the values of `saved`. Nothing of `saved` is kept. `device` None: where torch left it."""
    if isinstance(saved, torch.Tensor):
        if not isinstance(current, torch.Tensor) or current.shape != saved.shape:
            return current.clone() if isinstance(current, torch.Tensor) else current
        place = device or (before.device if isinstance(before, torch.Tensor) else current.device)
        fits = (saved.shape, saved.dtype, place)
        if isinstance(before, torch.Tensor) and (before.shape, before.dtype, before.device) == fits:
            copy_exact(before, saved)
            return before
        return _new(saved, place, parameter)
    if isinstance(saved, dict) and isinstance(current, dict):
        return {key: _exact(saved.get(key), inner, None, device) for key, inner in current.items()}
    if isinstance(saved, list | tuple) and isinstance(current, list | tuple) and len(saved) == len(current):
        return type(current)(_exact(one, inner, None, device) for one, inner in zip(saved, current, strict=True))
    return current


def _new(saved: torch.Tensor, device: torch.device, parameter: torch.Tensor | None) -> torch.Tensor:
    """A copy that may be kept. Shaped as its parameter it gets the same strides: fused kernels walk both side by side."""
    if parameter is None or type(parameter) not in (torch.Tensor, nn.Parameter) or parameter.shape != saved.shape:
        return saved.detach().to(device, copy=True)
    return torch.empty_like(parameter, dtype=saved.dtype, device=device, requires_grad=False).copy_(saved)


def _keep_group_tensors(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """A learning rate that is a tensor stays the same tensor: compiled steps and the user hold it."""
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        for key, value in group.items():
            before = old.get(key)
            if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor) or before is value:
                continue
            if (value.shape, value.dtype) == (before.shape, before.dtype):
                copy_exact(before, value)
                group[key] = before
