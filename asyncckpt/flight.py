"""One save between its arena and its answer."""

import functools
import platform
import time
from dataclasses import dataclass, field
from typing import Literal

import torch

import asyncckpt
from asyncckpt import errors
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import SaveJob
from asyncckpt.lineage import Arrival
from asyncckpt.planner import Planned
from asyncckpt.request import SaveRequest
from asyncckpt.save import Save
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.ranks import world_size


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

    def new_job(self, attempt: str, arrival: Arrival, *, probe: bool) -> SaveJob:
        """What the engine is asked for."""
        request, planned = self.request, self.planned
        return SaveJob(
            number=self.save._number,
            step=request.step,
            attempt=attempt,
            structure=planned.number,
            arena=self.arena.number,
            codec=planned.plan.codec,
            time_s=time.time(),
            epoch=request.epoch,
            metrics=dict(request.metrics),
            config=request.config.value,
            tags=tuple(request.tags),
            pinned=request.pinned,
            versions=_versions(),
            world_size=world_size(),
            lineage=arrival.lineage,
            on_exists=request.on_exists,
            probe=probe,
            newcomer=arrival.newcomer,
            restored=arrival.restored,
        )

    def blames_codec(self, error: BaseException | None) -> bool:
        """Whether it was staged and failed on its way, and not because its step was taken."""
        staged = self.copy is not None and self.copy.error is None
        return staged and error is not None and not isinstance(error, errors.CheckpointConflictError)


@functools.cache
def _versions() -> dict[str, str]:
    return {"asyncckpt": asyncckpt.__version__, "torch": torch.__version__, "python": platform.python_version()}
