"""A service without its trainer: how long it may last, and what the next Saver of the same place is told."""

import json
import logging
import os
import time

import pytest

from asyncckpt import errors
from asyncckpt.engine.alone import Alone, tell_notices
from asyncckpt.engine.notices import Notice, notices_folder, take_notices

PLACE = "s3://bucket/run-42"


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "notices"


@pytest.fixture
def told(folder, caplog):
    """What the next Saver of the place logs: levels and lines."""

    def look(place=PLACE):
        caplog.clear()
        with caplog.at_level(logging.INFO, "asyncckpt"):
            tell_notices(folder, place)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return look


def alone(folder, clock, steps=(7,), deadline_s=600.0):
    return Alone(folder, PLACE, deadline_s=deadline_s, steps=steps, clock=clock)


def dead(one):
    """As if its process had ended: the kernel lets go of the lock."""
    os.close(one._notice._fd)


def test_one_deadline_bounds_everything_and_only_what_is_stored_moves_it(folder, clock):
    one = alone(folder, clock)
    clock.now_s += 500
    assert one.left_s == 100
    one.moved()
    assert one.left_s == 600
    clock.now_s += 400
    one.answered(7, errors.DeadlineExceededError("put failed"))  # from now on it only cleans up
    assert one.left_s == 200
    clock.now_s += 300
    assert one.left_s == 0
    one.end(unfinished=True)
    dead(one)


def test_what_was_stored_is_told_once_and_leaves_no_file(folder, clock, told):
    one = alone(folder, clock)
    one.answered(7, None)
    one.end(unfinished=False)
    dead(one)
    ((level, line),) = told()
    assert level == "INFO"
    assert line.startswith(f"{PLACE}: a checkpoint service that was left alone at 20")
    assert line.endswith("step(s) 7 stored")
    assert told() == []
    assert list(folder.iterdir()) == []


def test_a_save_that_failed_is_told_with_its_reason(folder, clock, told):
    one = alone(folder, clock, steps=(7, 8))
    one.answered(7, None)
    one.answered(8, errors.DiskFullError("put: no space left", step=8))
    one.end(unfinished=False)
    dead(one)
    ((level, line),) = told()
    assert level == "WARNING"
    assert "step(s) 7 stored; step 8 failed (DiskFullError: put: no space left [step 8])" in line


def test_a_save_that_was_given_up_at_the_deadline_is_told_with_the_option(folder, clock, told):
    one = alone(folder, clock)
    one.end(unfinished=True)
    dead(one)
    ((level, line),) = told()
    assert level == "WARNING"
    assert "step(s) 7 given up: nothing was stored for 600 s (RetryPolicy.deadline_s)" in line


def test_a_clean_up_that_was_cut_is_told(folder, clock, told):
    one = alone(folder, clock)
    one.answered(7, None)
    one.end(unfinished=True)
    dead(one)
    ((_, line),) = told()
    assert line.endswith("step(s) 7 stored; its clean-up was not finished")


def test_a_service_that_was_killed_is_told(folder, clock, told):
    dead(alone(folder, clock, steps=(7, 8)))
    ((level, line),) = told()
    assert level == "WARNING"
    assert "step(s) 7, 8 not finished: the service was killed" in line


def test_a_service_that_still_works_is_told_to_every_saver(folder, clock, told):
    one = alone(folder, clock)
    for _ in range(2):
        ((level, line),) = told()
        assert level == "WARNING"
        assert "step(s) 7 on their way; it goes on, and gives up after 600 s in which nothing is stored" in line
    dead(one)


def test_a_service_with_nothing_to_tell_leaves_nothing(folder, clock):
    one = alone(folder, clock, steps=())
    one.end(unfinished=False)
    assert not folder.exists()


def test_a_saver_of_another_place_is_told_nothing(folder, clock, told):
    dead(alone(folder, clock))
    assert told("s3://bucket/run-4") == []
    assert len(told()) == 1


def test_a_folder_that_somebody_else_may_write_to_is_not_used(folder, clock, told):
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    one = alone(folder, clock)
    one.answered(7, errors.CheckpointError("lost"))
    assert list(folder.iterdir()) == []
    (folder / "x.json").write_text("{}")
    assert told() == []


def test_a_place_of_notices_that_is_a_link_or_a_file_is_not_used(tmp_path, clock, told):
    for folder in (tmp_path / "link", tmp_path / "notices"):
        target = tmp_path / f"{folder.name}-target"
        target.mkdir()
        folder.symlink_to(target)
        alone(folder, clock).answered(7, None)
        assert list(target.iterdir()) == []
    assert told() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"since_s": "x"}', '{"since_s": 1e300, "saves": {}}'])
def test_a_notice_that_is_no_notice_is_taken_away_in_silence(folder, clock, told, text):
    one = alone(folder, clock)
    (path,) = folder.iterdir()
    path.write_text(text)
    dead(one)
    assert told() == []
    assert list(folder.iterdir()) == []


def test_notices_that_nobody_came_back_for_go_after_a_week(folder, clock):
    old = Notice(folder, "s3://bucket/other")
    old.write({"x": 1})
    (path,) = folder.iterdir()
    os.close(old._fd)
    os.utime(path, (time.time() - 8 * 86_400,) * 2)
    dead(alone(folder, clock))
    assert not path.exists()
    assert [facts["saves"] for facts, _ in take_notices(folder, PLACE)] == [{"7": ""}]


def test_a_shorter_notice_leaves_nothing_of_a_longer_one(folder):
    notice = Notice(folder, PLACE)
    notice.write({"text": "x" * 1000})
    notice.write({"text": "y"})
    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) == {"text": "y"}
    os.close(notice._fd)


def test_notices_are_of_one_user():
    assert str(os.geteuid()) in notices_folder().name
