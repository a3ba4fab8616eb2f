"""One save between its arena and its answer."""

import functools
import platform
from dataclasses import dataclass, field
from typing import Literal

import torch

import asyncckpt
from asyncckpt import errors
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import SaveJob
from asyncckpt.planner import Planned
from asyncckpt.request import SaveRequest
from asyncckpt.save import Save
from asyncckpt.state.in_flight import Copy


@dataclass(slots=True)
class Flight:
    """What the launcher keeps of a save that has an arena."""

    save: Save
    arena: Arena
    planned: Planned
    request: SaveRequest
    copy: Copy | None = None
    job: SaveJob | None = None
    _owner: dict[str, str] = field(default_factory=dict)

    def claim(self, who: Literal["caller", "engine"]) -> bool:
        """Whether the save is this one's from now on. Who asks first gets it: an interrupted caller takes it back, or the engine answers."""
        return self._owner.setdefault("owner", who) == who

    def blames_codec(self, error: BaseException | None) -> bool:
        """Whether it was staged and failed on its way, and not because its step was taken."""
        staged = self.copy is not None and self.copy.error is None
        return staged and error is not None and not isinstance(error, errors.CheckpointConflictError)


@functools.cache
def versions() -> dict[str, str]:
    """What made this save."""
    return {"asyncckpt": asyncckpt.__version__, "torch": torch.__version__, "python": platform.python_version()}
