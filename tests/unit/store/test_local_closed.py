"""Folders of other users below a root: closed to us, and no reason to see nothing at all."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt.errors import LocalIOError
from asyncckpt.store.local import LocalStore

NOBODY = 65534


@contextmanager
def nobody() -> Iterator[None]:
    """Look at files as a user without rights does, on this thread."""
    setfsuid = ctypes.CDLL(None).setfsuid
    before = setfsuid(NOBODY)
    try:
        yield
    finally:
        setfsuid(before)


@pytest.fixture
def root() -> Iterator[Path]:
    """pytest's own folders are closed to nobody."""
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-test-"))
    folder.chmod(0o755)
    yield folder / "run"
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def close(folder: Path, mode: int) -> None:
    os.chown(folder, os.getuid(), os.getgid())
    folder.chmod(mode)


@pytest.mark.parametrize("mode", [0o700, 0o744, 0o000])
@pytest.mark.parametrize("closed", ["foreign", "step-0000000002", "step-0000000001/another"])
def test_a_folder_that_is_closed_hides_itself_alone_and_is_told_once(
    root: Path, mode: int, closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(root)
    for key in ("step-0000000001/aa/x", f"{closed}/y", "step-0000000003/aa/x", "step-0000000003.json"):
        store.put(key, [b"x"])
    close(root / closed, mode)
    with nobody():
        reader = LocalStore(root)
        for _ in range(2):
            assert [entry.key for entry in reader.list()] == [
                "step-0000000001/aa/x",
                "step-0000000003.json",
                "step-0000000003/aa/x",
            ]
            folded = [entry.key for entry in reader.list(delimiter=True)]
            assert folded == ["step-0000000001/", "step-0000000003.json", "step-0000000003/"]
    assert [record.message for record in caplog.records] == [
        f"what is in {root}/{closed} is not seen: Permission denied"
    ]


def test_a_folder_that_is_asked_for_and_closed_is_an_error(root: Path) -> None:
    """Who removes what a listing shows, or proves that an object is gone, must not take it for empty."""
    LocalStore(root).put("step-0000000001/aa/x", [b"x"])
    close(root / "step-0000000001/aa", 0o700)
    with nobody(), pytest.raises(LocalIOError, match="Permission denied"):
        list(LocalStore(root).list("step-0000000001/aa/"))
    close(root, 0o700)
    with nobody(), pytest.raises(LocalIOError, match="Permission denied"):
        list(LocalStore(root).list())


def test_checkpoints_beside_closed_folders_and_looping_links_are_listed_and_loaded(root: Path) -> None:
    with asyncckpt.Saver(root, engine="inline") as saver:
        saver.save(1, {"model": {"w": torch.ones(3)}})
    for name in ("foreign", "step-0000000007"):
        (root / name).mkdir()
        close(root / name, 0o700)
    for name in ("step-0000000009.json", "loop"):
        (root / name).symlink_to(name)
    with nobody():
        assert [checkpoint.step for checkpoint in asyncckpt.Run(root).checkpoints()] == [1]
        assert asyncckpt.load(root)["model"]["w"].tolist() == [1, 1, 1]
        assert asyncckpt.Run(root).latest().step == 1
