"""This package, in its default configuration unless its name says otherwise."""

import shutil
from pathlib import Path
from typing import Any

import torch

import asyncckpt
from asyncckpt.events import Event, SaveCommitted, SaveFailed, SaveReport, SaveSkipped, SaveStaged
from benchmarks.peers import objects
from benchmarks.peers.base import Peer, Saving, bytes_below, leaf_paths
from benchmarks.states import State
from benchmarks.stores.base import Place


class AsyncCkpt(Peer):
    """`options`: those of `asyncckpt.Saver`."""

    name = "asyncckpt"
    measures_itself = True  # codec "auto"
    guards_steps = True
    asynchronous = True
    stores = frozenset({"folder", "s3"})

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place)
        self.reports: dict[int, SaveReport] = {}
        self._savings: dict[int, Saving] = {}
        self._url = place.url or self.folder
        self._s3 = _s3_options(place) if place.kind == "s3" else None
        self._saver = asyncckpt.Saver(self._url, store=self._s3, hooks=[self._on_event], **options)

    def prepare(self, state: State) -> None:
        self._saver.prepare(state.objects)

    def save(self, step: int, state: State) -> Saving:
        saving = self._savings[step] = Saving(step)
        self._saver.save(step, state.objects)
        saving.returned()
        return saving

    def restore(self, step: int, state: State) -> None:
        asyncckpt.restore(self._url, state.objects, step=step, store=self._s3)

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor:
        name = "/".join(f"#{key}" if isinstance(key, int) else key for key in leaf_paths(state)[index])
        with asyncckpt.Run(self._url, store=self._s3) as run:
            return run.get(step).tensor(name)

    def stored_bytes(self, step: int) -> int:
        if self.place.kind == "s3":
            return objects.bytes_at(self.place, f"step-{step:010d}")
        return sum(bytes_below(path) for path in self._paths(step))

    def forget(self, step: int) -> None:
        if self.place.kind == "s3":
            objects.delete_at(self.place, f"step-{step:010d}.json")  # the record first
            objects.delete_at(self.place, f"step-{step:010d}")
            return
        for path in sorted(self._paths(step), key=Path.is_dir):  # the record first
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        self._saver.close()

    def _paths(self, step: int) -> list[Path]:
        return list(self.folder.glob(f"step-{step:010d}*"))

    def _on_event(self, event: Event) -> None:
        """On the listener thread, like a peer's future callbacks."""
        if isinstance(event, SaveStaged):
            self._savings[event.step].staged(event.staged_s)
        elif isinstance(event, SaveCommitted):
            self.reports[event.report.step] = event.report
            self._savings[event.report.step].durable()
        elif isinstance(event, SaveFailed):
            self._savings[event.step].durable(event.error)
        elif isinstance(event, SaveSkipped):
            self._savings[event.step].durable(RuntimeError(f"step {event.step} was skipped: {event.reason}"))


def _s3_options(place: Place) -> asyncckpt.S3Options:
    return asyncckpt.S3Options(
        endpoint_url=place.endpoint_url, region=place.region, single_writer=not place.conditional_puts
    )


class AsyncCkptNone(AsyncCkpt):
    """Without compression."""

    name = "asyncckpt-none"
    measures_itself = False

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **{"codec": "none"} | options)


class AsyncCkptPlanes(AsyncCkpt):
    """Byte planes, compressed, whatever the store."""

    name = "asyncckpt-planes"
    measures_itself = False

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **{"codec": "planes"} | options)


class AsyncCkptZstd(AsyncCkpt):
    """Compressed, without byte planes: what `zstd -d` unpacks into a safetensors file."""

    name = "asyncckpt-zstd"
    measures_itself = False

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **{"codec": "zstd"} | options)


class AsyncCkptEager(AsyncCkpt):
    """`save()` returns when the snapshot is complete."""

    name = "asyncckpt-eager"

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **{"overlap": False} | options)


class AsyncCkptOneWorker(AsyncCkpt):
    name = "asyncckpt-1worker"

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **{"workers": 1} | options)
