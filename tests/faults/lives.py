"""A life: what one process does between its start and its end, and what it tells of it.

Every fact is told before the life goes on, so what a killed process had told is what it had known.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from asyncckpt import Run, S3Options, Saver
from asyncckpt.checkpoints import standing
from asyncckpt.engine import pipeline
from asyncckpt.errors import CheckpointConflictError, CheckpointError
from asyncckpt.options import KeepRule
from asyncckpt.store.base import Patience, Store
from asyncckpt.store.local import LocalStore

PATIENCE_S = 30.0
ELEMENTS = 16_400  # just above 64 KiB: such a tensor has blocks of its own
_PART_BYTES = 30_000

Tell = Callable[..., None]


_SCALED: list[tuple[Any, str, Any]] = [
    (pipeline, "PART_BYTES", _PART_BYTES),
    (pipeline, "LOCAL_UPLOADS", 1),
    (pipeline, "REMOTE_UPLOADS", 1),
    (standing, "STUMP_S", 0.01),
    (Store, "patience", Patience((0.001, 0.001), deadline_s=1.0)),
    (LocalStore, "patience", Patience((0.001, 0.001), deadline_s=1.0)),
]


def scale_limits() -> None:
    """Small shards go up in parts as large ones do, one request at a time, and who looks twice does not wait for seconds."""
    for place, name, value in _SCALED:
        setattr(place, name, value)
    torch.set_num_threads(1)


@contextmanager
def limits_as_before() -> Iterator[None]:
    """Scaled limits are a process's own; whoever goes on with other things puts them back."""
    before = [(place, name, getattr(place, name)) for place, name, _ in _SCALED]
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        torch.set_num_threads(threads)


def state_of(content: int) -> dict[str, Any]:
    """A state that is another one for every number."""
    generator = torch.Generator().manual_seed(content)
    model = {name: torch.rand(ELEMENTS, generator=generator) for name in ("first", "second")}
    return {"model": model, "moments": {"m": torch.rand(50, generator=generator)}, "content": content}


def content_of(state: dict[str, Any]) -> int | None:
    """The number of a state, if it is that one's bit for bit."""
    content = state["content"]
    expected = state_of(content)
    for group in ("model", "moments"):
        for name, tensor in expected[group].items():
            if not torch.equal(state[group][name], tensor):
                return None
    return content


class Life:
    """One process's life at `url`; `store` as a Saver takes it. `number` makes its contents its own."""

    def __init__(
        self, number: int, tell: Tell, *, url: str, store: Store | S3Options | None, engine: str | None = None
    ) -> None:
        self.number = number
        self.tell = tell
        self.url = url
        self._store = store
        self._engine = engine

    def saver(self, keep: tuple[KeepRule, ...] = ()) -> Saver:
        return Saver(self.url, keep=keep, store=self._store, engine=self._engine, workers=1, codec="none")

    def save(self, saver: Saver, step: int, *, writer: int = 0) -> None:
        """Save the step and tell how it went. `writer`: one of several in this life."""
        content = self.number * 100_000 + writer * 10_000 + step
        self.tell(saving=step, content=content)
        try:
            report = saver.save(step, state_of(content)).result(PATIENCE_S)
        except CheckpointConflictError:
            self.tell(exists=step)
        except TimeoutError:
            self.tell(hung=f"save of step {step}")
        except CheckpointError as error:
            self.tell(failed=step, error=f"{type(error).__name__}: {error}")
        else:
            if report.skipped:
                self.tell(exists=step)
            else:
                self.tell(committed=step, content=content)

    def restore(self, saver: Saver) -> int:
        """Restore the newest and tell which that was; its step, 0 if there is none."""
        state = state_of(1)
        restored = saver.restore(state)
        step = restored.step if restored else 0
        self.tell(restored=step, content=content_of(state) if restored else 0)
        return step

    def rewind(self, step: int) -> None:
        self.tell(rewinding=step)
        with Run(self.url, store=self._store) as run:
            run.rewind(step)
        self.tell(rewound=step)


def live(life: Life, act: Callable[[Life], None]) -> None:
    """Run an act to its end. A typed error ends a life as a script's would; anything else is told of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act(life)
        except CheckpointError as error:
            life.tell(ended=f"{type(error).__name__}: {error}")
        except Exception as error:
            life.tell(untyped=f"{type(error).__name__}: {error}")
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("asyncckpt")]
    for thread in ours:  # one that watches a store that outlives this life ends a moment behind its last request
        thread.join(1.0)
    left = [thread.name for thread in ours if thread.is_alive()]
    if left:
        life.tell(left=f"threads: {left}")
    life.tell(over=life.number)
