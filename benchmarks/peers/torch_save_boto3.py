"""`torch.save` into a file in memory, then `upload_file` on a thread (`download_fileobj` to restore): the script that most people would write for S3.

`torch.save` without CRC32 of its own, boto3 with its defaults: it sends parts of 8 MiB on ten threads, with CRC32 (`boto3.s3.transfer.TransferConfig`, `botocore.config.Config`).
The state may change as soon as `torch.save` has returned.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.peers import objects
from benchmarks.peers.base import Peer, Saving
from benchmarks.peers.torch_save import without_crc32
from benchmarks.states import State
from benchmarks.stores.base import Place


class TorchSaveBoto3(Peer):
    name = "torch.save+boto3"
    asynchronous = True
    stores = frozenset({"s3"})

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._client = objects.client(place)
        self._thread = ThreadPoolExecutor(1)

    def save(self, step: int, state: State) -> Saving:
        saving = Saving(step)
        descriptor = os.memfd_create("checkpoint")
        with without_crc32():
            torch.save(state.state_dicts(), _path(descriptor))
        saving.staged()
        self._thread.submit(self._upload, descriptor, saving)
        saving.returned()
        return saving

    def restore(self, step: int, state: State) -> None:
        descriptor = os.memfd_create("checkpoint")
        with os.fdopen(descriptor, "wb") as file:
            self._client.download_fileobj(self.place.bucket, self._key(step), file)
            file.flush()
            loaded = torch.load(_path(descriptor), mmap=True, weights_only=True)
            for name, held in state.objects.items():
                held.load_state_dict(loaded[name])

    def stored_bytes(self, step: int) -> int:
        return objects.bytes_at(self.place, f"{step:010d}.pt")

    def forget(self, step: int) -> None:
        objects.delete_at(self.place, f"{step:010d}.pt")

    def close(self) -> None:
        self._thread.shutdown()
        self._client.close()

    def _upload(self, descriptor: int, saving: Saving) -> None:
        error: BaseException | None = None
        try:
            self._client.upload_file(_path(descriptor), self.place.bucket, self._key(saving.step))
        except Exception as failed:
            error = failed
        finally:
            os.close(descriptor)
        saving.durable(error)

    def _key(self, step: int) -> str:
        return objects.key_of(self.place, f"{step:010d}.pt")


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
