"""Files written past the page cache hold what was written, whatever the filesystem says to that."""

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncckpt.store import direct
from asyncckpt.store.direct import LEAST_BYTES, NewFile

NO_PROGRESS = lambda: None  # noqa: E731


def pieces(data: bytes, sizes: list[int]) -> list[memoryview]:
    """`data` as views of memory at odd addresses."""
    found, position = [], 0
    for size in sizes:
        shifted = bytearray(b"x" + data[position : position + size])
        found.append(memoryview(shifted)[1:])
        position += size
    return [*found, memoryview(data[position:])]


def test_any_pieces_at_any_offset_arrive_as_they_are(tmp_path):
    draw = random.Random(1)
    for number in range(12):
        data = draw.randbytes(LEAST_BYTES + draw.randrange(5_000_000))
        offset = draw.choice([0, 1, 4095, 4096, 12_345])
        file = NewFile(tmp_path / str(number), direct=True)
        file.write(pieces(data, [draw.randrange(400_000) for _ in range(4)]), offset, NO_PROGRESS)
        file.sync()
        file.close()
        assert (tmp_path / str(number)).read_bytes() == bytes(offset) + data


def test_parts_whose_ends_share_a_block_are_written_side_by_side(tmp_path):
    draw = random.Random(2)
    sizes = [LEAST_BYTES + draw.randrange(3_000_000) for _ in range(12)]
    data = draw.randbytes(sum(sizes))
    file = NewFile(tmp_path / "object", direct=True)
    jobs, position = [], 0
    for size in sizes:
        jobs.append(([memoryview(data)[position : position + size]], position))
        position += size
    draw.shuffle(jobs)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda job: file.write(*job, NO_PROGRESS), jobs))
    file.sync()
    file.close()
    assert (tmp_path / "object").read_bytes() == data


@pytest.mark.parametrize("after", [0, 1])
def test_a_filesystem_that_refuses_is_written_the_usual_way(tmp_path, monkeypatch, after):
    real, calls = os.pwrite, []

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > after:
            raise OSError(errno.EINVAL, "no such alignment")
        return real(descriptor, data, offset)

    monkeypatch.setattr(direct.os, "pwrite", refusing)
    data = random.Random(3).randbytes(7_000_001)
    file = NewFile(tmp_path / "object", direct=True)
    if file._past_cache is None:
        pytest.skip("this filesystem has no O_DIRECT")
    file.write([memoryview(data)], 3, NO_PROGRESS)
    file.sync()
    file.close()
    assert calls
    assert (tmp_path / "object").read_bytes() == bytes(3) + data


def test_a_short_write_goes_on_behind_its_last_whole_block(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(direct.os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:8192], offset))
    data = random.Random(4).randbytes(3_000_001)
    file = NewFile(tmp_path / "object", direct=True)
    file.write([memoryview(data)], 0, NO_PROGRESS)
    file.sync()
    file.close()
    assert (tmp_path / "object").read_bytes() == data


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_other_failures_reach_the_caller(tmp_path, monkeypatch, number):
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(direct.os, "pwrite", failing)
    file = NewFile(tmp_path / "object", direct=True)
    if file._past_cache is None:
        pytest.skip("this filesystem has no O_DIRECT")
    with pytest.raises(OSError, match=os.strerror(number)):
        file.write([memoryview(bytes(LEAST_BYTES * 2))], 0, NO_PROGRESS)
    file.close()


def test_no_descriptor_is_left_and_none_is_needed_twice(tmp_path, monkeypatch):
    before = len(list(Path("/proc/self/fd").iterdir()))
    NewFile(tmp_path / "a", direct=True).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    real = os.open

    def few(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, flags, mode)

    monkeypatch.setattr(direct.os, "open", few)
    file = NewFile(tmp_path / "b", direct=True)
    file.write([memoryview(bytes(LEAST_BYTES))], 0, NO_PROGRESS)
    file.close()
    assert (tmp_path / "b").stat().st_size == LEAST_BYTES


def test_memory_is_not_written_past_its_own_cache():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no filesystem in memory here")
    assert not direct.gains(Path("/dev/shm"))


def test_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        direct.gains(tmp_path / "absent")
