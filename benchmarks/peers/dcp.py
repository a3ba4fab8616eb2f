"""torch.distributed.checkpoint: `async_save` on a thread or in a process, and the blocking `save`.

The asynchronous ones with asynchronous staging into shared memory, kept and reused over saves (`DefaultStager`): the fastest way that
the docstrings of `torch.distributed.checkpoint.staging` name. Shared memory takes a descriptor a tensor: where there are too few, the
thread stages into private memory instead. `-default` leaves `async_stager` out, as the tutorial of `async_save` does: it blocks while it
copies, into memory that is allocated anew at each call. The writer syncs its files itself and uses a thread a core.
"""

import os
import resource
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, _async_process_executor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.measure import sync
from benchmarks.peers.base import Peer, Saving, bytes_below, leaf_paths
from benchmarks.states import State
from benchmarks.stores.base import Place

_OTHER_DESCRIPTORS = 500
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Dcp(Peer):
    """What all have in common. A subclass for another store replaces the writer, the reader and `finish`."""

    def restore(self, step: int, state: State) -> None:
        # into the live tensors; what is no tensor stays in the dicts
        dcp.load(state.state_dicts(), storage_reader=self.reader(step), no_dist=True)

    def read_one(self, step: int, index: int, state: State) -> torch.Tensor:
        target = torch.empty_like(state.tensors()[index])
        wanted: Any = target
        for key in reversed(leaf_paths(state)[index]):
            wanted = {key: wanted}
        dcp.load(wanted, storage_reader=self.reader(step), no_dist=True)
        return target

    def stored_bytes(self, step: int) -> int:
        return bytes_below(self._path(step))

    def forget(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def writer(self, step: int) -> FileSystemWriter:
        return FileSystemWriter(self._path(step), thread_count=os.cpu_count() or 1)

    def reader(self, step: int) -> FileSystemReader:
        return FileSystemReader(self._path(step))

    def finish(self, step: int) -> None:
        """Make durable what the writer has written."""
        sync(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:010d}"


class DcpSave(Dcp):
    name = "dcp.save"

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        try:
            dcp.save(state.state_dicts(), storage_writer=self.writer(step), no_dist=True)
        except CheckpointException as error:
            raise _ordinary(error) from error
        self.finish(step)
        saving.durable()
        saving.returned()
        return saving


class DcpAsync(Dcp):
    asynchronous = True
    kind: AsyncCheckpointerType
    best_staging = True
    _stager: DefaultStager | None = None

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **options)
        self._in_process = self.kind is AsyncCheckpointerType.PROCESS

    def prepare(self, state: State) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if not self.best_staging:
            return
        fits = len(state.tensors()) + _OTHER_DESCRIPTORS < most
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=state.on_cuda,  # this and non-blocking copies need it
                use_shared_memory=fits or self._in_process,
                use_async_staging=True,
                use_non_blocking_copy=state.on_cuda,
            )
        )
        # torch 2.11 closes its inner half behind every save, and the second save fails; 2.13 leaves it open
        self._stager._state_dict_stager.close = lambda: None

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        response = dcp.async_save(
            state.state_dicts(),
            storage_writer=self.writer(step),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
            no_dist=not self._in_process,
        )
        saving.returned()
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.add_done_callback(
                lambda future: saving.staged(error=_ordinary(future.exception()))
            )
            upload = response.upload_completion
        else:
            saving.staged()  # it has copied before it returned
            upload = response

        def uploaded(future: Future[Any]) -> None:
            error = _ordinary(future.exception())
            try:
                if error is None:
                    self.finish(step)
            except Exception as failed:
                error = failed
            saving.durable(error)

        upload.add_done_callback(uploaded)
        return saving

    def close(self) -> None:
        if self._stager is not None:
            vars(self._stager._state_dict_stager).pop("close", None)
            self._stager.close()


class DcpThread(DcpAsync):
    name = "dcp-thread"
    kind = AsyncCheckpointerType.THREAD


class DcpThreadDefault(DcpThread):
    name = "dcp-thread-default"
    best_staging = False


class DcpProcess(DcpAsync):
    """Needs a process group, of one rank here. Its process starts with the first save; DCP has one for all, the last peer ends it."""

    name = "dcp-process"
    kind = AsyncCheckpointerType.PROCESS
    _opened: ClassVar[set["DcpProcess"]] = set()

    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__(place, **options)
        self._opened.add(self)
        if not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        self._opened.discard(self)
        if not self._opened and dist.is_initialized():
            _async_process_executor._CHECKPOINT_PROCESS = None  # its finalizer ends it
            dist.destroy_process_group()


class DcpProcessDefault(DcpProcess):
    name = "dcp-process-default"
    best_staging = False


def _ordinary(error: BaseException | None) -> BaseException | None:
    """DCP's own error is a `BaseException`, which would end a run of many systems."""
    if not isinstance(error, CheckpointException):
        return error
    return RuntimeError("; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items()))
