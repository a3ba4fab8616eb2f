"""Meta's `torch_checkpointing`: a `CheckpointManager` that saves asynchronously into a folder.

With its defaults, which its METADATA and docstrings name as the fast way: staging on a thread into shared memory (`CheckpointStagerConfig`; pinned
memory and non-blocking copies where there is CUDA), a process that writes. On top of that the staging buffers are made ahead (`prewarm_staging`),
and files are written by a thread a core (`file_write_max_threads`). One default is off: O_DIRECT (`use_direct_io`) ends with EINVAL on ext4, since
what `torch.save` writes is not aligned, and does nothing on tmpfs. It syncs nothing; the harness does.
"""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointManager, CheckpointWriterConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.measure import sync
from benchmarks.peers.base import Peer, Saving, bytes_below, leaf_paths
from benchmarks.states import State
from benchmarks.stores.base import Place


class TorchCheckpointing(Peer):
    name = "torch_checkpointing"
    asynchronous = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        writer = CheckpointWriterConfig(file_write_max_threads=os.cpu_count() or 1)
        saver = AsyncCheckpointSaverConfig(writer_config=writer)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(save=saver, storage_config=storage))

    def prepare(self, state: State) -> None:
        self._manager.prewarm_staging(state.state_dicts())

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        written = self._manager.save(str(self._path(step)), state.state_dicts())
        saving.returned()
        staged = self._manager._staging_future
        assert written is not None
        assert staged is not None
        staged.add_done_callback(lambda future: saving.staged(error=future.exception()))

        def finish(future: Future[Any]) -> None:
            error = future.exception()
            try:
                if error is None:
                    sync(self._path(step))
            except Exception as failed:
                error = failed
            saving.durable(error)

        written.add_done_callback(finish)
        return saving

    def restore(self, step: int, state: State) -> None:
        self._manager.load(self._path(step), into=state.state_dicts(), strict=True)  # into the live tensors

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor:
        target = torch.empty_like(state.tensors()[index])
        wanted: Any = target
        for key in reversed(leaf_paths(state)[index]):
            wanted = {key: wanted}
        self._manager.load(self._path(step), into=wanted, strict=True)
        return target

    def stored_bytes(self, step: int) -> int:
        return bytes_below(self._path(step))

    def forget(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        self._manager.close()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}"
