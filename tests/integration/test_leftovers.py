"""What dies with its worker, its service or its host is gone in the end, on a real S3 server and with a real service."""

from datetime import timedelta

import pytest

from asyncckpt import KeepLast, Run, Saver, errors, events
from asyncckpt.checkpoints.leftovers import Leftovers
from asyncckpt.format import keys
from asyncckpt.store.opening import open_store
from tests.processes import PATIENCE_S, children, eventually, kill
from tests.trainers import s3
from tests.training import numbered

MEBI = 2**20


@pytest.fixture
def direct(moto_endpoint, s3_url):
    with open_store(s3_url, s3(moto_endpoint)) as store:
        yield store


def large():
    import torch

    return {"w": torch.arange(8 * MEBI, dtype=torch.float32)}  # 32 MiB in the codec "none": parts


def test_an_upload_whose_worker_died_is_ended_when_its_save_is_committed(proxy, s3_url, direct):
    with Saver(s3_url, store=s3(proxy.url), codec="none", workers=1) as saver:
        proxy.bytes_per_s = 20 * MEBI  # a part takes a while
        save = saver.save(1, large())
        service = eventually(lambda: saver._launcher._engine and saver._launcher._engine.pid, "there is a service")
        eventually(direct.open_uploads, "an upload has begun")
        (worker,) = children(service)
        kill(worker)
        proxy.bytes_per_s = None
        assert save.result(PATIENCE_S).step == 1
        eventually(lambda: not direct.open_uploads(), "nothing is open")
    with Run(s3_url, store=s3(proxy.url)) as run:
        run.get(1).verify()


def test_a_run_collects_what_a_dead_writer_left_and_keeps_what_stands(moto_endpoint, s3_url, direct):
    with Saver(s3_url, store=s3(moto_endpoint), workers=1) as saver:
        saver.save(1, numbered(1)).result(PATIENCE_S)
    dead = keys.folder(2, "0123abcd-000001")
    direct.put(dead + "state.pt", [b"x"])
    upload = direct.start_upload(dead + "x-00001-of-00001.safetensors")
    upload.write(1, 0, [bytes(5 * MEBI)])
    with Run(s3_url, store=s3(moto_endpoint)) as run:
        assert run.collect_garbage() == Leftovers(), "less than a day old"
        removed = []

        def collected():
            found = run.collect_garbage(timedelta(0))
            removed.extend([*found.folders, *found.uploads])
            return len(removed) == 2

        eventually(collected, "S3 tells times in whole seconds, and one has passed", 5)
        assert sorted(removed) == [dead, dead + "x-00001-of-00001.safetensors"]
        assert direct.open_uploads() == []
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]
        run.get(1).verify()
    upload.abort()


def test_what_retention_says_behind_the_last_save_is_heard_before_close_returns(tmp_path):
    with Saver(tmp_path, workers=1) as saver:
        for step in (1, 2):
            saver.save(step, numbered(step)).result(PATIENCE_S)
    record = tmp_path / "step-0000000001.json"
    record.write_bytes(record.read_bytes()[:-10])  # certain after a second of readings
    seen = []
    with Saver(tmp_path, keep=[KeepLast(1)], hooks=[seen.append], workers=1) as saver:
        saver.restore(numbered(0))
        saver.save(3, numbered(3))
    (event,) = [event for event in seen if isinstance(event, events.RetentionFailed)]
    assert event.steps == (1,)
    assert isinstance(event.error, errors.CorruptCheckpointError)
    assert events.CheckpointsRemoved((2,)) in seen
    assert not (tmp_path / "step-0000000002.json").exists()
