"""The lock under which a local store replaces and removes: held by the kernel, and its file may go at any time."""

import errno
import fcntl
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from asyncckpt.errors import TransientStoreError
from asyncckpt.store import records_lock
from asyncckpt.store.local import LocalStore
from asyncckpt.store.records_lock import RecordsLock

_PLAYER = """
import sys
from asyncckpt.errors import ObjectChangedError, ObjectExistsError, ObjectNotFoundError
from asyncckpt.store.local import LocalStore
root, number = sys.argv[1], int(sys.argv[2])
for turn in range(60):
    with LocalStore(root) as store:  # and close() tries to take the lock's file away
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
    players = [
        subprocess.Popen([sys.executable, "-c", _PLAYER, str(root), str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    lines = [line.split() for player in players for line in player.communicate(timeout=100)[0].splitlines()]
    assert [player.returncode for player in players] == [0] * 4
    replaced = [old for old, new in lines if "-" not in (old, new)]
    ended = {old for old, _ in lines} - {"-"}
    begun = {new for _, new in lines} - {"-"}
    assert len(replaced) == len(set(replaced))
    assert len(replaced) > 10
    found = [path.read_text() for path in root.glob("record")]
    assert begun - ended == set(found)


def test_who_waits_on_a_lock_file_that_is_taken_away_makes_another(lock: RecordsLock, tmp_path: Path) -> None:
    path = tmp_path / "made" / records_lock.NAME
    entered = threading.Event()
    with lock.held("key"):
        path.unlink()  # as a hand may do; `remove` never does while it is held

        def enter() -> None:
            with lock.held("key"):
                assert path.exists()
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert entered.wait(30)
    waiting.join(30)
    assert path.exists()


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


def test_a_closed_store_leaves_no_lock_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with LocalStore(root) as store:
        store.put("key", [b"a"])
        store.replace("key", [b"b"], store.get_version("key", max_bytes=1))
        assert (root / ".asyncckpt-unfinished" / records_lock.NAME).exists()
    assert [path.name for path in root.iterdir()] == ["key"]
