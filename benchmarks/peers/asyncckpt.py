"""This package, in its default configuration unless its name says otherwise."""

import shutil
from pathlib import Path
from typing import Any

import asyncckpt
from asyncckpt.events import Event, SaveCommitted, SaveFailed, SaveReport, SaveSkipped, SaveStaged
from benchmarks.peers.base import Peer, Saving, bytes_below
from benchmarks.states import State


class AsyncCkpt(Peer):
    name = "asyncckpt"
    guards_steps = True

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder)
        self.reports: dict[int, SaveReport] = {}
        self._savings: dict[int, Saving] = {}
        self._saver = asyncckpt.Saver(self.folder, hooks=[self._on_event], **options)

    def prepare(self, state: State) -> None:
        self._saver.prepare(state.objects)

    def save(self, step: int, state: State) -> Saving:
        saving = self._savings[step] = Saving(step)
        self._saver.save(step, state.objects)
        saving.returned()
        return saving

    def restore(self, step: int, state: State) -> None:
        asyncckpt.restore(self.folder, state.objects, step=step)

    def stored_bytes(self, step: int) -> int:
        return sum(bytes_below(path) for path in self._paths(step))

    def forget(self, step: int) -> None:
        for path in sorted(self._paths(step), key=Path.is_dir):  # the record first
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        self._saver.close()

    def _paths(self, step: int) -> list[Path]:
        return list(self.folder.glob(f"step-{step:010d}*"))

    def _on_event(self, event: Event) -> None:
        """On the listener thread, like a peer's future callbacks."""
        if isinstance(event, SaveStaged):
            self._savings[event.step].staged()
        elif isinstance(event, SaveCommitted):
            self.reports[event.report.step] = event.report
            self._savings[event.report.step].durable()
        elif isinstance(event, SaveFailed):
            self._savings[event.step].durable(event.error)
        elif isinstance(event, SaveSkipped):
            self._savings[event.step].durable(RuntimeError(f"step {event.step} was skipped: {event.reason}"))


class AsyncCkptRaw(AsyncCkpt):
    """Without compression."""

    name = "asyncckpt-none"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, codec="none")
