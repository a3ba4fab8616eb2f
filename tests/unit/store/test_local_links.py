"""Symbolic links below a root: read through, never deleted through."""

import os
import socket
from pathlib import Path

import pytest

from asyncckpt.errors import ObjectNotFoundError
from asyncckpt.store.base import Version
from asyncckpt.store.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that is not ours, with names that ours could have."""
    folder = tmp_path / "elsewhere"
    (folder / "a").mkdir(parents=True)
    for name in ("precious", "a/x", "a/y"):
        (folder / name).write_bytes(b"precious")
    return folder


def kept(elsewhere: Path) -> bool:
    return sorted(path.name for path in elsewhere.rglob("*") if path.is_file()) == ["precious", "x", "y"]


@pytest.mark.parametrize("linked", ["step-1", "step-1/a"])
def test_what_is_below_a_link_goes_by_removing_the_link(root: Path, elsewhere: Path, linked: str) -> None:
    store = LocalStore(root)
    store.put("step-2/a/x", [b"x"])
    link = root / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere if linked == "step-1" else elsewhere / "a")
    listed = [entry.key for entry in store.list("step-1/a/")]
    assert listed == ["step-1/a/x", "step-1/a/y"]
    store.delete(listed)
    assert kept(elsewhere)
    assert not link.is_symlink()
    assert [entry.key for entry in store.list()] == ["step-2/a/x"]
    assert sorted(path.name for path in root.iterdir()) == [".asyncckpt-unfinished", "step-2"]


def test_an_object_that_is_a_link_is_removed_and_its_target_stays(root: Path, elsewhere: Path) -> None:
    store = LocalStore(root)
    for key in ("a/x", "record"):
        store.put(key, [b"x"])
        (root / key).unlink()
        (root / key).symlink_to(elsewhere / "precious")
    assert store.get("a/x", max_bytes=100) == b"precious"
    assert [entry.key for entry in store.list()] == ["a/x", "record"]
    store.delete(["a/x"])
    store.remove("record", store.get_version("record", max_bytes=100))
    assert kept(elsewhere)
    assert list(store.list()) == []


def test_a_link_is_replaced_and_its_target_stays(root: Path, elsewhere: Path) -> None:
    root.mkdir()
    (root / "record").symlink_to(elsewhere / "precious")
    store = LocalStore(root)
    store.replace("record", [b"new"], store.get_version("record", max_bytes=100))
    assert store.get("record", max_bytes=100) == b"new"
    assert kept(elsewhere)
    assert (elsewhere / "precious").read_bytes() == b"precious"


def test_a_folder_of_temporary_files_that_is_a_link_is_not_swept(root: Path, elsewhere: Path) -> None:
    root.mkdir()
    old = elsewhere / ("0" * 32)
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    (root / ".asyncckpt-unfinished").symlink_to(elsewhere)
    LocalStore(root).put("key", [b"x"])
    assert old.exists()


def test_a_root_that_is_a_link_works(root: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    root.symlink_to(tmp_path / "real")
    store = LocalStore(root)
    store.put("a/b/x", [b"x"])
    store.put("record", [b"x"], if_absent=True)
    store.replace("record", [b"y"], store.get_version("record", max_bytes=1))
    assert [entry.key for entry in store.list()] == ["a/b/x", "record"]
    store.remove("record", Version(b"y", ""))
    store.delete(["a/b/x"])
    store.close()
    assert list((tmp_path / "real").iterdir()) == []
    assert root.is_symlink()


def test_links_that_lead_nowhere_are_no_objects_and_stop_no_listing(root: Path) -> None:
    store = LocalStore(root)
    store.put("a/good", [b"x"])
    (root / "loop").symlink_to("loop")
    (root / "a" / "up").symlink_to("..")
    (root / "dangling").symlink_to("/nonexistent/file")
    (root / "zero").symlink_to("/dev/zero")
    (root / "loops").symlink_to("loops/x")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(root / "socket"))
    assert [entry.key for entry in store.list()] == ["a/good"]
    assert [entry.key for entry in store.list(delimiter=True)] == ["a/"]
    for prefix in ("loop/", "loops/", "dangling/", "zero/"):
        assert list(store.list(prefix)) == []
    for key in ("loop", "loop/x", "dangling", "loops", "a/good/x"):
        assert store.head(key) is None
        with pytest.raises(ObjectNotFoundError):
            store.get(key, max_bytes=1)
    store.delete(["loop", "loops/x", "dangling", "zero", "a/good/x", "a"])
    assert sorted(path.name for path in root.iterdir()) == [".asyncckpt-unfinished", "a", "socket"]
    assert [entry.key for entry in store.list()] == ["a/good"]
