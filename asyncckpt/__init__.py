"""Asynchronous, high-throughput checkpoints for PyTorch training.

`Saver` saves in the background, `restore` and `load` bring a checkpoint back, `Run` tells what exists. Names are imported when they
are first used: the checkpoint service imports this package too, and must stay free of torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncckpt import errors, events
    from asyncckpt.events import SaveReport
    from asyncckpt.options import Best, KeepEvery, KeepLast, RetryPolicy, S3Options
    from asyncckpt.restore import Restored, load, restore
    from asyncckpt.run import Checkpoint, Run
    from asyncckpt.save import Save
    from asyncckpt.saver import Saver
    from asyncckpt.state.capture import Replicated
    from asyncckpt.state.rng import RNG

__version__ = "0.1.0"

_HOMES = {
    "Best": "options",
    "Checkpoint": "run",
    "KeepEvery": "options",
    "KeepLast": "options",
    "RNG": "state.rng",
    "Replicated": "state.capture",
    "Restored": "restore",
    "RetryPolicy": "options",
    "Run": "run",
    "S3Options": "options",
    "Save": "save",
    "SaveReport": "events",
    "Saver": "saver",
    "errors": "",
    "events": "",
    "load": "restore",
    "restore": "restore",
}

__all__ = [
    "RNG",
    "Best",
    "Checkpoint",
    "KeepEvery",
    "KeepLast",
    "Replicated",
    "Restored",
    "RetryPolicy",
    "Run",
    "S3Options",
    "Save",
    "SaveReport",
    "Saver",
    "errors",
    "events",
    "load",
    "restore",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncckpt' has no attribute {name!r}")
    if home == "":
        return importlib.import_module(f"asyncckpt.{name}")
    value = getattr(importlib.import_module(f"asyncckpt.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps `asyncckpt.restore` the function: importing the submodule of that name would bind the module instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.restore if name == "restore" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
