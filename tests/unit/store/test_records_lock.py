"""The lock under which a local store replaces and removes: held by the kernel, and its file may go at any time."""

import errno
import fcntl
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncckpt.errors import TransientStoreError
from asyncckpt.store import records_lock
from asyncckpt.store.local import LocalStore
from asyncckpt.store.records_lock import RecordsLock

_PLAYER = """
import sys, time
from asyncckpt.errors import ObjectChangedError, ObjectExistsError, ObjectNotFoundError
from asyncckpt.store.local import LocalStore
class Store(LocalStore):
    def _check_same(self, key, old):
        super()._check_same(key, old)
        time.sleep(0.002)  # all that may happen between the look and the deed
root, number = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()
for turn in range(60):
    with Store(root) as store:  # and close() tries to take the lock's file away
        mine = f"{number}-{turn}"
        try:
            old = store.get_version("record", max_bytes=100)
            if (number + turn) % 3:
                store.replace("record", [mine.encode()], old)
                print(old.data.decode(), mine)
            else:
                store.remove("record", old)
                print(old.data.decode(), "-")
        except ObjectChangedError:
            pass
        except ObjectNotFoundError:
            try:
                store.put("record", [mine.encode()], if_absent=True)
                print("-", mine)
            except ObjectExistsError:
                pass
"""


@pytest.fixture
def lock(tmp_path: Path) -> RecordsLock:
    return RecordsLock(tmp_path / "made", lambda folder: folder.mkdir(), lambda: None)


def test_processes_end_each_record_once_while_the_lock_file_comes_and_goes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-c", _PLAYER, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    players = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:  # all begin when all are told to
        told = list(threads.map(lambda player: player.communicate("go\n", timeout=100)[0], players))
    lines = [line.split() for text in told for line in text.splitlines()]
    assert [player.returncode for player in players] == [0] * 4
    replaced = [old for old, new in lines if "-" not in (old, new)]
    ended = {old for old, _ in lines} - {"-"}
    begun = {new for _, new in lines} - {"-"}
    assert len(replaced) == len(set(replaced))
    assert len(replaced) > 10
    found = [path.read_text() for path in root.glob("record")]
    assert begun - ended == set(found)


def test_a_lock_on_a_file_that_lost_its_name_counts_for_nothing(
    lock: RecordsLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking somebody may take the file away, and a third one make another."""
    path = tmp_path / "made" / records_lock.NAME
    real, swaps = fcntl.flock, ["once"]

    def swapping(descriptor: int, operation: int) -> None:
        if swaps:
            swaps.pop()
            path.unlink()
            path.touch()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", swapping)
    with lock.held("key"), path.open("r+b") as other, pytest.raises(BlockingIOError):
        real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_file_of_a_held_lock_is_not_taken_away(lock: RecordsLock, tmp_path: Path) -> None:
    path = tmp_path / "made" / records_lock.NAME
    with lock.held("key"):
        lock.remove()
        assert path.exists()
    lock.remove()
    assert not path.exists()
    lock.remove()


def test_a_lock_that_somebody_keeps_is_told_in_time(
    lock: RecordsLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_lock, "_PATIENCE_S", 0.05)
    other = RecordsLock(tmp_path / "made", lambda folder: folder.mkdir(), lambda: None)
    with lock.held("key"), pytest.raises(TransientStoreError, match="holds") as caught, other.held("record"):
        pass
    assert caught.value.key == "record"
    assert not caught.value.unanswered


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    store = LocalStore(tmp_path / "root")
    store.put("key", [b"a"])
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        store.replace("key", [b"b"], store.get_version("key", max_bytes=1))
        store.remove("key", store.get_version("key", max_bytes=1))
    assert len(caplog.records) == 1
    assert "has no locks" in caplog.text
    assert list(store.list()) == []
    store.close()
    assert list((tmp_path / "root").iterdir()) == []


def test_the_lock_file_goes_with_each_use_and_one_that_a_killed_holder_left_at_the_end(tmp_path: Path) -> None:
    """A worker that ends does not close its store, and neither does who calls `Run(url).rewind(step)`."""
    root = tmp_path / "root"
    file = root / ".asyncckpt-unfinished" / records_lock.NAME
    with LocalStore(root) as store:
        store.put("key", [b"a"])
        store.replace("key", [b"b"], store.get_version("key", max_bytes=1))
        assert not file.exists()
        file.touch()
    assert [path.name for path in root.iterdir()] == ["key"]
