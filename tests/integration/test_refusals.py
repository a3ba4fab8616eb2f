"""Each kind of store that refuses a save: its own error, with step and key, and the checkpoint before restores."""

import contextlib
import http.server
import os
import subprocess
import threading
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt import RetryPolicy, Run, S3Options, Saver, errors
from tests.processes import PATIENCE_S
from tests.records import change_record
from tests.training import Training, assert_numbered, assert_same, numbered

QUICK = RetryPolicy(deadline_s=1.0, first_wait_s=0.05, max_wait_s=0.2)


def refused(save, kind, step):
    """The error of a save, which names its step and the key that was refused."""
    with pytest.raises(kind) as raised:
        save.result(PATIENCE_S)
    assert type(raised.value) is kind
    assert raised.value.step == step
    assert raised.value.key
    assert f"step {step}" in str(raised.value)
    assert raised.value.key in str(raised.value)
    return raised.value


@contextlib.contextmanager
def s3_that_answers(status, code):
    """A server that refuses every request the way S3 does."""

    class Refuser(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            if self.command != "HEAD":
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Refuser, f"do_{method}", Refuser.answer)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuser)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_wrong_credentials(code):
    with s3_that_answers(403 if code != "ExpiredToken" else 400, code) as endpoint:
        saver = Saver("s3://bucket/run", store=S3Options(endpoint_url=endpoint, retry=QUICK))
        error = refused(saver.save(5, numbered(5)), errors.StoreAuthError, 5)
        saver.close()
    assert "testing" not in str(error), "no credential in an error"


def test_a_bucket_that_does_not_exist(moto_endpoint):
    saver = Saver("s3://no-such-bucket/run", store=S3Options(endpoint_url=moto_endpoint, retry=QUICK))
    error = refused(saver.save(5, numbered(5)), errors.StoreNotFoundError, 5)
    assert "bucket" in str(error)
    saver.close()


def test_a_store_that_ignores_conditions(rclone_endpoint, rclone_bucket):
    url = f"s3://{rclone_bucket}/run"
    promised = S3Options(endpoint_url=rclone_endpoint, retry=QUICK, single_writer=True)
    with Saver(url, store=promised) as saver:
        saver.save(1, numbered(1)).result(PATIENCE_S)
        again = saver.save(1, numbered(9)).result(PATIENCE_S)
        assert again.skipped == "the step exists already"
    saver = Saver(url, store=S3Options(endpoint_url=rclone_endpoint, retry=QUICK))
    error = refused(saver.save(2, numbered(2)), errors.UnsafeStoreError, 2)
    assert "single_writer=True" in str(error)
    saver.close()
    with Run(url, store=promised) as run:
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]
    assert_numbered(asyncckpt.load(url, store=promised), 1)


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(step, size):
    import torch

    torch.manual_seed(step)
    return {"noise": torch.randint(0, 256, (size,), dtype=torch.uint8)}


def test_a_full_disk(small_disk):
    training = Training().step()
    saver = Saver(small_disk)
    saver.save(1, training.state).result(PATIENCE_S)
    expected = training.facts()
    refused(saver.save(2, noise(2, 6_000_000)), errors.DiskFullError, 2)
    assert sorted(path.name for path in small_disk.glob("step-*")) == ["step-0000000001", "step-0000000001.json"]
    assert not list(small_disk.glob(".asyncckpt-unfinished/*"))
    saver.save(3, noise(3, 1_000_000)).result(PATIENCE_S)  # what was written of step 2 makes room again
    saver.close()
    other = Training(seed=3).step()
    asyncckpt.restore(small_disk, other.state, step=1)
    assert_same(other.facts(), expected)


def test_a_folder_that_may_not_be_written(small_disk):
    saver = Saver(small_disk)
    saver.save(1, numbered(1, 1000)).result(PATIENCE_S)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = refused(saver.save(2, numbered(2, 1000)), errors.LocalIOError, 2)
    assert "read" in str(error).lower()
    assert_numbered(asyncckpt.load(small_disk), 1, 1000)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    saver.save(3, numbered(3, 1000)).result(PATIENCE_S)
    saver.close()
    assert_numbered(asyncckpt.load(small_disk), 3, 1000)


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file")
    error = refused(saver.save(2, numbered(2)), errors.StoreNotFoundError, 2)
    assert "is a file" in str(error)
    saver.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    saver = Saver(tmp_path / "run")
    refused(saver.save(2, numbered(2)), errors.LocalIOError, 2)
    saver.close()
    tmp_path.chmod(0o700)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def two_steps(tmp_path):
    """Steps 1 and 2, the shard and the record of step 2."""
    with Saver(tmp_path, codec="planes") as saver:
        saver.save(1, numbered(1))
        saver.save(2, numbered(2))
    (shard,) = (path for path in (tmp_path / "step-0000000002").rglob("*.zst") if "index" not in path.name)
    return tmp_path, shard, tmp_path / "step-0000000002.json"


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_checkpoint_that_was_harmed_falls_back_is_set_aside_and_saved_again(two_steps, harm):
    root, shard, _ = two_steps
    harm(shard)
    with pytest.raises(errors.CorruptCheckpointError) as raised:
        asyncckpt.load(root, step=2)
    assert raised.value.step == 2
    assert raised.value.key == str(shard.relative_to(root))
    with Saver(root) as saver:
        state = numbered(0)
        with pytest.warns(UserWarning, match="checkpoint 2 cannot be restored"):
            assert saver.restore(state).step == 1
        assert_numbered(state, 1)
        assert saver.save(2, numbered(2)).result(PATIENCE_S).skipped is None
    assert_numbered(asyncckpt.load(root), 2)


def test_a_checkpoint_of_a_newer_version_is_not_passed_over_in_silence_and_never_overwritten(two_steps):
    root, _, record = two_steps
    with Run(root) as run:
        change_record(run._store, 2, format=99)
    before = record.read_bytes()
    with pytest.raises(errors.FormatVersionError, match="format 99") as raised:
        asyncckpt.load(root)
    assert raised.value.step == 2
    assert raised.value.key == record.name
    with Saver(root) as saver:
        with pytest.raises(errors.FormatVersionError):
            saver.restore(numbered(0))
        assert saver.restore(numbered(0), step=1).step == 1
        with pytest.raises(errors.CheckpointConflictError):
            saver.save(2, numbered(2)).result(PATIENCE_S)
    assert record.read_bytes() == before
