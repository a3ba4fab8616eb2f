"""Loading an optimizer exactly.

`Optimizer.load_state_dict` casts state to the dtype of its parameter (fp32 moments of a bf16 parameter lose 16 bits) and keeps
the tensors it is given. It still runs, for its checks, hooks and defaults; then the state is put right.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncckpt.format import keys
from asyncckpt.state.arrangement import NO_OPTIONS, arrange, placed
from asyncckpt.state.copying import Getter, bits_equal, copy_exact, private
from asyncckpt.state.tree import entries_of, unflatten

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


NEEDS = {
    "Adadelta": frozenset({"step", "square_avg", "acc_delta"}),
    "Adafactor": frozenset({"step"}),
    "Adagrad": frozenset({"step", "sum"}),
    "Adam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "AdamW": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "Adamax": frozenset({"step", "exp_avg", "exp_inf"}),
    "ASGD": frozenset({"step", "eta", "mu", "ax"}),
    "Muon": frozenset({"momentum_buffer"}),
    "NAdam": frozenset({"step", "exp_avg", "exp_avg_sq", "mu_product"}),
    "RAdam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "RMSprop": frozenset({"step", "square_avg"}),
    "Rprop": frozenset({"step", "prev", "step_size"}),
    "SparseAdam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
}
"""What a step of torch.optim's own classes reads of a parameter that has state (their sources, torch 2.13)."""


_NEEDED_BY = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
"""And what it reads under an option."""


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
        self._homes = match.homes
        fillable = self._plain = _is_plain(optimizer)
        self._is_torchs = type(optimizer).__module__.startswith("torch.optim.")
        inner = node["dict"]
        arrangement = arrange(optimizer, node, path, match)
        if arrangement is None:
            return
        self._arrangement = arrangement
        match.need(inner["param_groups"], f"{path}/param_groups")
        for at, source in enumerate(arrangement.sources):
            if (asked := source or 0) < len(
                inner["param_groups"].get("list", [])
            ):  # one that takes none is of the same kind, too
                below = f"{path}/param_groups/{keys.escape(asked)}"
                _compare_options(optimizer.param_groups[at], inner["param_groups"]["list"][asked], below, match)
        self._parameters = placed(optimizer, arrangement)
        match.found += bool(self._parameters)
        if arrangement.sources != list(range(len(inner["param_groups"]["list"]))):
            match.regrouped.add(id(optimizer))
        for name, child in inner["state"]["dict"].items():
            below = f"{path}/state/{name}"
            if keys.unescape(name) in arrangement.lost or self._reshaped(name, child, below, match):
                continue
            match.need(child, below)
            self._compare(name, child, below, match)
            self._offer(name, child, below, match, fillable=fillable)
        if arrangement.by_name:
            self._parameters = placed(optimizer, arrangement)
            self._compare_kept(match)

    def _reshaped(self, name: str, node: Any, path: str, match: "Matching") -> bool:
        """Under `strict=False` a parameter whose shape has changed, as its name tells for certain, keeps the state that it has."""
        number = keys.unescape(name)
        if match.strict or not self._arrangement.by_name or number not in self._parameters:
            return False
        found = [inner for inner, _, _ in self._other_shapes(number, node, path, match)]
        match.reshaped += found
        if found:
            self._arrangement.drop(number)
        return bool(found)

    def _other_shapes(
        self, number: Any, node: Any, path: str, match: "Matching"
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
        """State whose stored shape is not that of the live one, or not of its parameter (then None)."""
        parameter = self._parameters[number]
        before = _state_of(self._optimizer, parameter)
        children = node.get("dict", {}) if isinstance(node, dict) else {}
        for key in [key for key, child in children.items() if child == "tensor"]:
            shape = tuple(match.spec(f"{path}/{key}")[1])
            if key not in before and self._plain and self._is_torchs and key in _SHAPED_AS_PARAMETER:
                if shape != tuple(parameter.shape):
                    yield f"{path}/{key}", shape, None
            elif isinstance(before.get(key), torch.Tensor) and shape != tuple(before[key].shape):
                yield f"{path}/{key}", shape, tuple(before[key].shape)

    def _compare(self, name: str, node: Any, path: str, match: "Matching") -> None:
        """State that exists already must have the shapes of the checkpoint's, moments those of their parameters, and all of it a kind."""
        number = keys.unescape(name)
        if number not in self._parameters or not isinstance(node, dict):
            return
        parameter = self._parameters[number]
        for inner, shape, live in self._other_shapes(number, node, path, match):
            if live is None:
                match.problems.append(
                    f"{inner}: shape {shape} in the checkpoint, but the parameter at this place has "
                    f"{tuple(parameter.shape)}: the optimizer was made from other parameters, or in another order"
                )
            else:
                match.problems.append(f"{inner}: shape {live} in the state, {shape} in the checkpoint")
        saved = set(node.get("dict", {}))
        kind = type(self._optimizer)
        lacking = NEEDS.get(kind.__name__, frozenset()) - saved if saved and self._is_torchs else frozenset()
        own = set(_state_of(self._optimizer, parameter))
        if not self._is_torchs and own - saved and saved - own and not (own & saved) - {"step"}:
            lacking = frozenset(own - saved)
        if lacking:
            match.problems.append(
                f"{path}: without {', '.join(sorted(map(str, lacking)))}, which {kind.__name__} needs: the checkpoint holds another kind of optimizer"
            )

    def _compare_kept(self, match: "Matching") -> None:
        """State that a parameter keeps must serve the options that its group takes from the checkpoint."""
        found, groups = self._arrangement, self._optimizer.param_groups
        for group, ids, source in zip(groups, found.ids, found.sources, strict=True) if self._is_torchs else ():
            path = f"{self._path}/param_groups/{keys.escape(source or 0)}"
            needed = {
                key for option, key in _NEEDED_BY.items() if source is not None and match.values.get(f"{path}/{option}")
            }
            for parameter, number in zip(group["params"], ids, strict=True):
                kept = _state_of(self._optimizer, parameter) if number not in self._parameters else {}
                if kept and needed - set(kept):
                    match.problems.append(
                        f"{path}: its options need {', '.join(sorted(needed - set(kept)))}, which a parameter's state lacks"
                    )

    def _offer(self, name: str, node: Any, path: str, match: "Matching", *, fillable: bool) -> None:
        """Values go into state that exists, bytes perhaps straight there, or into new tensors where it does not."""
        parameter = self._parameters.get(keys.unescape(name))
        if parameter is None or not isinstance(node, dict):
            return
        match.goes_to(parameter.device)
        before = _state_of(self._optimizer, parameter)
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
            if key in self._arrangement.lost:
                continue
            given = lent if key in self._parameters else copies
            states[key] = unflatten(node, given, self._values, f"{path}/state/{name}")
        if self._arrangement.as_stored:
            groups = unflatten(inner["param_groups"], copies, self._values, f"{path}/param_groups")
        else:
            groups = self._regrouped(copies)
            states |= self._kept()
        for group in groups if self._plain else ():
            group["params"] = _Ids(group["params"])
        return {"state": states, "param_groups": groups}

    def _regrouped(self, copies: Getter) -> list[dict[str, Any]]:
        """The live groups, each with the options that its parameters were saved with."""
        groups = []
        nodes = self._node["dict"]["param_groups"]["list"]
        for group, ids, source in zip(
            self._optimizer.param_groups, self._arrangement.ids, self._arrangement.sources, strict=True
        ):
            options = dict(group)
            if source is not None:
                below = f"{self._path}/param_groups/{keys.escape(source)}"
                options = unflatten(nodes[source], copies, self._values, below)
            own = {key: group[key] for key in NO_OPTIONS & group.keys()}
            kept = {key: value for key, value in options.items() if key not in NO_OPTIONS}
            groups.append(kept | own | {"params": ids})
        return groups

    def _kept(self) -> dict[Any, Any]:
        """State of the parameters that the checkpoint has nothing for."""
        pairs = zip(
            chain.from_iterable(self._arrangement.ids),
            chain.from_iterable(group["params"] for group in self._optimizer.param_groups),
            strict=True,
        )
        return {
            number: dict(self._optimizer.state[parameter])
            for number, parameter in pairs
            if number not in self._parameters and parameter in self._optimizer.state
        }


def _state_of(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """What an optimizer has of a parameter by now, by escaped key."""
    inner = optimizer.state.get(parameter, {})
    return {keys.escape(key): value for key, value in inner.items()} if isinstance(inner, dict) else {}


def _compare_options(group: Mapping[str, Any], node: Any, path: str, match: "Matching") -> None:
    """Options that only one side has come and go with torch's versions; when both sides have some, the kinds of optimizer differ.

    State of one kind under the options of another breaks the next step, so `strict=False` does not skip it.
    """
    saved = set(entries_of(node, path) or ()) - NO_OPTIONS
    ours = {keys.escape(key) for key in group} - NO_OPTIONS
    if ours - saved and saved - ours:
        match.problems.append(
            f"{path}: another kind of optimizer was saved, with {', '.join(sorted(saved - ours))}; "
            f"the state's has {', '.join(sorted(ours - saved))}"
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
