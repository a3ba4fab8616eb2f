"""torch.distributed.checkpoint: `async_save` on a thread or in a process, and the blocking `save`.

The asynchronous ones with asynchronous staging into shared memory, kept and reused over saves (`DefaultStager`): the fastest
documented way; the default staging blocks and allocates anew at each call. Shared memory takes a descriptor a tensor: where there are
too few, the thread stages into private memory instead. The writer syncs its files itself and uses a thread a core.
"""

import os
import resource
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.measure import sync
from benchmarks.peers.base import Peer, Saving, bytes_below
from benchmarks.states import State

_OTHER_DESCRIPTORS = 500
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class _Dcp(Peer):
    def restore(self, step: int, state: State) -> None:
        # into the live tensors; what is no tensor stays in the dicts
        dcp.load(state.state_dicts(), storage_reader=FileSystemReader(self._path(step)), no_dist=True)

    def stored_bytes(self, step: int) -> int:
        return bytes_below(self._path(step))

    def forget(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}"

    def _writer(self, step: int) -> FileSystemWriter:
        return FileSystemWriter(self._path(step), thread_count=os.cpu_count() or 1)


class DcpSave(_Dcp):
    name = "dcp.save"

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        dcp.save(state.state_dicts(), storage_writer=self._writer(step), no_dist=True)
        sync(self._path(step))
        saving.durable()
        saving.returned()
        return saving


class _DcpAsync(_Dcp):
    kind: AsyncCheckpointerType
    no_dist: bool

    def prepare(self, state: State) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        fits = len(state.tensors()) + _OTHER_DESCRIPTORS < most
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,  # this and non-blocking copies need an accelerator
                use_shared_memory=fits or self.kind is AsyncCheckpointerType.PROCESS,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        response = dcp.async_save(
            state.state_dicts(),
            storage_writer=self._writer(step),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
            no_dist=self.no_dist,
        )
        saving.returned()
        assert isinstance(response, AsyncSaveResponse)
        response.staging_completion.add_done_callback(lambda future: saving.staged(future.exception()))

        def uploaded(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                sync(self._path(step))
            saving.durable(error)

        response.upload_completion.add_done_callback(uploaded)
        return saving

    def close(self) -> None:
        self._stager.close()


class DcpThread(_DcpAsync):
    name = "dcp-thread"
    kind = AsyncCheckpointerType.THREAD
    no_dist = True


class DcpProcess(_DcpAsync):
    """Needs a process group, of one rank here; its process starts with the first save."""

    name = "dcp-process"
    kind = AsyncCheckpointerType.PROCESS
    no_dist = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
