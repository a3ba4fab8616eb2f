"""Every store in the benchmark: folders, and S3 servers of this machine."""

from pathlib import Path

from benchmarks.stores.base import Place, Store

NAMES = ("tmpfs", "disk", "sink", "wan", "slow", "rclone")

__all__ = ["NAMES", "Place", "Store", "open_store"]


def open_store(name: str, folder: Path) -> Store:
    """A store, opened by `with`. `folder`: scratch space, for those that have no place of their own."""
    if name == "tmpfs":
        from benchmarks.stores.local import FolderStore

        return FolderStore(name, folder)
    if name == "disk":
        from benchmarks.stores.local import DISK, FolderStore

        return FolderStore(name, DISK.expanduser())
    from benchmarks.stores.s3 import RcloneStore, SinkStore

    if name == "sink":
        return SinkStore(name)
    if name == "wan":
        return SinkStore(name, latency_ms=30, mb_per_s=90)
    if name == "slow":
        return SinkStore(name, latency_ms=30, mb_per_s=20)
    if name == "rclone":
        return RcloneStore(folder)
    raise ValueError(f"no such store: {name}; there are {', '.join(NAMES)}")
