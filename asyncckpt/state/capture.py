"""Objects with `state_dict()`: found, unwrapped from their wrappers, and captured."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"): "optimizer",
    ("accelerate", "AcceleratedScheduler"): "scheduler",
    ("lightning", "LightningOptimizer"): "_optimizer",
    ("pytorch_lightning", "LightningOptimizer"): "_optimizer",
    ("lightning", "_FabricModule"): "_original_module",
    ("lightning", "_FabricOptimizer"): "_optimizer",
    ("lightning_fabric", "_FabricModule"): "_original_module",
    ("lightning_fabric", "_FabricOptimizer"): "_optimizer",
}
"""Package and class name, as no wrapper's package is imported, to the attribute that holds the wrapped object."""

_COMPILED = "_orig_mod."


@dataclass(frozen=True, slots=True)
class Replicated:
    """A promise: `value` is the same on every rank, so rank 0's is stored for all, without an error or a warning.

    It leaves no trace in the checkpoint: path and content are those of `value`, in `save()` and in `restore()`.
    """

    value: Any


def is_stateful(thing: Any) -> bool:
    """Has it state to give and to take back?"""
    if type(thing) is Replicated:
        return is_stateful(thing.value)
    if isinstance(thing, type):
        return False
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def unwrap(thing: Any) -> Any:
    """The object that a wrapper of DDP, `torch.compile`, accelerate or Lightning holds, so that names do not depend on it."""
    while True:
        if isinstance(thing, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            thing = thing.module
        elif type(thing) is Replicated:
            thing = thing.value
        elif is_compiled(type(thing)):
            thing = thing._orig_mod
        elif attribute := _wrapper_attribute(thing.__class__):
            thing = getattr(thing, attribute)
        else:
            return thing


def is_gathered_on_one_rank(thing: Any) -> bool:
    """Does `state_dict()` raise on every rank but the one that it was gathered on (`consolidate_state_dict(to=0)`)?"""
    return any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(thing).__mro__)


def is_stateful_loader(thing: Any) -> bool:
    """Is it torchdata's StatefulDataLoader, or what accelerate wraps around one? Neither package is imported."""
    return any(
        (base.__module__.partition(".")[0], base.__name__) == ("torchdata", "StatefulDataLoader")
        for base in thing.__class__.__mro__  # not `type(thing)`: accelerate's loaders claim the class that they hold
    )


def loader_way_out(thing: Any) -> str | None:
    """For one of accelerate's loaders that has the methods and no state."""
    if type(thing).__module__.partition(".")[0] != "accelerate" or not isinstance(thing, DataLoader):
        return None
    if is_stateful_loader(thing):
        return None
    return (
        "leave it out of the state, or make the Accelerator with "
        "dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True)"
    )


def is_compiled(kind: type) -> bool:
    """Is it the wrapper that `torch.compile(module)` returns?"""
    return kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")


@functools.lru_cache(maxsize=64)
def _wrapper_attribute(kind: type) -> str | None:
    for base in kind.__mro__:
        found = _WRAPPERS.get((base.__module__.partition(".")[0], base.__name__))
        if found:
            return found
    return None


def capture_module(module: nn.Module) -> tuple[list[str], list[Any]]:
    """Names and values of `module.state_dict(keep_vars=True)`, without the names' traces of `torch.compile`.

    Modules that customise nothing are walked directly: the same result in a third of the time.
    """
    names: list[str] = []
    children: list[Any] = []
    if _plain_slots(module, "", names, children, {}):
        return names, children
    state = state_dict(module)
    return list(clean_names(module, state).values()), list(state.values())


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The module's own state dict, with the live tensors where it can give them."""
    state: dict[str, Any]
    state = module.state_dict(keep_vars=True) if _takes_keep_vars(module.state_dict) else module.state_dict()
    return state


def clean_names(module: nn.Module, state: Iterable[str]) -> dict[str, str]:
    """Each key of a module's state dict to the key without the components that compiled submodules add."""
    compiled = any(is_compiled(type(inner)) for inner in module.modules())
    return {name: name.replace(_COMPILED, "") if compiled else name for name in state}


def _takes_keep_vars(state_dict: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(state_dict).parameters
    except (TypeError, ValueError):
        return False
    return "keep_vars" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _plain_slots(module: nn.Module, prefix: str, names: list[str], children: list[Any], seen: dict[type, bool]) -> bool:
    """Append what `state_dict` would; False: something below customises it, and `names` are of no use."""
    kind, inside = type(module), module.__dict__
    plain = seen.get(kind)
    if plain is None:
        plain = seen[kind] = _is_plain(kind)
    if _customised(inside):
        return False
    if is_compiled(kind):
        return _plain_slots(inside["_modules"]["_orig_mod"], prefix, names, children, seen)
    if not plain:
        return False
    for name, parameter in inside["_parameters"].items():
        if parameter is not None:
            names.append(prefix + name)
            children.append(parameter)
    if inside["_buffers"]:
        passing = inside["_non_persistent_buffers_set"]
        kept = [(n, buffer) for n, buffer in inside["_buffers"].items() if buffer is not None and n not in passing]
        names += [prefix + name for name, _ in kept]
        children += [buffer for _, buffer in kept]
    inner = [(name, child) for name, child in inside["_modules"].items() if child is not None]
    return all(_plain_slots(child, f"{prefix}{name}.", names, children, seen) for name, child in inner)


def _is_plain(kind: type[nn.Module]) -> bool:
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and kind.get_extra_state is nn.Module.get_extra_state
    )


def _customised(inside: dict[str, Any]) -> bool:
    """Do hooks or attributes of this instance, or its lack of the usual slots, change what `state_dict` gives?"""
    return (
        bool(inside.get("_state_dict_hooks", True) or inside.get("_state_dict_pre_hooks", True))
        or "state_dict" in inside
        or "_save_to_state_dict" in inside
        or "get_extra_state" in inside
    )
