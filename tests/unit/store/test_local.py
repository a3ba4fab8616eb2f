"""What a folder must bear: crashes at any system call, full disks, other users, other writers."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.errors import (
    DiskFullError,
    LocalIOError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreNotFoundError,
)
from asyncckpt.store import posix
from asyncckpt.store.base import OpenUpload
from asyncckpt.store.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def files(root: Path) -> set[str]:
    """Every file, temporary ones too."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: int = 1) -> None:
    """Let call `when` of `os.name` fail with errno `number`."""
    real = getattr(os, name)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == when:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


def record(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Note system calls, with the path behind their descriptor, relative to the root."""
    noted: list[str] = []

    def name_of(target: object) -> str:
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(str(target))
        if path.parent.name == ".asyncckpt-unfinished":
            return "temporary"
        return os.path.relpath(path, root)

    real = {name: getattr(os, name) for name in ("pwritev", "fsync", "link", "replace", "rename")}
    for name, call in real.items():

        def noting(target, *args, _name=name, _real=call, **kwargs):
            also = [name_of(args[0])] if _name in ("link", "replace", "rename") else []
            noted.append(" ".join([_name, name_of(target), *also]))
            return _real(target, *args, **kwargs)

        monkeypatch.setattr(os, name, noting)
    return noted


def test_a_put_is_durable_before_it_returns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    calls = record(monkeypatch, root)
    store = LocalStore(root)
    store.put("a/b/key", [b"one", b"two"])
    order = [
        "pwritev temporary",
        "fsync temporary",
        "replace temporary a/b/key",
        "fsync a/b",
        "fsync a",
        "fsync .",
        "fsync ..",
    ]
    assert calls[: len(order)] == order
    calls.clear()
    store.put("a/b/other", [b"x"])
    assert calls == ["pwritev temporary", "fsync temporary", "replace temporary a/b/other", "fsync a/b"]
    calls.clear()
    store.put("record.json", [b"x"], if_absent=True)
    assert calls == ["pwritev temporary", "fsync temporary", "link temporary record.json", "fsync ."]


def test_an_upload_is_durable_before_it_is_complete(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    store = LocalStore(root)
    store.put("first", [b"x"])
    calls = record(monkeypatch, root)
    upload = store.start_upload("a/key")
    upload.write(1, 0, [b"one"])
    upload.complete()
    assert calls == ["pwritev temporary", "fsync temporary", "replace temporary a/key", "fsync a", "fsync ."]


def test_a_folder_that_another_writer_made_is_synced_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a").mkdir(parents=True)
    calls = record(monkeypatch, root)
    LocalStore(root).put("a/key", [b"x"])
    assert calls[3:5] == ["fsync a", "fsync ."]


def test_buffers_are_written_without_being_joined(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.pwritev, []
    monkeypatch.setattr(
        os, "pwritev", lambda fd, views, at: seen.append([v.nbytes for v in views]) or real(fd, views, at)
    )
    LocalStore(root).put("key", [b"x" * 10, bytearray(20), memoryview(bytes(30))])
    assert seen == [[10, 20, 30]]


def test_short_writes_are_continued(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, b"".join(views)[:7], at))
    buffers = [bytes([number]) * number for number in range(1, 30)]
    store = LocalStore(root)
    store.put("key", buffers)
    assert store.get("key", max_bytes=1000) == b"".join(buffers)


def test_many_and_large_buffers_are_cut_into_calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix, "_CALL_BYTES", 1000)
    beats = []
    buffers = [bytes([number % 251]) for number in range(3000)] + [b"z" * 2500]
    store = LocalStore(root, progress=lambda: beats.append(1))
    store.put("key", buffers)
    assert len(beats) >= 6
    assert store.get("key", max_bytes=10_000) == b"".join(buffers)
    assert len(beats) >= 12


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(("call", "when"), [("pwritev", 1), ("pwritev", 2), ("fsync", 1), ("fsync", 2)])
def test_a_full_disk_is_told_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, when: int
) -> None:
    monkeypatch.setattr(posix, "_CALL_BYTES", 4)
    store = LocalStore(root)
    fail(monkeypatch, call, number, when)
    with pytest.raises(DiskFullError, match="ulimit -f" if number == errno.EFBIG else "free space") as caught:
        store.put("a/key", [b"12345678"])
    assert caught.value.key == "a/key"
    if (call, when) != ("fsync", 2):  # that one syncs the folder: the object has its name by then
        assert files(root) == set()


@pytest.mark.parametrize(("when", "unanswered"), [(1, False), (2, True)])
def test_a_failure_behind_the_new_name_says_that_it_may_have_taken_effect(
    root: Path, monkeypatch: pytest.MonkeyPatch, when: int, unanswered: bool
) -> None:
    """The first sync is of the file, the second of its folder."""
    store = LocalStore(root)
    store.put("before", [b"x"])
    fail(monkeypatch, "fsync", errno.EIO, when)
    with pytest.raises(LocalIOError) as caught:
        store.put("key", [b"x"], if_absent=True)
    assert caught.value.unanswered is unanswered
    assert caught.value.key == "key"
    assert (root / "key").exists() is unanswered


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "pwritev", "fsync", "close", "link", "chmod"])
def test_any_other_failure_is_a_local_one_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    store = LocalStore(root)
    store.put("before", [b"x"])
    fail(monkeypatch, call, number)
    with pytest.raises(LocalIOError) as caught:
        store.put("key", [b"12345678"], if_absent=True)
    assert type(caught.value) is LocalIOError
    assert isinstance(caught.value.__cause__, OSError)
    assert files(root) == {"before"}


def test_a_filesystem_without_hard_links_cannot_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "link", errno.EPERM)
    with pytest.raises(LocalIOError, match="hard links"):
        LocalStore(root).put("key", [b"x"], if_absent=True)
    assert files(root) == set()


def test_a_failed_sync_ends_the_upload_and_its_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = LocalStore(root).start_upload("key")
    upload.write(1, 0, [b"x"])
    fail(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(LocalIOError):
        upload.complete()
    assert files(root) == set()
    with pytest.raises(StoreError, match="completed or aborted"):
        upload.complete()
    with pytest.raises(StoreError, match="completed or aborted"):
        upload.write(2, 1, [b"y"])


def test_abort_waits_for_writes_before_it_closes_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = LocalStore(root).start_upload("key")
    real, writing, go_on = os.pwritev, threading.Event(), threading.Event()

    def slow(*args):
        writing.set()
        assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    failures = []

    def write() -> None:
        try:
            upload.write(1, 0, [b"x"])
        except StoreError as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    assert writing.wait(30)
    aborter = threading.Thread(target=upload.abort)
    aborter.start()
    go_on.set()
    writer.join(30)
    aborter.join(30)
    assert failures == []
    assert files(root) == set()


def test_a_real_limit_on_a_file_reads_as_a_full_disk(root: Path) -> None:
    program = (
        "import resource, signal, sys; from asyncckpt.errors import DiskFullError\n"
        "from asyncckpt.store.local import LocalStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: LocalStore(sys.argv[1]).put('key', [bytes(2**20)] * 4)\n"
        "except DiskFullError: sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(root)], check=False)
    assert done.returncode == 3
    assert files(root) == set()


def test_others_may_read_what_the_umask_lets_them(root: Path) -> None:
    before = os.umask(0o027)
    try:
        store = LocalStore(root)
        store.put("key", [b"x"])
        store.put("record", [b"x"], if_absent=True)
        upload = store.start_upload("upload")
        (temporary,) = (root / ".asyncckpt-unfinished").iterdir()
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        upload.complete()
    finally:
        os.umask(before)
    for name in ("key", "record", "upload"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o640


def test_what_killed_writers_left_is_found_by_its_age_and_nothing_else_is(root: Path) -> None:
    unfinished = root / ".asyncckpt-unfinished"
    unfinished.mkdir(parents=True)
    old, young, foreign = unfinished / ("0" * 32), unfinished / ("1" * 32), unfinished / "notes.txt"
    for path in (old, young, foreign):
        path.write_bytes(b"x")
    for path in (old, foreign):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    store = LocalStore(root)
    assert [entry.key for entry in store.list()] == []
    for upload in store.open_uploads(idle_since_s=store.clock_s() - 24 * 3600):
        store.abort_upload(upload)
    assert {path.name for path in unfinished.iterdir()} == {young.name, foreign.name}
    store.abort_upload(OpenUpload("", "notes.txt"))
    store.abort_upload(OpenUpload("", f"../{unfinished.name}/{young.name}"))
    assert {path.name for path in unfinished.iterdir()} == {young.name, foreign.name}


def test_the_clock_is_the_filesystems_and_asking_it_makes_no_folder(root: Path) -> None:
    assert abs(LocalStore(root).clock_s() - time.time()) < 60
    assert not root.exists()
    root.mkdir(parents=True)
    os.utime(root, (0, 0))
    assert abs(LocalStore(root).clock_s() - time.time()) < 60


def test_closing_takes_an_empty_folder_of_temporary_files_away(root: Path) -> None:
    with LocalStore(root) as store:
        store.put("key", [b"x"])
    assert {path.name for path in root.iterdir()} == {"key"}
    store.put("again", [b"x"])
    assert store.head("again") is not None


def test_a_link_planted_for_a_temporary_file_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = root / "victim"
    (root / ".asyncckpt-unfinished").mkdir(parents=True)
    (root / ".asyncckpt-unfinished" / ("a" * 32)).symlink_to(victim)
    monkeypatch.setattr("secrets.token_hex", lambda _: "a" * 32)
    with pytest.raises(StoreError):
        LocalStore(root).put("key", [b"x"])
    assert not victim.exists()


def test_links_to_folders_are_not_walked_into(root: Path) -> None:
    store = LocalStore(root)
    store.put("a/key", [b"x"])
    (root / "a" / "loop").symlink_to(root)
    assert [entry.key for entry in store.list()] == ["a/key"]


def test_a_pipe_is_no_object_and_hangs_nobody(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "pipe")
    store = LocalStore(root)
    with pytest.raises(ObjectNotFoundError):
        store.get("pipe", max_bytes=1)
    assert store.head("pipe") is None
    assert list(store.list()) == []


def test_a_root_that_can_be_no_folder_is_told(root: Path) -> None:
    root.write_bytes(b"x")
    other = root.with_name("loop")
    other.symlink_to(other)
    for call in (
        lambda store: store.put("key", [b"x"]),
        lambda store: store.put("key", [b"x"], if_absent=True),
        lambda store: store.start_upload("key"),
        lambda store: store.get("key", max_bytes=9),
        lambda store: store.head("key"),
        lambda store: list(store.list()),
    ):
        for place, why in {root: "is a file", other: "is a link that leads nowhere"}.items():
            with pytest.raises(StoreNotFoundError, match=why):
                call(LocalStore(place))


def test_an_empty_folder_is_no_prefix(root: Path) -> None:
    (root / "step-1" / "attempt").mkdir(parents=True)
    store = LocalStore(root)
    store.put("step-2/attempt/x", [b"x"])
    assert [entry.key for entry in store.list(delimiter=True)] == ["step-2/"]


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_folder_that_is_pruned_under_a_put_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    store = LocalStore(root)
    name = "link" if if_absent else "replace"
    real: Callable[..., None] = getattr(os, name)
    pruned = []

    def prune_first(source, target, **kwargs):
        if not pruned:
            pruned.append(Path(target).parent.rmdir())
        return real(source, target, **kwargs)

    monkeypatch.setattr(os, name, prune_first)
    store.put("a/b/key", [b"x"], if_absent=if_absent)
    assert store.get("a/b/key", max_bytes=1) == b"x"


def test_an_object_found_taken_leaves_no_temporary_file(root: Path) -> None:
    store = LocalStore(root)
    store.put("key", [b"first"], if_absent=True)
    with pytest.raises(ObjectExistsError):
        store.put("key", [b"second"], if_absent=True)
    assert files(root) == {"key"}


def test_a_long_upload_is_synced_as_it_goes(tmp_path, monkeypatch):
    """One fsync of gigabytes could take longer than a worker may be silent."""
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    part = bytes(16 * 2**20)
    with LocalStore(tmp_path) as store:
        upload = store.start_upload("a/b")
        for number in range(10):  # 160 MiB
            upload.write(number + 1, number * len(part), [part])
        assert len(synced) == 2
        upload.complete()
        assert store.head("a/b").stored_bytes == 10 * len(part)


def test_a_taken_name_is_durable_before_anybody_is_told_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave it may have been killed before its sync, and who is told would take the object for stored."""
    store = LocalStore(root)
    store.put("key", [b"x"])
    calls = record(monkeypatch, root)
    with pytest.raises(ObjectExistsError):
        store.put("key", [b"x"], if_absent=True)
    assert calls[-1] == "fsync ."
    fail(monkeypatch, "fsync", errno.EIO, 2)
    with pytest.raises(LocalIOError) as caught:
        store.put("key", [b"x"], if_absent=True)
    assert caught.value.unanswered
