"""Amazon's S3 connector for PyTorch: DCP with its `S3StorageWriter` and `S3StorageReader`.

Asynchronous as `dcp-thread` is, with staging into shared memory that is kept over saves; `-save` is the blocking `dcp.save`. A thread a core, as
DCP's own writer: 8, which its README shows (METADATA, "Distributed checkpoints"; the default is 1), makes eight files that are read one after the
other, and was slower on two cores: 1 GB over the WAN-like store 1.73 instead of 1.57 s, restored in 2.9 instead of 1.6 s. Parts of 8 MiB, a target of 10 Gbit/s and the
DCP-optimized reader are the defaults of `S3ClientConfig` and `S3StorageReader`, which the README calls the fastest. Its client is kept over
saves. Writer and reader take no endpoint, so their `S3FileSystem` is made anew with a client that has one. `rclone serve s3` does not take its requests (1.75, CRT error 14366): there it has
an error instead of figures.
"""

from s3torchconnector import S3ClientConfig, S3ReaderConstructor
from s3torchconnector._s3client import S3Client
from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
from s3torchconnector.dcp.s3_file_system import S3FileSystem
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from asyncckpt.engine.cores import usable_cores
from benchmarks.peers import objects
from benchmarks.peers.dcp import Dcp, DcpAsync, DcpSave
from benchmarks.stores.base import Place


class _OnS3(Dcp):
    stores = frozenset({"s3"})

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        config = S3ClientConfig(force_path_style=True)
        self._client = S3Client(place.region, endpoint=place.endpoint_url, s3client_config=config)

    def writer(self, step: int) -> FileSystemWriter:
        writer = S3StorageWriter(self.place.region, self._url(step), thread_count=usable_cores())
        writer.fs = S3FileSystem(self.place.region, s3_client=self._client)
        return writer

    def reader(self, step: int) -> FileSystemReader:
        constructor = S3ReaderConstructor.dcp_optimized()
        reader = S3StorageReader(self.place.region, self._url(step), reader_constructor=constructor)
        reader.fs = S3FileSystem(self.place.region, s3_client=self._client, reader_constructor=constructor)
        return reader

    def finish(self, step: int) -> None:
        """An answered request is durable."""

    def stored_bytes(self, step: int) -> int:
        return objects.bytes_at(self.place, f"{step:010d}/")

    def forget(self, step: int) -> None:
        objects.delete_at(self.place, f"{step:010d}/")

    def _url(self, step: int) -> str:
        return f"{self.place.url}/{step:010d}/"


class S3TorchConnector(_OnS3, DcpAsync):
    name = "s3torchconnector"
    kind = AsyncCheckpointerType.THREAD


class S3TorchConnectorSave(_OnS3, DcpSave):
    name = "s3torchconnector-save"
